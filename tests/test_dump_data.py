"""Rows in: every format gives the same rows, every bad row is named, every label form means what it says."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from predistill.store import ConfigError, DataError
from predistill.teacher_dump.config import DumpConfig, looks_like_path, named_paths, parse_size
from predistill.teacher_dump.data import load_rows, slices
from predistill.teacher_dump.rows.label_names import agree, disagreement, teacher_names
from predistill.teacher_dump.rows.labels import MULTI, REGRESSION, SINGLE, Labels
from predistill.teacher_dump.survey import RowsHash

ROWS = [{"text": f'row {at}, "quoted"\nand é', "label": at % 2} for at in range(25)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def settings(dataset: str | Path, **more: Any) -> DumpConfig:
    return DumpConfig(teacher="any/teacher", dataset=str(dataset), task="text-classification", output_dir="out", **more)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows, in the format that the suffix names."""
    path.parent.mkdir(exist_ok=True, parents=True)
    plain, table = path.name.removesuffix(".gz"), pa.Table.from_pylist(rows)
    if plain.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif plain.endswith(".json"):
        content = json.dumps(rows)
    elif plain.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
        return path
    elif plain.endswith(".arrow"):
        make = pa.ipc.new_file if "file" in plain else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table)
        return path
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if plain.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(content)
    return path


def rows_of(found: datasets.Dataset) -> list[dict[str, Any]]:
    return [row for _, table in slices(found, ["text", "label"]) for row in table.to_pylist()]


NAMES = ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.arrow", "file.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    found = load_rows(settings(write(tmp_path / name)))
    assert list(found.splits) == ["train"] and found.name == name and found.revision is None
    assert rows_of(found.splits["train"]) == ROWS


def test_one_file_a_split(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a=b,c.csv"), write(tmp_path / "b.parquet", ROWS[:3])
    found = load_rows(settings(f"train={first},validation={second}"))
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 25, "validation": 3}
    assert list(load_rows(settings(f"train={first},validation={second}", split=["validation"])).splits) == [
        "validation"
    ]
    with pytest.raises(ConfigError, match="--split test: dataset .* has train, validation"):
        load_rows(settings(f"train={first},validation={second}", split=["test"]))
    with pytest.raises(ConfigError, match="each split is given once"):
        settings(f"train={first},train={second}")


def test_saved_datasets_and_folders_of_files(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([1, 2])).save_to_disk(tmp_path / "two")
    write(tmp_path / "three" / "train.csv")
    write(tmp_path / "three" / "test.csv", ROWS[:4])
    assert rows_of(load_rows(settings(tmp_path / "one")).splits["train"]) == ROWS
    two = load_rows(settings(tmp_path / "two")).splits
    assert (len(two["train"]), rows_of(two["test"])) == (25, ROWS[1:3])
    three = load_rows(settings(tmp_path / "three")).splits
    assert (rows_of(three["train"]), rows_of(three["test"])) == (ROWS, ROWS[:4])
    assert len(load_rows(settings(f"test={tmp_path / 'two'}")).splits["test"]) == 2
    with pytest.raises(ConfigError, match="holds train, test; give one"):
        load_rows(settings(f"validation={tmp_path / 'two'}"))


def test_words_that_mean_nothing_to_csv_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": "null", "label": 1}, {"text": "NA", "label": None}])
    assert rows_of(load_rows(settings(path)).splits["train"]) == [
        {"text": "null", "label": 1},
        {"text": "NA", "label": None},
    ]


def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path: Path) -> None:
    named = ("nowhere.csv", "data/nowhere.txt", "nowhere.zip", "data/x.jsonl.gz")
    for name in (*named, "./nowhere", "/nowhere", "a/b/c", "~/nowhere", "nowhere/", "a\\b"):
        assert looks_like_path(name)
        with pytest.raises(ConfigError, match="is not there"):
            settings(name)
    with pytest.raises(ConfigError, match=r"nowhere\.csv is not there"):
        settings(f"train={write(tmp_path / 'a.csv')},test=nowhere.csv")
    for name in ("imdb", "stanfordnlp/sst2", "user/name.v2"):
        assert not looks_like_path(name) and named_paths(name) is None
    with pytest.raises(ConfigError, match="a folder with a saved model expected"):
        DumpConfig(teacher="./nowhere", dataset="imdb", task="text-classification", output_dir="out")


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    broken, text, empty = tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "b.jsonl"
    broken.write_text('{"text": "a"\n{"text":')
    text.write_text("a")
    empty.write_text("")
    for path, error, words in (
        (broken, DataError, "cannot be read"),
        (text, ConfigError, "one of .csv"),
        (empty, DataError, "is empty"),
    ):
        with pytest.raises(error, match=words) as caught:
            load_rows(settings(path))
        assert "\n" not in str(caught.value)
    header = tmp_path / "c.csv"
    header.write_text("text,label\n")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(settings(header))
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(settings("nobody/nothing"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"layers": "99"}, "--layers 99: logits has no layers"),
        ({"fields": ["logits", "attention"]}, "--fields logits,attention: text-classification keeps logits"),
        ({"fields": []}, "keeps logits"),
        ({"dtype": "int8"}, "--dtype is one of float16, bfloat16, float32; got 'int8'"),
        ({"max_length": 0}, "--max-length is a whole number from 1; got 0"),
        ({"tokens_per_batch": -1}, "--tokens-per-batch is a whole number"),
        ({"shard_size": "0MB"}, "--shard-size is a whole number"),
        ({"shard_size": "much"}, "a size is written like 256MB"),
        ({"split": ["a", "a"]}, "--split is a list of different names"),
        ({"keep_columns": "text"}, "--keep-columns is a list"),
        ({"text_column": " "}, "--text-column is empty"),
        ({"problem_type": "ranking"}, "--problem-type is one of"),
        ({"label_order": "any"}, "--label-order is one of"),
    ],
)
def test_wrong_settings_say_what_is_allowed(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings("imdb", **more)


def test_sizes() -> None:
    assert [parse_size(size) for size in (7, "7", "1kB", "2 MB", "1.5GB", "4GiB", "1t")] == [
        7,
        7,
        1000,
        2 * 10**6,
        1_500_000_000,
        4 * 2**30,
        10**12,
    ]


# labels


def converted(labels: Labels, *chunks: pa.Array) -> np.ndarray:
    """As a dump does: every slice is checked before any is used."""
    start = 0
    for chunk in chunks:
        labels.check(pa.chunked_array([chunk]), "train", start)
        start += len(chunk)
    return np.concatenate([labels.convert(pa.chunked_array([chunk]), "train") for chunk in chunks])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2, None, -1, -100, 1]),
        pa.array([0, 2, None, -1, -100, 1], pa.int8()),
        pa.array([0.0, 2.0, float("nan"), -1.0, None, 1.0]),
        pa.array(["a", "c", None, None, None, "b"]),
        pa.array(["A", "c", None, None, None, "B"], pa.large_string()),
        pa.array(["a", "c", None, None, None, "b"]).dictionary_encode(),
    ],
)
def test_single_labels_of_every_form(column: pa.Array) -> None:
    found = converted(Labels("label", SINGLE, 3, ["a", "b", "c"]), column)
    assert found.dtype == np.int64 and found.tolist() == [0, 2, -100, -100, -100, 1]


def test_labels_without_a_value_are_missing_in_their_own_way() -> None:
    nothing = pa.nulls(2)
    assert converted(Labels("label", SINGLE, 3, None), nothing).tolist() == [-100, -100]
    assert np.isnan(converted(Labels("label", MULTI, 3, None), nothing)).all((0, 1))
    assert np.isnan(converted(Labels("label", REGRESSION, 1, None), nothing)).all()
    assert converted(Labels("label", SINGLE, 2, None), pa.array([True, False, None])).tolist() == [1, 0, -100]
    assert converted(Labels("label", SINGLE, 3, None), pa.array(["2", "0"])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "column", "error", "words"),
    [
        (
            Labels("y", SINGLE, 3, None),
            pa.array([0, 1, 3]),
            DataError,
            "split train, row 2: column 'y' is 3; .* 0 to 2 expected",
        ),
        (Labels("y", SINGLE, 3, None), pa.array([0, -2]), DataError, "row 1: column 'y' is -2"),
        (Labels("y", SINGLE, 3, None), pa.array([0.5]), DataError, "row 0: column 'y' is 0.5"),
        (
            Labels("y", SINGLE, 2, ["no", "yes"]),
            pa.array(["no", "maybe"]),
            DataError,
            "row 1: .* 'maybe'; .* 'no', 'yes'",
        ),
        (Labels("y", SINGLE, 2, None), pa.array(["no"]), ConfigError, "names such as 'no'.*--label-names"),
        (Labels("y", SINGLE, 2, None), pa.array([[0]]), ConfigError, "does not suit single_label"),
        (Labels("y", MULTI, 2, None), pa.array([0]), ConfigError, "does not suit multi_label"),
        (
            Labels("y", MULTI, 2, None),
            pa.array([[0.0, 1.0], [1.0]]),
            DataError,
            "row 1: .* has 1 numbers; one for each of 2",
        ),
        (Labels("y", MULTI, 2, None), pa.array([[0.0, 1.5]]), DataError, "row 0: .* holds 1.5; 0 to 1 expected"),
        (Labels("y", MULTI, 3, None), pa.array([[0, 1], [4]]), DataError, "row 1: column 'y' is 4"),
        (Labels("y", MULTI, 2, ["a", "b"]), pa.array([["a"], ["z"]]), DataError, "row 1: .* 'z'"),
        (Labels("y", REGRESSION, 1, None), pa.array([1.0, float("inf")]), DataError, "row 1: .* is inf"),
        (Labels("y", REGRESSION, 1, None), pa.array(["high"]), DataError, "numbers expected for regression"),
    ],
)
def test_bad_labels_are_named(labels: Labels, column: pa.Array, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        converted(labels, column)


def test_multi_labels_of_every_form() -> None:
    expected = np.array([[1, 0, 1], [0, 0, 0], [np.nan] * 3, [0, 1, 0]], np.float32)
    forms = [
        pa.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], None, [0.0, 1.0, 0.0]]),
        pa.array([[1, 0, 1], [0, 0, 0], None, [0, 1, 0]]),
        pa.array([[True, False, True], [False] * 3, None, [False, True, False]], pa.list_(pa.bool_(), 3)),
        pa.array([[0, 2], [], None, [1]]),
        pa.array([["a", "c"], [], None, ["b"]], pa.large_list(pa.string())),
    ]
    for form in forms:
        found = converted(Labels("labels", MULTI, 3, ["a", "b", "c"]), form)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    partly = converted(Labels("labels", MULTI, 3, None), pa.array([[1, -1, 0], [-100, None, 1]]))
    np.testing.assert_array_equal(partly, np.array([[1, np.nan, 0], [np.nan, np.nan, 1]], np.float32))


def test_a_later_slice_may_tell_that_lists_hold_class_ids() -> None:
    found = converted(Labels("labels", MULTI, 2, None), pa.array([[0, 1]]), pa.array([[1]]))
    assert found.tolist() == [[1, 1], [0, 1]]


def test_regression_labels_keep_minus_one() -> None:
    found = converted(Labels("score", REGRESSION, 1, None), pa.array([-1, 2, None]))
    assert found.dtype == np.float32 and found[:2].tolist() == [-1, 2] and np.isnan(found[2])


def test_labels_are_put_into_the_teachers_order() -> None:
    order = [2, 0, 1]  # dataset a, b, c; teacher b, c, a
    names = ["b", "c", "a"]
    assert converted(Labels("y", SINGLE, 3, names, order), pa.array([0, 1, 2, -1])).tolist() == [2, 0, 1, -100]
    assert converted(Labels("y", SINGLE, 3, names, order), pa.array(["a", "b", "c"])).tolist() == [2, 0, 1]
    hot = converted(Labels("y", MULTI, 3, names, order), pa.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    assert hot.tolist() == [[0, 0, 1], [1, 1, 0]]


def test_names_that_disagree_are_found_and_explained() -> None:
    with pytest.raises(
        ConfigError, match="class 0 is 'neg' in the dataset and 'Pos' in the teacher's id2label.*by-name"
    ):
        agree(["neg", "pos"], ["Pos", "NEG"], 2, "check")
    assert agree(["neg", "pos"], ["Pos", "NEG"], 2, "by-name")[:2] == (["Pos", "NEG"], [1, 0])
    assert agree(["neg", "pos"], ["Pos", "NEG"], 2, "by-id") == (["neg", "pos"], None, [])
    assert agree(["neg", "pos"], ["NEG", "POS"], 2, "check") == (["NEG", "POS"], None, [])
    assert agree(["neg", "pos"], None, 2, "check") == (["neg", "pos"], None, [])
    assert agree(None, ["x", "y"], 2, "check") == (["x", "y"], None, [])
    assert agree(["bad", "good"], ["neg", "pos"], 2, "check")[2][0].startswith("the dataset's classes are bad, good")
    assert agree(["a", "b"], None, 3, "check")[0] is None


def test_names_of_the_teacher() -> None:
    assert teacher_names([], {0: "LABEL_0", 1: "LABEL_1"}, 2) is None
    assert teacher_names([], {"0": "no", "1": "yes"}, 2) == ["no", "yes"]
    assert teacher_names(["a", "b"], {0: "LABEL_0", 1: "LABEL_1"}, 2) == ["a", "b"]
    with pytest.raises(ConfigError, match="has 2 classes; got 1 names"):
        teacher_names(["a"], {0: "x", 1: "y"}, 2)


def test_a_teacher_that_is_always_wrong_is_noticed() -> None:
    labels = np.tile([0, 1, 2], 20)
    assert disagreement(labels, labels, 3) is None
    assert "0 is 1, 1 is 0" in str(disagreement(labels, np.choose(labels, [1, 0, 2]), 3))
    assert disagreement(labels, np.zeros(60, np.int64), 3) is None
    assert disagreement(labels[:9], np.choose(labels[:9], [1, 0, 2]), 3) is None


# the hash of rows


def hashed(*tables: pa.Table) -> str:
    state = RowsHash()
    for table in tables:
        state.update(table)
    return state.hexdigest()


def test_rows_hash_sees_values_and_not_how_they_are_kept() -> None:
    rows: list[dict[str, Any]] = [
        {"t": "ab", "n": 1, "x": 0.5, "l": ["p", None], "s": {"a": 1, "b": None}},
        {"t": "c", "n": None, "x": None, "l": None, "s": None},
        {"t": "", "n": -3, "x": 2.0, "l": [], "s": {"a": None, "b": b"\x00"}},
    ]
    table = pa.Table.from_pylist(rows)
    other = pa.schema(
        {
            "t": pa.large_string(),
            "n": pa.int16(),
            "x": pa.float32(),
            "l": pa.large_list(pa.large_string()),
            "s": pa.struct({"a": pa.int8(), "b": pa.large_binary()}),
        }
    )
    expected = hashed(table)
    assert hashed(table.cast(other)) == expected
    assert hashed(table[:1], table[1:]) == expected and hashed(table[:0], table) == expected
    assert hashed(pa.concat_tables([table, table])[3:]) == expected
    for column, value in (("t", "abc"), ("n", 0), ("x", 0.25), ("l", ["p"]), ("l", []), ("s", {"a": 1, "b": b""})):
        assert hashed(pa.Table.from_pylist([{**rows[0], column: value}, *rows[1:]], table.schema)) != expected
    assert hashed(table.take([1, 0, 2])) != expected
    moved = [{**rows[0], "t": "a"}, {**rows[1], "t": "bc"}, rows[2]]
    assert hashed(pa.Table.from_pylist(moved, table.schema)) != expected
