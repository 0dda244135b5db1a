"""Stores taken from elsewhere: whole, in part, interrupted, hostile."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import synthetic_store
from predistill import (
    ConfigError,
    OutOfSpace,
    StoreCorrupt,
    StoreError,
    StoreIncomplete,
    StoreMismatch,
    TeacherStore,
)
from predistill.store import Plan, ShardPlan
from predistill.store.images.views import VIEW_FIELDS
from predistill.store.remote import elsewhere as remote
from predistill.store.remote import transfer
from predistill.store.remote.choice import chosen_shards
from predistill.store.remote.config import PullConfig
from predistill.store.remote.elsewhere import FilePlace
from predistill.store.remote.pull import pull
from predistill.store.verify import verify
from remote_cases import as_json, files_of, forge, predistill, wide_store


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_store(tmp_path_factory.mktemp("wide") / "store")


@pytest.fixture(scope="module")
def every_field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_store.write(tmp_path_factory.mktemp("synthetic") / "store")


def take(source: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return pull(PullConfig(f"file://{source}", str(output), **settings))


def test_a_store_comes_as_it_is(every_field: Path, tmp_path: Path) -> None:
    found = take(every_field, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(every_field)
    assert verify(tmp_path / "pulled")["ok"]
    assert found["samples"] == 80 and found["left_out"] == {"shards": 0, "fields": []}
    again = take(every_field, tmp_path / "pulled")
    assert again["fetched"] == 0
    assert files_of(tmp_path / "pulled") == files_of(every_field)


def test_the_index_of_a_stranger_is_never_taken(every_field: Path, tmp_path: Path) -> None:
    source = shutil.copytree(every_field, tmp_path / "source")
    (source / "index.duckdb").write_bytes(b"not a database")
    take(source, tmp_path / "pulled")
    with TeacherStore.open(tmp_path / "pulled") as store:
        assert store.sql("SELECT count(*) FROM samples").fetchall() == [(80,)]


def test_memory_is_a_place_too(every_field: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in files_of(every_field).items():
        memory.pipe_file(f"/shared/store/{name}", data)
    pull(PullConfig("memory://shared/store", str(tmp_path / "pulled")))
    assert files_of(tmp_path / "pulled") == files_of(every_field)


def test_a_part_is_a_store(every_field: Path, tmp_path: Path) -> None:
    """Held against the whole store by plain pyarrow and DuckDB."""
    named = ["teacher_kept_logits", "teacher_samples", "teacher_hidden_states_06"]
    found = take(every_field, tmp_path / "part", split=["train"], fields=named)
    assert verify(tmp_path / "part")["ok"]
    assert found["left_out"]["shards"] == 1 and "teacher_logits" in found["left_out"]["fields"]
    for name in ("train-00000", "train-00001", "train-00002"):
        part, whole = (
            pa.ipc.open_file(pa.memory_map(str(root / "shards" / f"{name}.arrow"))).read_all()
            for root in (tmp_path / "part", every_field)
        )
        assert {*named, "teacher_kept_counts", "teacher_positions", "teacher_sizes"} <= set(part.column_names)
        assert {"input_ids", "labels", "image", "meta", "teacher_loss"} <= set(part.column_names)
        assert not {"teacher_logits", "teacher_feature_map"} & set(part.column_names)
        for column in part.column_names:
            assert repr(part[column].to_pylist()) == repr(whole[column].to_pylist()), column  # NaN is no NaN
    kept = "split, source_index, view, content_hash, teacher_loss"
    rows = [
        duckdb.execute(f"SELECT {kept} FROM '{root}/samples.parquet' WHERE split = 'train' ORDER BY ALL").fetchall()
        for root in (tmp_path / "part", every_field)
    ]
    assert len(rows[0]) == 70 and rows[0] == rows[1]
    with TeacherStore.open(tmp_path / "part") as part_store, TeacherStore.open(every_field) as whole_store:
        origin = part_store.settings["taken_from"]
        assert origin["fingerprint"] == whole_store.fingerprint != part_store.fingerprint
        assert (origin["shards"], origin["left_out"]["shards"]) == (4, 1)
        mine, theirs = part_store.select(split="train")[[3, 40]], whole_store.select(split="train")[[3, 40]]
        for name in named:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_a_part_of_a_part_says_both(every_field: Path, tmp_path: Path) -> None:
    take(every_field, tmp_path / "one", split=["train"])
    take(tmp_path / "one", tmp_path / "two", fields=["teacher_logits"])
    assert verify(tmp_path / "two")["ok"]
    with TeacherStore.open(tmp_path / "two") as store, TeacherStore.open(tmp_path / "one") as one:
        assert store.settings["taken_from"]["fingerprint"] == one.fingerprint
        assert store.settings["taken_from"]["taken_from"] == one.settings["taken_from"]


class Traffic:
    """Bytes that were read of each file of a place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes: dict[str, int] = {}
        read = FilePlace.read

        def counted(place: FilePlace, name: str, start: int = 0, stop: int | None = None) -> bytes:
            data = read(place, name, start, stop)
            self.bytes[name] = self.bytes.get(name, 0) + len(data)
            return data

        monkeypatch.setattr(FilePlace, "read", counted)


def test_columns_come_without_the_others(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(monkeypatch)
    take(wide, tmp_path / "part", split=["train"], fields=["teacher_confidence"])
    whole = (wide / "shards" / "train-00000.arrow").stat().st_size
    assert whole > 128_000
    assert traffic.bytes["shards/train-00000.arrow"] < 0.3 * whole
    assert "shards/validation-00000.arrow" not in traffic.bytes
    assert verify(tmp_path / "part")["ok"]
    with TeacherStore.open(tmp_path / "part") as part, TeacherStore.open(wide) as store:
        assert "teacher_logits" not in part.fields
        mine, theirs = part.select(split="train")[range(64)], store.select(split="train")[range(64)]
        for name in ("input_ids", "labels", "teacher_confidence"):
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_a_condition_takes_the_shards_that_have_such_rows(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(monkeypatch)
    found = take(wide, tmp_path / "part", where="split = 'train' AND source_index BETWEEN 20 AND 33")
    assert found["shards"] == 2 and found["samples"] == 32
    touched = {name for name in traffic.bytes if name.endswith(".arrow")}
    assert touched == {"shards/train-00001.arrow", "shards/train-00002.arrow"}
    assert verify(tmp_path / "part")["ok"]


def test_views_come_with_what_they_are_views_of(every_field: Path, tmp_path: Path) -> None:
    take(every_field, tmp_path / "part", where="view = 1")
    with TeacherStore.open(tmp_path / "part") as store:
        assert [(shard.name, shard.view) for shard in store.shards] == [("train-00000", 0), ("train-00002", 1)]


def test_mixed_images_come_with_all_that_may_be_mixed_in() -> None:
    shards = [ShardPlan("train", 0, 0, 9), ShardPlan("train", 1, 9, 18), ShardPlan("train", 2, 0, 9, view=1),
              ShardPlan("validation", 0, 0, 9)]  # fmt: skip
    plan = Plan("image-classification", {}, {}, list(VIEW_FIELDS), shards)

    class Index:
        first_row = np.array([0, 9, 18, 27, 36])

        def select(self, **_: Any) -> Any:
            return SimpleNamespace(sample_ids=np.array([20]))

    config = PullConfig("x", "y", where="view = 1")
    index: Any = Index()
    assert chosen_shards(plan, {}, config, index) == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": ["test"]}, "--split test: the store has train, validation"),
        ({"fields": ["logits"]}, "--fields logits: the store has input_ids"),
        ({"where": "label = 99"}, "keeps no row"),
        ({"where": "no_such = 1"}, "is no SQL condition"),
        ({"where": "1 = (SELECT count(*) FROM read_text('/etc/passwd'))"}, "disabled"),
        ({"where": " "}, "--where is empty"),
        ({"jobs": 0}, "--jobs is a whole number"),
        ({"revision": "main"}, "has no revisions"),
    ],
)
def test_what_cannot_be_taken(wide: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take(wide, tmp_path / "part", **settings)
    assert not (tmp_path / "part" / "store.json").exists()


def test_another_part_does_not_go_into_the_same_folder(wide: Path, tmp_path: Path) -> None:
    take(wide, tmp_path / "part", split=["train"])
    with pytest.raises(StoreMismatch, match="another part"):
        take(wide, tmp_path / "part", split=["validation"])
    assert verify(tmp_path / "part")["ok"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="thesis.tex"):
        take(wide, tmp_path / "mine")


# ---- interrupted ----

_SLOW = """
import sys, time
from predistill.store.remote import elsewhere as remote, transfer
from predistill.store.remote.pull import pull
from predistill.store.remote.config import PullConfig
transfer.CHUNK = 8192
read = remote.FilePlace.read
def slow(*words, **named):
    time.sleep(0.02)
    return read(*words, **named)
remote.FilePlace.read = slow
pull(PullConfig(sys.argv[1], sys.argv[2], jobs=2, fields=sys.argv[3:]))
"""


_COMMAND = """
from predistill.cli import cli
cli(["pull", *sys.argv[1:]])
"""


@pytest.mark.parametrize("fields", [[], ["teacher_logits"]])
def test_killed_anywhere_it_goes_on(wide: Path, tmp_path: Path, fields: list[str]) -> None:
    target = tmp_path / "pulled"
    command = [sys.executable, "-c", _SLOW, f"file://{wide}", str(target), *fields]
    arrived = 0
    for _ in range(3):
        running = subprocess.Popen(command, env={**os.environ, "PREDISTILL_CACHE": str(tmp_path / "cache")})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running.poll() is None:
            now = sum(path.stat().st_size for path in (target / "shards").glob("*.arrow*")) if target.exists() else 0
            if now > arrived + 30_000:
                arrived = now
                break
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        for path in target.glob("shards/*.json"):  # what counts is whole
            shard = path.with_suffix(".arrow").read_bytes()
            assert hashlib.sha256(shard).hexdigest() == json.loads(path.read_text())["sha256"]
    assert not (target / "store.json").exists()
    take(wide, target, fields=fields)
    assert verify(target)["ok"]
    if not fields:
        assert files_of(target) == files_of(wide)


def test_what_lies_there_of_another_file_is_not_taken_for_a_beginning(wide: Path, tmp_path: Path) -> None:
    shards = tmp_path / "pulled" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "pulled" / "plan.json").write_bytes((wide / "plan.json").read_bytes())
    (shards / "train-00000.arrow.part").write_bytes(b"x" * 5000)
    (shards / "train-00001.arrow.part").write_bytes(b"x" * 500_000)
    take(wide, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(wide)


def test_the_network_may_stumble(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    cat, calls = LocalFileSystem.cat_file, iter(range(1000))

    def stumbling(*words: Any, **named: Any) -> bytes:
        if next(calls) % 3 == 1:
            raise ConnectionResetError("reset by peer")
        return cat(*words, **named)

    monkeypatch.setattr(LocalFileSystem, "cat_file", stumbling)
    take(wide, tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(wide)


@pytest.mark.parametrize("fields", [[], ["teacher_logits"]])
def test_a_full_disk(wide: Path, tmp_path: Path, fields: list[str]) -> None:
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OutOfSpace, match="the same"):
            take(wide, tmp_path / "pulled", fields=fields)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "pulled" / "store.json").exists()
    take(wide, tmp_path / "pulled", fields=fields)
    assert verify(tmp_path / "pulled")["ok"]


def test_interrupted_it_says_how_to_go_on(wide: Path, tmp_path: Path) -> None:
    slow = _SLOW.replace("pull(PullConfig(sys.argv[1], sys.argv[2], jobs=2, fields=sys.argv[3:]))", _COMMAND)
    running = subprocess.Popen(
        [sys.executable, "-c", slow, f"file://{wide}", str(tmp_path / "pulled")], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PREDISTILL_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("pulled/shards/*.part")):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said == "Interrupted. What has arrived stays; the same command goes on from there.\n"


# ---- half, damaged, hostile, changing ----


def test_half_a_store_at_the_other_end(wide: Path, tmp_path: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    (source / "store.json").unlink()
    with pytest.raises(StoreIncomplete, match=r"half a store: store\.json, which arrives last"):
        take(source, tmp_path / "pulled")
    with pytest.raises(StoreError, match=r"is not a store, or is not there"):
        take(tmp_path / "nowhere", tmp_path / "pulled")


@pytest.mark.parametrize("fields", [[], ["teacher_logits"]])
def test_a_damaged_shard_is_not_kept(wide: Path, tmp_path: Path, fields: list[str]) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    path = source / "shards" / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"train-00001\.arrow is not the file"):
        take(source, tmp_path / "pulled", split=["train"], fields=fields)
    assert not list((tmp_path / "pulled" / "shards").glob("train-00001*"))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreCorrupt, match=r"train-00001\.arrow is not the file"):
        take(source, tmp_path / "pulled", split=["train"], fields=fields)
    path.write_bytes((wide / "shards" / "train-00001.arrow").read_bytes())
    take(source, tmp_path / "pulled", split=["train"], fields=fields)
    assert verify(tmp_path / "pulled")["ok"]


def _rename_file(name: str) -> Any:
    def change(made: dict[str, Any]) -> None:
        made["files"][name] = made["files"].pop("samples.parquet")

    return change


def _set_shard(**values: Any) -> Any:
    def change(made: dict[str, Any]) -> None:
        made["shards"][0].update(values)
        if "name" in values:
            made["plan"]["shards"][0]["split"] = values["name"].rpartition("-")[0]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _rename_file("../../outside"),
        _rename_file("/etc/cron.d/x"),
        _rename_file("store.json"),
        _rename_file("shards/train-00000.arrow"),
        _rename_file("index.duckdb"),
        _rename_file("tokenizer/../../x"),
        _rename_file("tokenizer/\n.json"),
        _set_shard(name="../../x-00000"),
        _set_shard(bytes=-1),
        _set_shard(rows="many"),
        _set_shard(sha256="0"),
        lambda made: made.update(shards=None),
        lambda made: made.update(files=[1]),
        lambda made: made["files"].update({"tokenizer/x": 7}),
    ],
)
def test_a_hostile_manifest_writes_nothing(wide: Path, tmp_path: Path, change: Any) -> None:
    source = shutil.copytree(wide, tmp_path / "a" / "source")
    forge(source, change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError):
        take(source, tmp_path / "a" / "pulled")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_manifest_of_more_bytes_than_a_disk_has(wide: Path, tmp_path: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    forge(source, _set_shard(bytes=10**17))
    with pytest.raises(OutOfSpace, match="are free"):
        take(source, tmp_path / "pulled")


def test_links_lead_nowhere(wide: Path, tmp_path: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    (tmp_path / "secret").write_text("password")
    (source / "README.md").unlink()
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreCorrupt, match="leads out of its folder"):
        take(source, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "README.md").exists()


def test_a_shard_of_another_store_under_a_forged_checksum(wide: Path, tmp_path: Path) -> None:
    source, other = shutil.copytree(wide, tmp_path / "source"), wide_store(tmp_path / "other", seed=5, dtype="float16")
    data = (other / "shards" / "train-00000.arrow").read_bytes()
    (source / "shards" / "train-00000.arrow").write_bytes(data)
    forge(source, _set_shard(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))
    for settings in ({}, {"split": ["train"]}):
        with pytest.raises(StoreCorrupt, match="another"):
            take(source, tmp_path / f"pulled{len(settings)}", **settings)


def test_a_store_that_is_replaced_meanwhile(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = shutil.copytree(wide, tmp_path / "source"), wide_store(tmp_path / "other", seed=5)
    read = transfer.read_remote_manifest

    def then_replaced(place: Any) -> dict[str, Any]:
        made = read(place)
        shutil.rmtree(source)
        shutil.copytree(other, source)
        monkeypatch.setattr(transfer, "read_remote_manifest", read)
        return made

    monkeypatch.setattr("predistill.store.remote.pull.read_remote_manifest", then_replaced)
    with pytest.raises(StoreMismatch, match="changed while it was read"):
        take(source, tmp_path / "pulled")


def test_columns_of_a_shard_that_changes_meanwhile(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    from predistill.store.remote.ranges import ColumnReader

    ask = ColumnReader._ask

    def touched(reader: ColumnReader) -> Any:
        wanted = ask(reader)
        os.utime(source / "shards" / "train-00000.arrow", (1, 1))
        return wanted

    monkeypatch.setattr(ColumnReader, "_ask", touched)
    with pytest.raises(StoreMismatch, match=r"train-00000\.arrow changed"):
        take(source, tmp_path / "pulled", split=["train"], fields=["teacher_confidence"])


# ---- at the door ----


def test_credentials_are_in_no_message(tmp_path: Path) -> None:
    for url in ("nosuch://me:secret1@host/path?token=secret2", "http://me:secret1@127.0.0.1:1/x?sig=secret2"):
        done = predistill("pull", url, tmp_path / "pulled", check=False)
        assert done.returncode == 1 and done.stderr.startswith("Error: ")
        assert "secret" not in done.stderr + done.stdout and len(done.stderr.strip().splitlines()) == 1
    assert remote.clean("at https://u:p@h/x?sig=1 with hf_abcdefghijkl") == "at https://h/x with hf_…"


def test_a_library_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/x needs a library .*: pip install predistill\[remote\]"):
        pull(PullConfig("s3://bucket/x", str(tmp_path / "pulled")))


def test_the_command(wide: Path, tmp_path: Path) -> None:
    told = as_json(predistill("pull", wide, tmp_path / "pulled", "--split", "validation", "--json"))
    assert told["shards"] == 1 and told["samples"] == 16
    shown = predistill("pull", wide, tmp_path / "pulled", "--split", "validation").stdout
    assert "left out" in shown and "4 shards, 0 fields" in shown
    done = predistill("pull", tmp_path / "nowhere", tmp_path / "other", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "is not a store" in done.stderr
