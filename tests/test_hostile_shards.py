"""Shards of a hostile stranger, sealed with checksums of their own: verify tells, and reading refuses before it
allocates."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from predistill.store import FieldSpec, Plan, ShardPlan, StoreCorrupt, StoreWriter, TeacherStore
from predistill.store.convert.config import FORMATS, ExportConfig
from predistill.store.convert.export import export
from predistill.store.manifest import sealed
from predistill.store.verify import verify

TOKENS = 4
FIELDS = [
    FieldSpec("input_ids", ("S",), "int32", role="input"),
    FieldSpec("teacher_attentions_00", (2, "S", "S"), "float16"),
    FieldSpec("teacher_attentions_01", (2, "S", "S"), "float32", codec="int8"),
    FieldSpec("counts", ("S",), "int64"),
    FieldSpec("kept", ("S", "K"), "float16", parameters={"counts": "counts"}),
    FieldSpec("packed", ("S", "K"), "int32", codec="bitpack", parameters={"bits": 16, "counts": "counts"}),
    FieldSpec("meta", (), "any", codec="arrow", role="carried"),
]


def written(path: Path, fields: Sequence[FieldSpec] = FIELDS, tokenizer: Path | None = None) -> Path:
    """Two rows of TOKENS tokens, one kept entry each."""
    rows, lengths = np.arange(2), np.full(2, TOKENS)
    plan = Plan("text-classification", {}, {}, list(fields), [ShardPlan("train", 0, 0, 2)], ["a", "b"])
    with StoreWriter.begin(path, plan) as writer:
        builder = writer.open_shard(plan.shards[0], 2, {"S": lengths})
        for spec in fields:
            if spec.codec != "arrow":
                sizes = [size if isinstance(size, int) else {"S": TOKENS, "K": 1}[size] for size in spec.shape]
                builder.put(spec.name, rows, np.ones((2, *sizes), int if spec.dtype.startswith("int") else float))
        builder.put_column("meta", pa.array(["x", "y"]))
        builder.put_addresses(np.arange(32, dtype=np.uint8).reshape(2, 16))
        writer.commit(builder)
        writer.finish({"tokenizer": tokenizer} if tokenizer else None)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hostile") / "whole")


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def forge(path: Path, changes: dict[str, Callable[[pa.Array], pa.Array]]) -> None:
    """Other columns in the shard, and everything that says its checksum."""
    target, made = path / "shards/train-00000.arrow", json.loads((path / "store.json").read_text())
    with pa.memory_map(str(target)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    columns = {name: changes.get(name, lambda array: array)(batch.column(name)) for name in batch.schema.names}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns)).replace_schema_metadata(
        batch.schema.metadata
    )
    with pa.ipc.new_file(str(target) + ".new", batch.schema) as writer:
        writer.write_batch(batch)
    Path(str(target) + ".new").replace(target)
    data, entry = target.read_bytes(), made["shards"][0]
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "store.json").write_text(json.dumps(sealed(made)))
    said = {key: value for key, value in entry.items() if key != "name"}
    target.with_suffix(".json").write_text(json.dumps({**said, "fingerprint": made["fingerprint"]}))


def lists(starts: Sequence[int], values: np.ndarray | None = None) -> Callable[[pa.Array], pa.Array]:
    """Rows that begin at `starts`, of other values or of as many as are asked for."""

    def make(array: pa.Array) -> pa.Array:
        flat = array.values.slice(0, starts[-1]) if values is None else pa.array(values, array.type.value_type)
        return pa.Array.from_buffers(array.type, 2, [None, pa.py_buffer(np.array(starts))], children=[flat])

    return make


def said(path: Path) -> str:
    """What verify says is wrong with the shard's structure."""
    return " | ".join(one["detail"] for one in verify(path)["problems"] if one["kind"] == "structure")


def small(size: int) -> np.ndarray:
    assert size < 1 << 20, f"{size} bytes asked for by a shard that holds a few kilobytes"
    return np.empty(size, np.uint8)


def refused(path: Path, match: str) -> None:
    """By verify, and by reading, which allocates nothing of note."""
    assert all(word in said(path) for word in (match, "train-00000.arrow"))
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match=match) as error:
        next(store.select().batches([[0, 1]], allocate=small))
    assert "train-00000.arrow" in str(error.value)


def test_the_store_itself_is_sound(path: Path) -> None:
    assert verify(path)["problems"] == []
    forge(path, {})
    assert said(path) == ""
    with TeacherStore.open(path) as store:
        assert store.select()[[0, 1]]["packed"].tolist() == [[[1]] * TOKENS] * 2


# rows of (H, "S", "S")


def test_a_square_column_of_nothing(path: Path) -> None:
    forge(path, {"teacher_attentions_00": lists([0, 0, 0])})
    refused(path, "column teacher_attentions_00: row 0 holds 0 values; 32 expected")


def test_a_square_column_whose_rows_share_its_values_otherwise(path: Path) -> None:
    forge(path, {"teacher_attentions_00": lists([0, 33, 64])})
    refused(path, "column teacher_attentions_00: row 0 holds 33 values; 32 expected")


def test_parts_of_a_square_column(path: Path) -> None:
    def without_scales(array: pa.Array) -> pa.Array:
        scales = lists([0, 8, 8])(array.field("scales"))
        return pa.StructArray.from_arrays([array.field("values"), scales], fields=list(array.type))

    forge(path, {"teacher_attentions_01": without_scales})
    refused(path, "column teacher_attentions_01: row 1 holds 0 values; 8 expected")


def test_long_rows_ask_for_no_memory(path: Path) -> None:
    """244 kB of tokens, with attention of nothing, once took gigabytes."""
    tokens = lists([0, 30_000, 60_000], np.ones(60_000, np.int32))
    forge(path, {"input_ids": tokens, "teacher_attentions_00": lists([0, 0, 0])})
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match="attentions_00: row 0 holds 0 values"):
        next(store.select(fields=["teacher_attentions_00"]).batches([[0, 1]], allocate=small))


def test_products_that_wrap_int64(tmp_path: Path) -> None:
    """2048**6 is 2**66, which is 0 in 64 bits."""
    wide = FieldSpec("wide", ("S",) * 6, "float16")
    path = written(tmp_path / "store", [FIELDS[0], wide, FIELDS[-1]])
    tokens = lists([0, 2048, 4096], np.ones(4096, np.int32))
    forge(path, {"input_ids": tokens, "wide": lists([0, 0, 0])})
    refused(path, "column wide: row 0 holds 0 values; 73786976294838206464 expected")


# counts of ("S", "K")


@pytest.mark.parametrize(
    "counts",
    [[2**62] * 4 + [0] * 4, [-1, 5, 0, 0, 1, 1, 1, 1], [2**36] + [0] * 7, [-(2**63)] * 2 + [0] * 6, [2**60] + [0] * 7],
)
def test_counts_that_no_shard_can_have(path: Path, counts: list[int]) -> None:
    """Some sum to what is stored once they wrap."""
    emptied = lists([0, 0, 0]) if counts[0] > 0 else lists([0, 4, 8])
    forge(path, {"counts": lists([0, 4, 8], np.array(counts)), "kept": emptied, "packed": lists([0, 0, 0])})
    refused(path, "counts of kept are 0 to")


def test_counts_of_packed_numbers(path: Path) -> None:
    """2**60 entries of 16 bits are 2**64 bits, which wraps to none."""
    forge(path, {"counts": lists([0, 4, 8], np.array([2**60] + [0] * 7)), "packed": lists([0, 0, 0])})
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match="counts of packed are 0 to 0"):
        next(store.select(fields=["packed"]).batches([[0, 1]], allocate=small))


def test_totals_are_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    """Counts each of which could be: 2,000 positions of 2,000 entries where 2,000 are stored."""
    path = written(tmp_path / "store", [FIELDS[0], FIELDS[3], FIELDS[4], FIELDS[6]])
    rows = [0, 2000, 2000]
    columns = {"input_ids": np.ones(2000), "counts": np.full(2000, 2000), "kept": np.ones(2000)}
    forge(path, {name: lists(rows, values.astype(np.int64)) for name, values in columns.items()})
    refused(path, "rows of kept hold another number of values")


def test_counts_are_whole_numbers(tmp_path: Path) -> None:
    counts = FieldSpec("counts", ("S",), "float32")
    path = written(tmp_path / "store", [FIELDS[0], counts, FIELDS[4], FIELDS[6]])
    refused(path, "counts of kept are whole numbers; counts is float32")


# carried columns


def as_type(values: list[int], kind: pa.DataType, stored: pa.DataType) -> pa.Array:
    return pa.array(values, stored).view(kind)


CARRIED = {
    "timestamp": as_type([2**62, -(2**62)], pa.timestamp("s"), pa.int64()),
    "zone": pa.array([0, 0], pa.timestamp("s", tz="No/Such")),
    "path": pa.array([0, 0], pa.timestamp("s", tz="../../../etc/passwd")),
    "date": as_type([2**30, -(2**30)], pa.date32(), pa.int32()),
    "duration": as_type([2**62, 0], pa.duration("s"), pa.int64()),
    "run ends": pa.RunEndEncodedArray.from_arrays([2], ["a"]),
    "view": pa.array(["a" * 40, "b"], pa.string_view()),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_carried_values_that_python_cannot_hold(path: Path, kind: str) -> None:
    forge(path, {"meta": lambda _: CARRIED[kind]})
    with TeacherStore.open(path) as store:
        with pytest.raises(StoreCorrupt, match="train-00000.arrow: column meta is ") as error:
            store.select()[[0, 1]]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["timestamp", "zone", "date", "run ends"])
def test_exports_of_carried_values(path: Path, tmp_path: Path, kind: str) -> None:
    """Exported, or refused by name: never an error of Arrow's."""
    forge(path, {"meta": lambda _: CARRIED[kind]})
    refusals = 0
    for form in FORMATS:
        try:
            export(ExportConfig(str(path), str(tmp_path / form), form))
        except StoreCorrupt as error:
            assert "meta" in str(error)
            refusals += 1
    assert refusals


# files that the manifest does not list


def kinds(path: Path) -> set[tuple[str, str]]:
    return {(problem["path"], problem["kind"]) for problem in verify(path)["problems"]}


def test_a_file_beside_the_tokenizers_is_found(tmp_path: Path) -> None:
    """tokenizer.json goes before the vocab.txt whose checksum the manifest has."""
    (tmp_path / "made" / "deeper").mkdir(parents=True)
    for name in ("vocab.txt", "deeper/merges.txt"):
        (tmp_path / "made" / name).write_text("a\nb\n")
    path = written(tmp_path / "store", tokenizer=tmp_path / "made")
    assert verify(path)["problems"] == []
    (path / "tokenizer/tokenizer.json").write_text("{}")
    (path / "tokenizer/deeper/added").write_text("")
    (path / "processor").mkdir()
    (path / "processor/preprocessor_config.json").write_text("{}")
    extra = ("tokenizer/tokenizer.json", "tokenizer/deeper/added", "processor/preprocessor_config.json")
    assert kinds(path) == {(name, "extra") for name in extra}


def test_links_are_found(tmp_path: Path) -> None:
    """To files that are as the manifest says, and to others."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "vocab.txt").write_text("a\nb\n")
    path = written(tmp_path / "store", tokenizer=tmp_path / "made")
    for name in ("tokenizer/vocab.txt", "shards/train-00000.arrow", "samples.parquet"):
        (path / name).rename(tmp_path / Path(name).name)
        (path / name).symlink_to(tmp_path / Path(name).name)
    (path / "tokenizer/folder").symlink_to(tmp_path)
    (path / "processor").symlink_to(tmp_path)
    linked = ("tokenizer/vocab.txt", "shards/train-00000.arrow", "samples.parquet", "tokenizer/folder", "processor")
    assert kinds(path) == {(name, "link") for name in linked}
