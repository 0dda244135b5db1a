"""Commit, resume, refuse: what is on disk after each, and what a second dump is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_store as synthetic
from predistill.store import (
    ConfigError,
    FormatVersionError,
    OutOfSpace,
    StoreCorrupt,
    StoreError,
    StoreIncomplete,
    StoreMismatch,
    StoreWriter,
    TeacherStore,
)
from predistill.store.identity import content_hash, tokenizer_sha256, weights_sha256
from predistill.store.verify import describe, verify


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "shards").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("stores") / "whole")


def test_a_dump_in_pieces_has_the_bytes_of_one_in_one_go(tmp_path: Path, whole: Path) -> None:
    for _ in synthetic.SHARDS:
        with StoreWriter.begin(tmp_path / "s", synthetic.plan()) as writer:
            writer.commit(synthetic.fill(writer, writer.missing()[-1]))  # any order
    with StoreWriter.begin(tmp_path / "s", synthetic.plan()) as writer:
        assert not writer.missing()
        writer.finish()
    assert shards(tmp_path / "s") == shards(whole)
    assert (tmp_path / "s/store.json").read_bytes() == (whole / "store.json").read_bytes()


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path) -> None:
    with StoreWriter.begin(tmp_path / "s", synthetic.plan()) as writer:
        for shard in writer.missing()[1:3]:
            writer.commit(synthetic.fill(writer, shard))
        with pytest.raises(StoreError, match="2 of 4 shards are committed"):
            writer.finish()
    with pytest.raises(StoreIncomplete, match="2 of 4 shards are there; run the same dump again"):
        TeacherStore.open(tmp_path / "s")
    store = TeacherStore.open(tmp_path / "s", allow_partial=True)
    rows = store.select("train", where="label = 2")
    assert len(store.select()) == 40 and rows.column("labels").tolist() == [2] * len(rows)
    assert describe(tmp_path / "s")["complete"] is False


def test_a_shard_that_was_cut_short_is_made_again(tmp_path: Path, whole: Path) -> None:
    path = synthetic.write(tmp_path / "s")
    target = path / "shards/train-00001.arrow"
    os.truncate(target, 100)
    with StoreWriter.begin(path, synthetic.plan()) as writer:
        assert [shard.name for shard in writer.missing()] == ["train-00001"]
        writer.commit(synthetic.fill(writer, writer.missing()[0]))
        writer.finish()
    assert shards(path) == shards(whole) and verify(path)["ok"]


def test_another_setting_is_refused_by_name(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(StoreMismatch, match='settings.dtype differs: the store has "float16", this run has "float32"'):
        StoreWriter.begin(whole, synthetic.plan(dtype="float32"))
    other = synthetic.plan()
    other.identity["teacher"] = {"name": "elsewhere", "weights_sha256": "f" * 64}
    with pytest.raises(
        StoreMismatch, match="identity.teacher.weights_sha256 differs: the store has 000000000000, this"
    ):
        StoreWriter.begin(whole, other)
    assert verify(whole)["ok"]


def test_the_same_teacher_from_another_path_is_the_same(whole: Path, tmp_path: Path) -> None:
    moved = synthetic.plan()
    moved.identity["teacher"] = {**moved.identity["teacher"], "name": "another/path"}
    StoreWriter.begin(whole, moved).close()
    with StoreWriter.begin(tmp_path / "s", moved) as writer:
        writer.commit(synthetic.fill(writer, writer.missing()[0]))
    assert shards(tmp_path / "s")["train-00000.arrow"] == shards(whole)["train-00000.arrow"]


def test_overwrite_starts_over(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "s")
    with StoreWriter.begin(path, synthetic.plan(dtype="other"), overwrite=True) as writer:
        assert len(writer.missing()) == 4
        with pytest.raises(StoreIncomplete, match="0 of 4"):
            TeacherStore.open(path)


def test_a_folder_that_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds thesis.tex and is not a store"):
            StoreWriter.begin(tmp_path, synthetic.plan(), overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        StoreWriter.begin(tmp_path / "thesis.tex", synthetic.plan())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def _hold(path: Path, ready: object, release: object) -> None:
    with StoreWriter.begin(path, synthetic.plan()):
        ready.set()  # type: ignore[attr-defined]
        release.wait(60)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_second_dump_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(tmp_path / "s", ready, release))
    first.start()
    assert ready.wait(60)
    with pytest.raises(StoreError, match="being written by another dump"):
        StoreWriter.begin(tmp_path / "s", synthetic.plan())
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    StoreWriter.begin(tmp_path / "s", synthetic.plan()).close()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, whole: Path) -> None:
    """A limit on file size stands for the disk: the shard does not fit, what was committed stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with StoreWriter.begin(tmp_path / "s", synthetic.plan()) as writer:
        writer.commit(synthetic.fill(writer, synthetic.SHARDS[0]))
        builder = synthetic.fill(writer, synthetic.SHARDS[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(
                OutOfSpace, match="GB free\\); what was committed is safe: make room, then run the same"
            ):
                writer.commit(builder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert set(shards(tmp_path / "s")) == {"train-00000.arrow", "train-00000.json"}
        for shard in writer.missing():
            writer.commit(synthetic.fill(writer, shard))
        writer.finish()
    assert shards(tmp_path / "s") == shards(whole)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_really_full_disk(tmp_path: Path, whole: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with StoreWriter.begin(disk / "s", synthetic.plan()) as writer:
            with pytest.raises(OutOfSpace, match="No space left"):
                for shard in writer.missing():
                    writer.commit(synthetic.fill(writer, shard))
            assert not [name for name in shards(disk / "s") if name.endswith(".tmp")]
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            for shard in writer.missing():
                writer.commit(synthetic.fill(writer, shard))
            writer.finish()
        assert shards(disk / "s") == shards(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "s")
    made = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**made, "format_version": 2}))
    with pytest.raises(FormatVersionError, match=r"newer predistill \(format 2\); this one reads 1"):
        TeacherStore.open(path)


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        TeacherStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is not a store"):
        TeacherStore.open(tmp_path)
    path = synthetic.write(tmp_path / "s")
    (path / "store.json").write_text("{}")
    with pytest.raises(StoreCorrupt, match="format_version"):
        TeacherStore.open(path)


def test_content_hashes_tell_rows_apart() -> None:
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"]) != content_hash(["abc"])
    assert content_hash(["a", None]) != content_hash(["a", ""]) != content_hash(["a", b""])
    assert content_hash(["a"]) == content_hash(iter(["a"])) and len(content_hash([])) == 16


def test_a_tokenizers_hash_is_of_content_not_of_its_last_call(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    before = tokenizer_sha256(tokenizer)
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["predistill"])
    assert tokenizer_sha256(tokenizer) != before


def test_a_weights_hash_follows_content(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = weights_sha256(tiny_teacher_dir)
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((tiny_teacher_dir / "model.safetensors").read_bytes())
    (copy / "model.safetensors").write_bytes(data)
    assert weights_sha256(copy) == weights_sha256(tiny_teacher_dir) == before
    (copy / "optimizer.pt").write_bytes(b"a trainer's")
    assert weights_sha256(copy) == before
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_sha256(copy) != before


def test_no_pandas_is_imported_by_reading(whole: Path) -> None:
    """pandas costs 0.3 s and 30 MB; reading and querying must not pull it in."""
    code = (
        "import sys; from predistill.store import TeacherStore\n"
        f"store = TeacherStore.open({str(whole)!r})\n"
        "rows = store.select('train', where='label >= 0')\n"
        "rows[[0, 1]]; list(rows.batches([[0], [1]])); rows.column('labels')\n"
        "store.sql('SELECT count(*) FROM samples').fetchall()\n"
        "found = {'pandas', 'torch', 'transformers', 'datasets'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lengths_must_fit(tmp_path: Path) -> None:
    from predistill.store import DataError

    with StoreWriter.begin(tmp_path / "s", synthetic.plan()) as writer:
        builder = synthetic.fill(writer, synthetic.SHARDS[0])
        with pytest.raises(DataError, match="rows of 7 entries in all; got 6"):
            builder.put("teacher_logsumexp", np.array([0]), np.zeros(6, np.float32))
        with pytest.raises(DataError, match="the shard has 30 rows; got 2"):
            builder.put_column("meta", __import__("pyarrow").array([1, 2]))
