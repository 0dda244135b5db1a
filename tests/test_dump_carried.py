"""Columns that are kept as they came: one type in all splits, whatever each file alone would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dump_cases
import pytest
from dump_cases import bert
from predistill.store import DataError, TeacherStore
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump

own_cache = dump_cases.own_cache  # a fixture


def kept(tokenizer: Path, folder: Path, train: list[Any], validation: list[Any]) -> TeacherStore:
    folder.mkdir(exist_ok=True)
    paths = {
        split: dump_cases.write(folder / f"{split}.jsonl", [{**row, "own": value} for row, value in
                                                            zip(dump_cases.rows(len(values)), values, strict=True)])
        for split, values in (("train", train), ("validation", validation))
    }  # fmt: skip
    source = ",".join(f"{split}={path}" for split, path in paths.items())
    dump(dump_cases.settings(bert(tokenizer, folder / "teacher"), source, folder / "store", keep_columns=["own"]))
    return TeacherStore.open(folder / "store")


@pytest.mark.parametrize(
    ("train", "validation", "kind"),
    [
        ([1, 2, 3], [1.5, 2.25], "double"), ([0.5, 1, 2], [3, 4], "double"),
        ([None, None, None], ["a", None], "string"), ([None, None, None], [None, None], "null"),
    ],
)  # fmt: skip
def test_splits_of_other_types_have_one(
    tiny_tokenizer_dir: Path, tmp_path: Path, train: list[Any], validation: list[Any], kind: str
) -> None:
    """In the shards, the index, and what datasets loads of them."""
    store = kept(tiny_tokenizer_dir, tmp_path, train, validation)
    told = [value for [value] in store.sql("SELECT own FROM samples ORDER BY sample_id").fetchall()]
    assert told == [*train, *validation] == store.select(fields=["own"])[:]["own"]
    assert store.to_dataset()["own"][:] == [*train, *validation]
    assert str(store.to_dataset().features.arrow_schema.field("own").type) == kind
    assert verify(store.path)["ok"]


def test_types_with_nothing_in_common_are_refused_before_the_teacher_runs(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="--keep-columns own: one type .* int64 in train, string in validation"):
        kept(tiny_tokenizer_dir, tmp_path, [1, 2, 3], ["a", "b"])
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="split train, rows 0 to 2: --keep-columns own is kept as double"):
        kept(tiny_tokenizer_dir, tmp_path / "two", [1, 2**60 + 1, 3], [0.5, 1.5])
