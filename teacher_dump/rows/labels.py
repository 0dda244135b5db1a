"""A dataset's label column, in any of the forms people keep, as numbers in the teacher's class order.

single-label: int, float, bool or class names  -> int64 [n], -100 where missing (null, NaN, -1 or -100)
multi-label:  0/1 for each class, or lists of class ids or names -> float32 [n, C], NaN where missing
regression:   numbers                          -> float32 [n], NaN where missing (null or NaN)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...store.errors import ConfigError, DataError
from ...store.schema import MISSING_LABEL

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_MISSING = (-1, MISSING_LABEL)


def is_list(feature: Any) -> bool:
    return isinstance(feature, (datasets.List, datasets.LargeList, datasets.Sequence, list))


def class_names(feature: Any) -> list[str] | None:
    """The names that a ClassLabel feature, or a list of them, carries."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


class Labels:
    """Converts one label column.

    names: the classes in the teacher's order, or None. order: dataset's class id -> teacher's class id, or None where
    they are the same.
    """

    def __init__(self, column: str, problem_type: str, num_labels: int, names: Sequence[str] | None,
                 order: Sequence[int] | None = None):  # fmt: skip
        self.column, self.problem_type, self.num_labels = column, problem_type, num_labels
        self.names = list(names) if names else None
        self.order = None if order is None else np.asarray(order, np.int64)
        self.hot = True  # lists of whole numbers: one 0/1 a class, until a row says that they are class ids
        self.settled = False  # labels were made: what lists are does not change any more

    def missing(self, rows: int) -> np.ndarray:
        """Labels of rows that have none."""
        if self.problem_type == SINGLE:
            return np.full(rows, MISSING_LABEL, np.int64)
        shape = (rows, self.num_labels) if self.problem_type == MULTI else (rows,)
        return np.full(shape, np.nan, np.float32)

    def check(self, column: pa.ChunkedArray, split: str, start: int) -> int:
        """Every label once. Returns how many rows have one. Raises DataError naming split, row and value."""
        if self.problem_type == MULTI and self.hot and not self.settled:
            self.hot = self._may_be_hot(_flat(column))
        values = self.convert(column, split, start)
        known = values != MISSING_LABEL if self.problem_type == SINGLE else ~np.isnan(values)
        return int(known.reshape(len(values), -1).any(axis=1).sum())

    def convert(self, column: pa.ChunkedArray, split: str, start: int = 0) -> np.ndarray:
        """The column as labels; start: source row of its first, for messages. Raises DataError, ConfigError."""
        array = _flat(column)
        if pa.types.is_null(array.type):
            return self.missing(len(array))
        lists = hasattr(array.type, "value_type")
        if lists != (self.problem_type == MULTI):
            raise ConfigError(
                f"column {self.column!r} holds {array.type}, which does not suit {self.problem_type}: "
                "choose another --label-column or --problem-type"
            )
        if self.problem_type == REGRESSION:
            return self._real(array, split, start)
        return self._several(array, split, start) if lists else self._ids(array, split, start, np.arange(len(array)))

    def entries(self, column: pa.ChunkedArray, split: str, start: int = 0) -> np.ndarray:
        """Class ids of all entries of a column of lists, one row's after another's: int64, -100 where missing; a row
        that is null has none. Single-label only. Raises DataError, ConfigError."""
        array = _flat(column)
        if not hasattr(array.type, "value_type"):
            raise ConfigError(f"column {self.column!r} holds {array.type}; a list of classes expected")
        row_of = np.repeat(np.arange(len(array)), _sizes(array))
        flat = _flat(array.flatten())
        if pa.types.is_null(flat.type):
            return self.missing(len(flat))
        return self._ids(flat, split, start, row_of)

    def _real(self, array: pa.Array, split: str, start: int) -> np.ndarray:
        numbers = _numbers(array)
        if numbers is None:
            raise DataError(f"{self._where(split, start)} is {array.type}; numbers expected for regression")
        values = numbers.astype(np.float32)
        if np.isinf(values).any():
            row = int(np.isinf(values).argmax())
            raise DataError(f"{self._where(split, start + row)} is {numbers[row]}; a finite number expected")
        return values

    def _ids(self, array: pa.Array, split: str, start: int, row_of: np.ndarray) -> np.ndarray:
        """Class ids int64 [n] in the teacher's order; entry i stands in row start + row_of[i]."""
        named = _is_text(array.type)
        numbers = self._named(array, split, start, row_of) if named else _numbers(array)
        if numbers is None:
            raise DataError(f"{self._where(split, start)} is {array.type}; class ids or names expected")
        missing = np.isnan(numbers) | np.isin(numbers, _MISSING)
        allowed = self.num_labels if self.order is None or named else len(self.order)
        bad = ~missing & ~((numbers >= 0) & (numbers < allowed) & (numbers == np.floor(numbers)))
        if bad.any():
            entry = int(bad.argmax())
            raise DataError(
                f"{self._where(split, start + int(row_of[entry]))} is {numbers[entry]:g}; the teacher has "
                f"{self.num_labels} classes, so 0 to {allowed - 1} expected, or null, -1 or -100 where it is missing"
            )
        ids = np.where(missing, 0, numbers).astype(np.int64)
        if self.order is not None and not named:
            ids = self.order[ids]
        return np.where(missing, MISSING_LABEL, ids)

    def _named(self, array: pa.Array, split: str, start: int, row_of: np.ndarray) -> np.ndarray:
        """Class names -> float64 ids, NaN where null; where no names are known, numbers written as text."""
        array = array.cast(pa.large_string())
        if self.names is None:
            try:
                return _numbers(array.cast(pa.float64()))  # type: ignore[return-value]
            except pa.ArrowInvalid as error:
                raise ConfigError(
                    f"column {self.column!r} holds names such as {array.drop_null()[0].as_py()!r}, and the teacher's "
                    "config names no classes: give --label-names NAME,NAME,… in the teacher's order"
                ) from error
        found = pc.index_in(array, pa.array(self.names, pa.large_string()))
        lower = [name.lower() for name in self.names]
        if found.null_count > array.null_count and len(set(lower)) == len(lower):
            found = pc.index_in(pc.utf8_lower(array), pa.array(lower, pa.large_string()))
        unknown = np.asarray(pc.and_(pc.is_null(found), pc.is_valid(array)))
        if unknown.any():
            entry = int(unknown.argmax())
            raise DataError(
                f"{self._where(split, start + int(row_of[entry]))} is {array[entry].as_py()!r}; the teacher's classes "
                f"are {', '.join(map(repr, self.names))}: mend the row, or give --label-names"
            )
        return _numbers(found)  # type: ignore[return-value]

    def _several(self, array: pa.Array, split: str, start: int) -> np.ndarray:
        sizes = _sizes(array)
        row_of = np.repeat(np.arange(len(array)), sizes)
        known = np.asarray(array.is_valid())
        if not self._is_hot(array):
            ids = self._ids(array.flatten(), split, start, row_of)
            made = np.zeros((len(array), self.num_labels), np.float32)
            made[row_of[ids != MISSING_LABEL], ids[ids != MISSING_LABEL]] = 1
            made[~known] = np.nan
            return made
        columns = np.arange(self.num_labels) if self.order is None else self.order
        wrong = known & (sizes != len(columns))
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{self._where(split, start + row)} has {sizes[row]} numbers; one for each of "
                            f"{len(columns)} classes expected")  # fmt: skip
        entries = _numbers(array.flatten())
        assert entries is not None
        entries = np.where(np.isin(entries, _MISSING), np.nan, entries)
        bad = ~(np.isnan(entries) | ((entries >= 0) & (entries <= 1)))
        if bad.any():
            row, value = int(row_of[bad.argmax()]), entries[bad.argmax()]
            raise DataError(f"{self._where(split, start + row)} holds {value:g}; 0 to 1 expected for each class")
        made = self.missing(len(array))
        made[np.ix_(known, columns)] = entries.reshape(-1, len(columns))
        return made

    def _is_hot(self, array: pa.Array) -> bool:
        inner = array.type.value_type
        return pa.types.is_floating(inner) or pa.types.is_boolean(inner) or (self.hot and pa.types.is_integer(inner))

    def _may_be_hot(self, array: pa.Array) -> bool:
        """Do whole numbers in lists read as 0/1 a class? Lists of ids differ in length, or hold larger ids."""
        if not hasattr(array.type, "value_type") or not pa.types.is_integer(array.type.value_type):
            return True
        sizes, entries = _sizes(array), _numbers(array.flatten())
        assert entries is not None
        full = (sizes == self.num_labels) | ~np.asarray(array.is_valid())
        return bool(full.all()) and bool((np.isnan(entries) | np.isin(entries, (0, 1, *_MISSING))).all())

    def _where(self, split: str, row: int) -> str:
        return f"split {split}, row {row}: column {self.column!r}"


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _sizes(array: pa.Array) -> np.ndarray:
    """Entries of each row's list that `flatten` gives: none where the row is null."""
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)


def _numbers(array: pa.Array) -> np.ndarray | None:
    """float64, NaN for null; None where these are no numbers. Whole numbers to 2**53 are exact."""
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        return None
    return np.asarray(pc.fill_null(array.cast(pa.float64(), safe=False), float("nan")))
