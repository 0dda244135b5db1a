"""Rows taken out for good: what stays is read with plain pyarrow, what went is looked for in every byte."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import synthetic_store as synthetic
from click.testing import CliRunner
from predistill.cli import cli
from predistill.store import ConfigError, StoreCorrupt, StoreError, TeacherStore
from predistill.store.convert.config import DropConfig
from predistill.store.convert.drop import drop
from predistill.store.verify import rebuild_index, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("whole") / "store")


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def table(folder: Path, name: str) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(folder / "shards" / f"{name}.arrow"))).get_batch(0)


def sound(folder: Path) -> None:
    found = verify(folder)
    assert found["ok"], found["problems"]


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "shards").glob("*.arrow")}


def test_rows_go_and_all_others_stay_byte_for_byte(store: Path, made: Path) -> None:
    before, ids = digests(store), (store / "shards" / "train-00000.arrow").stat().st_ino
    rows = drop(DropConfig(str(store), "split = 'train' AND view = 0 AND source_index IN (31, 49)", yes=True))
    assert rows == {
        "dropped": True,
        "rows": 2,
        "along": 0,
        "samples": 78,
        "splits": {"train": 2},
        "shards": 1,
        "output": str(store),
    }
    sound(store)
    after = digests(store)
    assert {name for name in before if before[name] != after[name]} == {"train-00001.arrow"}
    assert (store / "shards" / "train-00000.arrow").stat().st_ino == ids  # linked, not written
    old, new = table(made, "train-00001"), table(store, "train-00001")
    kept = [row for row in range(20) if row + 30 not in (31, 49)]
    assert repr(new.to_pylist()) == repr(old.take(pa.array(kept)).to_pylist())  # NaN stays NaN
    for key in (b"predistill.fields", b"predistill.fingerprint"):
        assert new.schema.metadata[key] == old.schema.metadata[key]
    assert json.loads(new.schema.metadata[b"predistill.shard"])["rows"] == 18
    assert not list(store.parent.glob(".*"))


def test_all_views_of_a_row_go_with_its_first(store: Path) -> None:
    found = drop(DropConfig(str(store), "source_index = 5 AND view = 0 AND split = 'train'", yes=True))
    assert (found["rows"], found["along"], found["shards"]) == (2, 1, 2)
    sound(store)
    with TeacherStore.open(store) as opened:
        assert opened.sql("SELECT count(*) FROM samples WHERE source_index = 5").fetchall() == [(1,)]  # of validation


def test_a_later_view_goes_alone(store: Path) -> None:
    found = drop(DropConfig(str(store), "source_index = 5 AND view = 1", yes=True))
    assert (found["rows"], found["along"]) == (1, 0)
    sound(store)


def test_dropped_bytes_are_nowhere_left(store: Path) -> None:
    """Of each column whose values are long enough not to be there by chance."""
    gone = synthetic.truth(synthetic.SHARDS[0])[2][3:9]
    needles: set[bytes] = set()
    for row in gone:
        for name in ("input_ids", "teacher_hidden_states_00"):
            kind = np.int32 if name == "input_ids" else np.float32
            data = row[name].astype(kind).tobytes()
            needles |= {data} if len(data) >= 16 else set()
    hashes = table(store, "train-00000").column("content_hash").to_pylist()[3:9]
    validation = table(store, "validation-00000").column("content_hash").to_pylist()[9:]  # not dropped
    needles |= {*hashes, *(one.hex().encode() for one in hashes)}
    held = everything(store)
    assert len(needles) > 12 and all(one in held for one in needles if len(one) != 32)
    (store / "shards" / "train-00000.arrow.tmp").write_bytes(b"".join(needles))  # what a killed dump left
    drop(DropConfig(str(store), "source_index BETWEEN 3 AND 8", yes=True))
    sound(store)
    held = everything(store)
    assert not [one for one in needles if one in held]
    for path in ("samples.parquet", "index.duckdb"):  # which are compressed
        with duckdb.connect() as connection:
            if path == "index.duckdb":
                connection.execute(f"ATTACH '{store / path}' AS stored (READ_ONLY)")
            source = "stored.samples" if path == "index.duckdb" else f"'{store / path}'"
            found = {one for (one,) in connection.execute(f"SELECT content_hash FROM {source}").fetchall()}
        assert found and not found & {one.hex() for one in hashes if one not in validation}


def test_index_samples_and_manifest_are_renewed(store: Path) -> None:
    drop(DropConfig(str(store), "label = 1", yes=True))
    drop(DropConfig(str(store), "split = 'validation' AND source_index = 0", yes=True))
    sound(store)
    query = f"SELECT count(*), count(*) FILTER (label = 1), max(sample_id) FROM '{store}/samples.parquet'"
    [(rows, ones, last)] = duckdb.connect().execute(query).fetchall()
    made = json.loads((store / "store.json").read_text())
    assert ones == 0 and last == rows - 1 == sum(entry["rows"] for entry in made["shards"]) - 1
    assert made["dropped"]["rows"] == 80 - rows == sum(made["dropped"]["splits"].values())
    assert made["dropped"]["splits"]["validation"] == 10 - made["shards"][3]["rows"]
    assert "label = 1" not in (store / "store.json").read_text()  # a condition may name a person
    rebuild_index(store)
    sound(store)
    with TeacherStore.open(store) as opened:
        batch = opened.select(split="train")[list(range(5))]
        assert (batch["labels"] != 1).all()


def test_a_shard_of_which_nothing_is_left(store: Path) -> None:
    found = drop(DropConfig(str(store), "shard IN ('train-00000', 'validation-00000')", yes=True))
    assert found["samples"] == 20  # the second view goes with the first
    sound(store)
    with TeacherStore.open(store) as opened:
        assert opened.splits["validation"]["samples"] == 0
        assert len(opened.select(split="train")) == 20
        assert opened.select(split="train")[[0, 19]]["input_ids"].shape[0] == 2


def test_counting_changes_nothing(store: Path) -> None:
    before = everything(store)
    found = drop(DropConfig(str(store), "source_index < 3"))
    assert not found["dropped"] and found["splits"] == {"train": 6, "validation": 3}
    assert everything(store) == before
    assert drop(DropConfig(str(store), "source_index = 999", yes=True))["rows"] == 0
    assert everything(store) == before


@pytest.mark.parametrize(
    ("where", "kind", "says"),
    [("nothing = 1", ConfigError, "nothing"), ("true", ConfigError, "all 80 rows would go"),
     ("source_index = (SELECT count(*) FROM read_text('/etc/passwd'))", ConfigError, "where")],
)  # fmt: skip
def test_what_cannot_be_dropped(store: Path, where: str, kind: type[Exception], says: str) -> None:
    before = everything(store)
    with pytest.raises(kind, match=says):
        drop(DropConfig(str(store), where, yes=True))
    assert everything(store) == before


def test_damage_is_not_written_anew(store: Path) -> None:
    path = store / "shards" / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="train-00001.arrow is not what the dump wrote"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    path.write_bytes(bytes(data[:-9]))
    with pytest.raises(StoreError):
        drop(DropConfig(str(store), "source_index = 40", yes=True))


def test_what_else_is_in_the_folder_is_not_deleted(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    (store / "notes.txt").unlink()
    (store / ".git").mkdir()
    with pytest.raises(ConfigError, match=r"holds \.git"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    (store / ".git").rmdir()
    other = store.with_name(f".{store.name}.drop")
    other.mkdir()
    (other / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is in the way"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))


def test_links_do_not_lead_out(store: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (store / "tokenizer").mkdir()
    (store / "tokenizer" / "vocab.txt").symlink_to(secret)
    with pytest.raises(StoreCorrupt, match="no links"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    shutil.rmtree(store / "tokenizer")
    path = store / "shards" / "train-00000.arrow"
    path.rename(tmp_path / "shard")
    path.symlink_to(tmp_path / "shard")
    with pytest.raises(StoreCorrupt, match="a link"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))


def test_a_dump_that_writes_keeps_it_out(store: Path) -> None:
    from predistill.store.writer import take_lock

    with take_lock(store / ".lock", "dump"), pytest.raises(StoreError, match="is being written"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    assert not list(store.parent.glob(".*"))


KILLER = """
import json, os, signal, shutil, sys
from predistill.store.convert import drop as module, swap
from predistill.store.convert.config import DropConfig
done, stop = [], int(sys.argv[2])
def step(name):
    if len(done) == stop: os.kill(os.getpid(), signal.SIGKILL)
    done.append(name)
def counted(owner, name):
    real = getattr(owner, name)
    def called(*given, **more):
        step("before " + name)
        made = real(*given, **more)
        step("after " + name)
        return made
    setattr(owner, name, called)
if sys.argv[3] == "renames": swap._exchange = lambda *_: False
for owner, name in ((module.manifest, "write_json"), (os, "replace"), (os, "rename"), (module, "swap"),
                    (module.index, "build"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
    counted(owner, name)
module.drop(DropConfig(sys.argv[1], "source_index % 7 = 3", yes=True))
print(json.dumps(done))
"""


def stopped_drop(store: Path, step: int, way: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", KILLER, str(store), str(step), way], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_anywhere_the_same_command_finishes(made: Path, tmp_path: Path, way: str) -> None:
    """Before and after both change places, and at some other steps."""
    whole = Path(shutil.copytree(made, tmp_path / "whole"))
    steps = json.loads(stopped_drop(whole, -1, way).stdout)
    wanted, config = digests(whole), DropConfig("store", "source_index % 7 = 3", yes=True)
    told = [at for at, name in enumerate(steps) if name.endswith("swap" if way == "exchange" else "rename")]
    others = [0, 8, len(steps) // 3, told[-1] + 3, len(steps) - 1] if way == "exchange" else []
    for step in sorted({*told, *others}):
        store = Path(shutil.copytree(made, tmp_path / f"{way}-{step}" / "store"))
        assert stopped_drop(store, step, way).returncode == -signal.SIGKILL
        if way == "exchange" or store.exists():
            found = verify(store)
            assert found["ok"] and found["samples"] in (80, 80 - 11), (steps[step], found["problems"])
        finished = drop(dataclasses.replace(config, store=str(store)))
        assert finished["rows"] in (11, 0) and digests(store) == wanted, steps[step]
        assert not list(store.parent.glob(".*")), steps[step]
    sound(store)


def test_a_folder_that_cannot_be_renamed_stays_as_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the root of a file system; then, where it can, the same command finishes."""
    from predistill.store.convert import swap

    real, called = os.rename, []

    def rename(source: Path, target: Path) -> None:
        called.append(source)
        if len(called) == 2:
            raise OSError(errno.EBUSY, "busy")
        real(source, target)

    before = digests(store)
    monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StoreError, match="cannot be renamed"):
        drop(DropConfig(str(store), "source_index = 40", yes=True))
    sound(store)
    assert digests(store) == before
    drop(DropConfig(str(store), "source_index = 40", yes=True))
    sound(store)
    assert digests(store) != before and not list(store.parent.glob(".*"))


def test_command(store: Path) -> None:
    words = ["drop", str(store), "--where", "source_index = 40"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0 and "Nothing was changed" in shown.stdout and "1 of train" in shown.stdout
    said = json.loads(CliRunner().invoke(cli, [*words, "--yes", "--json"]).stdout)
    assert said["dropped"] and said["rows"] == 1
    bad = CliRunner().invoke(cli, ["drop", str(store), "--where", "oops"])
    assert bad.exit_code == 1 and bad.stderr.startswith("Error: ") and bad.stderr.count("\n") == 1
