"""Damage is found and named; a store made by a hostile stranger is refused, reads nothing else, and crashes nothing."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import synthetic_store as synthetic
from predistill.store import ConfigError, PredistillError, StoreCorrupt, StoreError, TeacherStore
from predistill.store.index import content
from predistill.store.manifest import sealed
from predistill.store.verify import describe, rebuild_index, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("stores") / "whole")


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def kinds(path: Path) -> set[tuple[str, str]]:
    found = verify(path)
    assert found["ok"] == (not found["problems"])
    return {(problem["path"], problem["kind"]) for problem in found["problems"]}


def test_a_sound_store(path: Path) -> None:
    size = sum(file.stat().st_size for file in (path / "shards").glob("*.arrow"))
    assert verify(path) == {"ok": True, "shards": 4, "samples": 80, "bytes": size, "problems": []}


def test_a_folder_whose_name_looks_like_an_extension_of_duckdb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`word:` in front of a relative path is one to DuckDB."""
    monkeypatch.chdir(tmp_path)
    synthetic.write(Path("sto:re"))
    assert verify(Path("sto:re"))["ok"]
    assert TeacherStore.open("sto:re").sql("SELECT count(*) FROM samples").fetchall() == [(80,)]


def test_every_flipped_byte_is_found(path: Path) -> None:
    target = path / "shards/train-00001.arrow"
    sound, rng = target.read_bytes(), random.Random(0)
    for at in rng.sample(range(len(sound)), 40):
        target.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << rng.randrange(8))]) + sound[at + 1 :])
        assert kinds(path) == {("shards/train-00001.arrow", "checksum")}


def test_every_flipped_byte_of_the_other_files_is_found(path: Path, tmp_path: Path) -> None:
    """All but README.md, which is there to be edited."""
    source = tmp_path / "made"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"a": 1}')
    shutil.rmtree(path)
    with synthetic.StoreWriter.begin(path, synthetic.plan()) as writer:
        for shard in writer.missing():
            writer.commit(synthetic.fill(writer, shard))
        writer.finish({"tokenizer": source})
    rng = random.Random(0)
    for name in ("tokenizer/tokenizer.json", "samples.parquet", "index.duckdb", "plan.json", "store.json"):
        sound = (path / name).read_bytes()
        for at in rng.sample(range(len(sound)), min(8, len(sound))):
            (path / name).write_bytes(sound[:at] + bytes([sound[at] ^ (1 << rng.randrange(8))]) + sound[at + 1 :])
            assert not verify(path)["ok"], f"{name}: byte {at}"
        (path / name).unlink()
        assert (name, "missing") in kinds(path)
        (path / name).write_bytes(sound)
    assert verify(path)["ok"]


def test_truncated_missing_swapped_and_extra_files(path: Path) -> None:
    shards = path / "shards"
    (shards / "train-00000.arrow").write_bytes((shards / "train-00000.arrow").read_bytes()[:-1])
    (shards / "train-00002.arrow").unlink()
    (shards / "train-00001.json").unlink()
    (shards / "train-00009.arrow").write_bytes(b"")
    (path / "notes.txt").write_text("mine")
    assert kinds(path) == {
        ("shards/train-00000.arrow", "size"),
        ("shards/train-00002.arrow", "missing"),
        ("shards/train-00001.json", "missing"),
        ("shards/train-00009.arrow", "extra"),
        ("notes.txt", "extra"),
    }


def test_swapped_shards_are_found(path: Path) -> None:
    one, two = path / "shards/train-00000.arrow", path / "shards/train-00001.arrow"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert {where for where, _ in kinds(path)} == {"shards/train-00000.arrow", "shards/train-00001.arrow"}


def test_the_advice_for_a_bad_shard_works(path: Path, whole: Path) -> None:
    (path / "shards/train-00001.arrow").write_bytes(b"ARROW1")
    (problem,) = verify(path)["problems"]
    assert "delete train-00001.arrow and train-00001.json" in problem["detail"]
    for suffix in (".arrow", ".json"):
        (path / f"shards/train-00001{suffix}").unlink()
    synthetic.write(path)
    assert verify(path)["ok"]
    assert (path / "shards/train-00001.arrow").read_bytes() == (whole / "shards/train-00001.arrow").read_bytes()


def test_a_changed_manifest_or_plan_is_found(path: Path) -> None:
    plan = (path / "plan.json").read_text()
    (path / "plan.json").write_text(plan.replace('"float16"', '"float32"', 1))
    assert kinds(path) == {("plan.json", "plan")}
    (path / "plan.json").unlink()
    assert kinds(path) == {("plan.json", "missing")}
    (path / "plan.json").write_text(plan)
    (path / "store.json").write_text((path / "store.json").read_text().replace('"rows": 30', '"rows": 31'))
    assert kinds(path) == {("store.json", "manifest")}


def test_an_index_that_disagrees_is_found_and_made_anew(path: Path) -> None:
    with duckdb.connect(str(path / "index.duckdb")) as connection:
        connection.execute("UPDATE samples SET teacher_prediction = 2 WHERE sample_id = 3")
    assert kinds(path) == {("index.duckdb", "index")}
    (path / "index.duckdb").unlink()
    (path / "samples.parquet").write_bytes(b"PAR1")
    assert kinds(path) == {("index.duckdb", "missing"), ("samples.parquet", "size")}
    with pytest.raises(StoreCorrupt, match="index .* --rebuild"):
        TeacherStore.open(path).select(where="true")
    rebuild_index(path)
    assert verify(path)["ok"]


def test_a_rebuilt_index_is_identical_in_content(path: Path, whole: Path) -> None:
    rebuild_index(path)
    with (
        duckdb.connect(str(path / "index.duckdb")) as new,
        duckdb.connect(str(whole / "index.duckdb"), read_only=True) as old,
    ):
        assert all(content(new, table) == content(old, table) for table in ("shards", "samples"))
        query = "SELECT * EXCLUDE (meta) FROM samples ORDER BY sample_id"
        assert new.sql(query).fetchall() == old.sql(query).fetchall()


# a store made by a hostile stranger


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change store.json and seal it anew: its own hash is right, as a stranger's would be."""
    made = json.loads((path / "store.json").read_text())
    change(made)
    (path / "store.json").write_text(json.dumps(sealed(made)))


def _set(where: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        for key in where[:-1]:
            made = made[key]
        made[where[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(["plan", "shards", 0, "split"], "../../outside"),
        _set(["shards", 0, "name"], "/etc/passwd"),
        _set(["shards", 0, "name"], "train-00001"),
        _set(["shards", 0, "rows"], 2**70),
        _set(["shards", 0, "rows"], -1),
        _set(["shards", 0, "bytes"], "many"),
        _set(["shards"], []),
        _set(["plan"], None),
        _set(["files"], {"../secret": {"bytes": 1, "sha256": ""}}),
        _set(["files"], {"/etc/passwd": {"bytes": 1, "sha256": ""}}),
        _set(["plan", "fields"], [{"name": "x"}]),
        _set(["plan", "fields", 0, "shape"], ["S"] * 3 + [-5]),
        _set(["plan", "fields", 0, "shape"], [[["S"]]]),
        _set(["plan", "shards", 0, "surprise"], 1),
    ],
)
def test_hostile_manifests_are_refused(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    forge(path, change)
    with pytest.raises(StoreError):
        TeacherStore.open(path)
    assert not verify(path)["ok"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{" * 100_000, '{"a":' * 5000, "\x00", '{"format_version": true}'])
def test_manifests_that_are_no_json_object(path: Path, text: str) -> None:
    (path / "store.json").write_text(text)
    with pytest.raises(StoreCorrupt):
        TeacherStore.open(path)


def rewrite(path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch], **options: Any) -> None:
    """Replace a shard by another batch, its size and checksum sealed as the stranger's own."""
    target = path / "shards/train-00000.arrow"
    with pa.memory_map(str(target)) as source:
        batch = change(pa.ipc.open_file(source).get_batch(0))
    with pa.ipc.new_file(str(target) + ".new", batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    Path(str(target) + ".new").replace(target)
    forge(path, _set(["shards", 0, "bytes"], target.stat().st_size))


def replace(name: str, make: Callable[[pa.Array], pa.Array]) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        columns = {
            column: make(batch.column(column)) if column == name else batch.column(column)
            for column in batch.schema.names
        }
        made = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
        return made.replace_schema_metadata(batch.schema.metadata)

    return change


def starts(values: list[int]) -> Callable[[pa.Array], pa.Array]:
    def make(array: pa.Array) -> pa.Array:
        own = np.frombuffer(array.buffers()[1], np.int64).copy()
        own[: len(values)] = values
        return pa.Array.from_buffers(array.type, len(array), [None, pa.py_buffer(own)], children=[array.values])

    return make


@pytest.mark.parametrize(
    "change",
    [
        replace("input_ids", starts([0, 2**40, 5])),
        replace("input_ids", starts([0, 5, 1])),
        replace("input_ids", starts([0, -7])),
        replace("teacher_hidden_states_00", starts([0, 1, 2, 3])),
        replace("teacher_attentions_01", starts([0, 3])),
        replace("teacher_logits", lambda array: pa.array([None] * len(array), array.type)),
        replace("teacher_logits", lambda array: pa.array(["x"] * len(array))),
        replace("teacher_logits", lambda array: pa.array([[0.0] * 4] * len(array), pa.list_(pa.float16(), 4))),
        lambda batch: batch.slice(0, 3),
        lambda batch: batch.drop_columns(["teacher_logits"]),
        lambda batch: batch.replace_schema_metadata({}),
        lambda batch: batch.replace_schema_metadata({**batch.schema.metadata, b"predistill.fields": b"[" * 50_000}),
    ],
)
def test_hostile_shards_give_an_error_not_a_crash(
    path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> None:
    rewrite(path, change)
    with pytest.raises(StoreCorrupt):
        TeacherStore.open(path).select()[list(range(30))]
    assert not verify(path)["ok"]


def test_compressed_shards_are_refused(path: Path) -> None:
    rewrite(path, lambda batch: batch, compression="zstd")
    with pytest.raises(StoreCorrupt, match="compressed"):
        TeacherStore.open(path).select()[[0]]


def test_garbage_shards_are_refused(path: Path) -> None:
    target = path / "shards/train-00000.arrow"
    sound, rng = target.read_bytes(), random.Random(1)
    for size in (0, 3, 12, 100, 5000):
        target.write_bytes(sound[:size])
        with pytest.raises(StoreCorrupt):
            TeacherStore.open(path).select()[[0]]
    for _ in range(60):  # a flipped bit may go unseen by reading (verify sees all), but never crashes
        at = rng.randrange(len(sound))
        target.write_bytes(sound[:at] + bytes([rng.randrange(256)]) + sound[at + 1 :])
        try:
            TeacherStore.open(path).select()[list(range(30))]
        except PredistillError:
            continue


def test_offsets_of_carried_bytes_are_looked_at(path: Path) -> None:
    """A stranger's offsets once made a copy of gigabytes."""

    def far(array: pa.Array) -> pa.Array:
        starts = np.frombuffer(array.buffers()[1], np.int64).copy()
        starts[1:-1] = 2**33
        return pa.Array.from_buffers(array.type, len(array), [None, pa.py_buffer(starts), array.buffers()[2]])

    rewrite(path, replace("image", far))
    with pytest.raises(StoreCorrupt, match="column image"):
        TeacherStore.open(path).select()[list(range(30))]


def test_counts_that_do_not_fit_their_rows_are_refused(path: Path) -> None:
    def one_more(array: pa.Array) -> pa.Array:
        values = pa.array(np.asarray(array.values) + np.uint8(1))
        return pa.Array.from_buffers(array.type, len(array), array.buffers()[:2], children=[values])

    rewrite(path, replace("teacher_kept_counts", one_more))
    with pytest.raises(StoreCorrupt, match="another number of values than their counts"):
        TeacherStore.open(path).select()[list(range(30))]
    target = path / "shards/train-00000.arrow"
    forge(path, _set(["shards", 0, "sha256"], hashlib.sha256(target.read_bytes()).hexdigest()))
    assert any("another number of values" in problem["detail"] for problem in verify(path)["problems"])


def test_positions_past_the_row_are_refused(path: Path) -> None:
    def far(array: pa.Array) -> pa.Array:
        values = pa.array(np.full(len(array.values), 10**6, np.int32))
        return pa.Array.from_buffers(array.type, len(array), array.buffers()[:2], children=[values])

    rewrite(path, replace("teacher_positions", far))
    with pytest.raises(StoreCorrupt, match="positions below"):
        TeacherStore.open(path).select()[list(range(30))]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_csv('{secret}')",
        "COPY samples TO '{target}'",
        "COPY (SELECT 1) TO '{target}' (FORMAT parquet)",
        "ATTACH '{target}' AS other",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "CREATE TABLE x AS SELECT 1",
        "UPDATE samples SET label = 0",
        "DROP TABLE samples",
        "SELECT 1; COPY samples TO '{target}'",
        "EXPORT DATABASE '{target}'",
    ],
)
def test_sql_cannot_read_or_write_files(path: Path, tmp_path: Path, query: str) -> None:
    secret, target = tmp_path / "secret.csv", tmp_path / "target"
    secret.write_text("password\n")
    before = {entry.name for entry in tmp_path.iterdir()}
    with TeacherStore.open(path) as store, pytest.raises(ConfigError):
        store.sql(query.format(secret=secret, target=target)).fetchall()
    with TeacherStore.open(path) as store, pytest.raises(ConfigError):
        store.select(where=f"true) UNION ALL (SELECT 1 FROM read_text('{secret}')")
    assert {entry.name for entry in tmp_path.iterdir()} == before
    assert verify(path)["ok"]


def test_an_index_of_a_stranger_cannot_open_files(path: Path, tmp_path: Path) -> None:
    """A view inside their database file that reads ours."""
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    with duckdb.connect(str(path / "index.duckdb")) as connection:
        connection.execute("ALTER TABLE samples RENAME TO mine")
        connection.execute(
            f"CREATE VIEW samples AS SELECT m.*, t.content AS stolen FROM mine m, read_text('{secret}') t"
        )
    with TeacherStore.open(path) as store, pytest.raises(PredistillError):
        store.select(where="stolen = 'password'")


def test_describe_says_what_is_there(path: Path) -> None:
    found = describe(path)
    assert found["complete"] and found["format_version"] == 1 and found["task"] == "text-classification"
    assert found["splits"]["train"] == {
        "samples": 70,
        "shards": 3,
        "tokens": sum(len(row["input_ids"]) for row in synthetic.all_rows()[:70]),
    }
    assert set(found["fields"]) == {spec.name for spec in synthetic.FIELDS}
    assert found["fields"]["teacher_logits"] == {
        "codec": "dense",
        "dtype": "float16",
        "shape": [3],
        "role": "teacher",
        "bytes": 80 * 6,
    }
    assert found["teacher"] == {"name": "a/path", "weights_sha256": "0" * 64}
