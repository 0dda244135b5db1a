"""Columns of text: looked at, taken in chunks, made into tokens. What all tasks on text share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...store.errors import DataError

CHUNK_ROWS = 2000  # rows that are Python strings at one time
CHUNK_BYTES = 4 * 2**20  # of text; its tokens, as the tokenizer gives them, take some thirty times as much


def check_text(split: str, start: int, rows: pa.Table, name: str, empty: bool = True) -> None:
    """Raises DataError where a column holds no text, or a row of it none; empty: is "" text?

    start: the first row's number in the split.
    """
    column = rows.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        kind = "null" if pa.types.is_null(column.type) else column.type
        raise DataError(f"split {split}, column {name!r}: text expected; got {kind}: choose another --text-column")
    check_rows(split, start, column.is_null(), f"column {name!r} is null; text expected")
    if not empty:
        check_rows(split, start, pc.equal(pc.binary_length(column), 0), f"column {name!r} is empty; text expected")


def check_rows(split: str, start: int, bad: Any, wrong: str, advice: str = "fill it or drop the row") -> None:
    """Raises DataError naming the first row that is bad; bad: bool or counts [n], of Arrow or numpy."""
    found = np.asarray(bad) > 0
    if found.any():
        raise DataError(f"split {split}, row {start + int(found.argmax())}: {wrong}: {advice}")


def chunks(rows: pa.Table) -> Iterator[pa.Table]:
    """All rows, some at a time: at most CHUNK_ROWS, and about CHUNK_BYTES."""
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES * len(rows) // max(rows.nbytes, 1)))
    return (rows.slice(start, size) for start in range(0, len(rows), size))


def flat(rows: Sequence[Sequence[int]], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """(lengths int64 [n], values [sum of lengths]) of n lists of whole numbers."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return lengths, np.fromiter(itertools.chain.from_iterable(rows), dtype, int(lengths.sum()))


def within(lengths: np.ndarray) -> np.ndarray:
    """int64 [sum of lengths]: 0, 1, … of each row."""
    starts = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)
