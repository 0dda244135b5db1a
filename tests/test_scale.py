"""What must not grow with the number of shards: maps, opened files, statements. On a store of 40 shards."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predistill.store import (
    FieldSpec,
    Plan,
    ShardPlan,
    StoreCorrupt,
    StoreError,
    StoreWriter,
    TeacherStore,
    gather,
    index,
    manifest,
    mapped,
    reader,
)
from predistill.store import verify as verifying
from predistill.store.rows import row_ranges

SHARDS, EACH = 40, 7
ROWS = SHARDS * EACH
LENGTHS = np.random.default_rng(0).permutation(ROWS) + 1  # tokens of each row: all differ
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
TOKENS = np.random.default_rng(1).integers(0, 1000, STARTS[-1], dtype=np.int32)
ENTROPY = np.random.default_rng(2).random(ROWS).astype(np.float32)
FIELDS = [
    FieldSpec("input_ids", ("S",), "int32", role="input"),
    FieldSpec("teacher_logits", (3,), "float32"),
    FieldSpec("teacher_entropy", (), "float32", role="summary"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "store"
    shards = [ShardPlan("train", n, n * EACH, (n + 1) * EACH) for n in range(SHARDS)]
    with StoreWriter.begin(path, Plan("text-classification", {}, {}, FIELDS, shards)) as writer:
        for shard in shards:
            of = slice(shard.start, shard.stop)
            builder = writer.open_shard(shard, EACH, {"S": LENGTHS[of]})
            builder.put("input_ids", np.arange(EACH), TOKENS[STARTS[shard.start] : STARTS[shard.stop]])
            builder.put("teacher_logits", np.arange(EACH), np.tile(np.arange(shard.start, shard.stop)[:, None], 3))
            builder.put("teacher_entropy", np.arange(EACH), ENTROPY[of])
            builder.put_addresses(np.random.default_rng(shard.number).integers(0, 256, (EACH, 16), dtype=np.uint8))
            writer.commit(builder)
        writer.finish()
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that are mapped, one entry a time."""
    found: list[Path] = []

    class Counted(mapped.MappedShard):
        def __init__(self, path: Path):
            found.append(path)
            super().__init__(path)

    monkeypatch.setattr(reader, "MappedShard", Counted)
    return found


def maps_of(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def check(batch: dict[str, np.ndarray], ids: np.ndarray) -> None:
    assert (batch["teacher_logits"][:, 0] == ids).all()
    for row, at in zip(batch["input_ids"], ids.tolist(), strict=True):
        assert (row[: LENGTHS[at]] == TOKENS[STARTS[at] : STARTS[at + 1]]).all()


# ---- reading ----


def test_what_a_run_asks_before_its_first_batch_opens_few_shards(made: Path, opened: list[Path]) -> None:
    with TeacherStore.open(made) as store:
        rows = store.select("train")
        assert not opened
        assert rows.longest == (int(LENGTHS.argmax()), ROWS)
        wanted = np.flatnonzero(ENTROPY > 0.5)
        kept = store.select("train", where="teacher_entropy > 0.5")
        assert kept.longest == (int(LENGTHS[wanted].argmax()), int(LENGTHS[wanted].max()))
        assert not opened, "the index knows how long rows are"
        exact = 4 * STARTS[-1] + ROWS * (8 + 12 + 4)
        assert 0.8 * exact < rows.nbytes < 1.2 * exact
        check(next(iter(rows.batches([np.array([100, 3])]))), np.array([100, 3]))
        assert len(opened) <= reader.FEW + 3
        before = len(opened)
        assert rows.lengths_of(np.array([279, 0, -1])).tolist() == LENGTHS[[279, 0, 279]].tolist()
        assert len(opened) <= before + 1


def test_without_an_index_all_shards_tell_how_long_rows_are(path: Path, opened: list[Path]) -> None:
    (path / "index.duckdb").unlink()
    with TeacherStore.open(path) as store:
        assert store.select("train").longest == (int(LENGTHS.argmax()), ROWS)
    assert len(opened) == SHARDS


def test_few_shards_stay_mapped_and_rows_are_right_all_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MOST", 3)
    monkeypatch.setattr(gather, "MOST", 4)
    before = maps_of(made)
    lists = np.random.default_rng(5).integers(0, ROWS, (60, 8))
    with TeacherStore.open(made) as store:
        rows = store.select()
        for ids, batch in zip(lists, rows.batches(lists), strict=True):
            check(batch, ids)
        assert maps_of(made) - before <= 3 + 4 + 1
        for shard, ranges in row_ranges(rows._gather, np.arange(ROWS)).items():  # of shards that were mapped again
            assert ranges.min() > 0 and ranges.max() <= store.shard_path(shard).stat().st_size
        del batch, rows
    assert maps_of(made) == before


def test_a_dropped_store_is_not_kept_by_what_it_has_mapped(made: Path) -> None:
    before = maps_of(made)
    store = TeacherStore.open(made)
    store.mapped(1)
    assert maps_of(made) > before
    del store
    assert maps_of(made) == before


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE])
def test_a_process_with_too_many_maps_does_not_call_its_shards_damaged(
    made: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(path: str) -> None:
        raise OSError(f"Memory mapping file failed: {os.strerror(code)}")

    monkeypatch.setattr(pa, "memory_map", full)
    with TeacherStore.open(made) as store, pytest.raises(StoreError, match="the shard is sound; read fewer") as error:
        store.mapped(0)
    assert not isinstance(error.value, StoreCorrupt) and "\n" not in str(error.value)


def test_info_of_many_shards_looks_at_some(made: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {name: field["bytes"] for name, field in verifying.describe(made)["fields"].items()}
    assert len(opened) == SHARDS and exact["teacher_logits"] == 12 * ROWS
    monkeypatch.setattr(verifying, "MEASURED", 10)
    found = {name: field["bytes"] for name, field in verifying.describe(made)["fields"].items()}
    assert len(opened) == SHARDS + 10
    assert all(0.75 * exact[name] < found[name] < 1.25 * exact[name] for name in exact)


# ---- the index ----


def test_an_index_is_made_of_many_shards_at_a_time_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statements, real = list[str](), index._select

    def noted(connection: duckdb.DuckDBPyConnection, narrow: pa.Table, statement: str) -> None:
        statements.append(statement)
        real(connection, narrow, statement)

    monkeypatch.setattr(index, "_select", noted)
    monkeypatch.setattr(index, "_TOGETHER", (1000, 100))
    index.build(path, manifest.read_manifest(path))
    assert len(statements) == 2 + -(-SHARDS // (100 // EACH))  # a table each, then inserts
    table = pq.read_table(path / "samples.parquet")
    assert table["sample_id"].to_pylist() == list(range(ROWS))
    assert table["num_tokens"].to_pylist() == LENGTHS.tolist()
    assert table["row"].to_pylist() == [row % EACH for row in range(ROWS)]
    assert verifying.verify(path)["problems"] == []


def test_rows_come_in_order_whatever_the_order_of_the_index(path: Path) -> None:
    with duckdb.connect(str(path / "index.duckdb")) as connection:
        connection.execute("CREATE OR REPLACE TABLE samples AS SELECT * FROM samples ORDER BY hash(sample_id)")
    with TeacherStore.open(path) as store:
        ids = store.select("train", where="teacher_entropy > 0.5").sample_ids
    assert ids.tolist() == np.flatnonzero(ENTROPY > 0.5).tolist()


def test_a_samples_table_in_any_order_makes_the_same_index(path: Path) -> None:
    made = manifest.read_manifest(path)
    table = pq.read_table(path / "samples.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(ROWS)), path / "samples.parquet")
    index.build_from_samples(path, made)
    with index.Index(path) as stored:
        assert stored.connection.sql("SELECT sample_id FROM samples").fetchnumpy()["sample_id"].tolist() == [
            *range(ROWS)
        ]
        assert index.agrees(path, made, stored.connection)
    pq.write_table(table.set_column(0, "sample_id", pa.array(np.roll(np.arange(ROWS), 1))), path / "samples.parquet")
    with pytest.raises(StoreCorrupt, match="does not place its rows"):
        index.build_from_samples(path, made)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE samples SET num_tokens = 1 - num_tokens WHERE sample_id = 77",
        "DELETE FROM samples WHERE sample_id = 279",
        "INSERT INTO samples SELECT * FROM samples WHERE sample_id IN (5, 6)",
        "INSERT INTO samples SELECT * REPLACE ('train-99999' AS shard) FROM samples WHERE sample_id = 5",
        "UPDATE samples SET teacher_entropy = NULL WHERE shard = 'train-00003'",
        "UPDATE shards SET tokens = 0 WHERE shard = 'train-00003'",
        "ALTER TABLE samples ADD COLUMN more INTEGER",
        "DROP TABLE samples",
    ],
)
def test_verify_finds_what_an_index_has_wrong(path: Path, change: str) -> None:
    with duckdb.connect(str(path / "index.duckdb")) as connection:
        connection.execute(change)
    assert [one["kind"] for one in verifying.verify(path)["problems"]] == ["index"]


# ---- the plan ----


def test_of_shards_that_are_not_there_nothing_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked, real = manifest.read_plan(path), list[Path](), manifest.read_json
    for shard in plan.shards[3:]:
        (path / "shards" / f"{shard.name}.json").unlink()

    def noted(file: Path, *most: int) -> dict[str, Any]:
        asked.append(file)
        return real(file, *most)

    monkeypatch.setattr(manifest, "read_json", noted)
    assert list(manifest.committed(path, plan)) == [shard.name for shard in plan.shards[:3]]
    assert len(asked) == 3
