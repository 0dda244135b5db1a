"""Lists of numbers, and lists of lists, as numpy: from Arrow arrays and from JSON, strangers' both.

S positions of a row, E entries of all of them.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LISTS = (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)


class Unfit(ValueError):
    """A row that does not fit: what was expected and what came. Who reads the rows says which it is."""


class Nested(NamedTuple):
    """A list a position. flat: int64 or float64 [E], one position's after another's, NaN for null; counts: int64 [S], 0
    where a position's list is null."""

    flat: np.ndarray
    counts: np.ndarray

    def dense(self) -> np.ndarray:
        """[S, entries], where all positions have as many. Raises Unfit."""
        if (self.counts != self.counts[:1]).any():
            raise Unfit(f"lists of one length expected; got {self.counts.min()} to {self.counts.max()}")
        return self.flat.reshape(len(self.counts), int(self.counts[0]) if len(self.counts) else 0)


def listed(value: Any, name: str) -> Any:
    """A list, or an Arrow array; also where it is written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"{name}: a list expected; got text that is no JSON") from error
    if not isinstance(value, list | tuple | pa.Array):
        raise Unfit(f"{name}: a list expected; got {_kind(value)}")
    return value


def flat_numbers(value: Any, name: str) -> np.ndarray:
    """int64 or float64 [n], NaN for null. Raises Unfit where something is no number."""
    value = listed(value, name)
    if isinstance(value, pa.Array):
        return _of_arrow(value, name)
    return _of_list(value, name)


def whole_numbers(value: Any, name: str) -> np.ndarray:
    """int64 [n]. Raises Unfit."""
    found = flat_numbers(value, name)
    if found.dtype != np.int64:
        if not (np.isfinite(found) & (found == np.floor(found)) & (np.abs(found) < 2**53)).all():
            raise Unfit(f"{name}: whole numbers expected; got {found[~(found == np.floor(found))][:1]}")
        return found.astype(np.int64)
    return found


def nested_numbers(value: Any, name: str) -> Nested:
    """A list of lists of numbers; null for a list is an empty one. Raises Unfit."""
    value = listed(value, name)
    if isinstance(value, pa.Array):
        return _nested_of_arrow(value, name)
    if bad := next((one for one in value if not isinstance(one, list | tuple | None)), None):
        raise Unfit(f"{name}: a list for each token expected; got {_kind(bad)}")
    counts = np.fromiter((len(one or ()) for one in value), np.int64, len(value))
    return Nested(_of_list(list(itertools.chain.from_iterable(one or () for one in value)), name), counts)


def _nested_of_arrow(value: pa.Array, name: str) -> Nested:
    if pa.types.is_null(value.type):
        return Nested(np.zeros(0, np.int64), np.zeros(len(value), np.int64))
    if not isinstance(value, _LISTS):
        raise Unfit(f"{name}: a list for each token expected; got {value.type}")
    counts = np.asarray(pc.fill_null(pc.list_value_length(value), 0)).astype(np.int64)
    return Nested(_of_arrow(value.flatten(), name), counts)


def _of_arrow(value: pa.Array, name: str) -> np.ndarray:
    kind = value.type
    try:
        if pa.types.is_null(kind):
            return np.full(len(value), np.nan)
        if pa.types.is_integer(kind) and not value.null_count:
            return np.asarray(value.cast(pa.int64()))
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return np.asarray(pc.fill_null(value.cast(pa.float64()), float("nan")))
    except pa.ArrowInvalid as error:
        raise Unfit(f"{name}: numbers below 2**63 expected") from error
    raise Unfit(f"{name}: numbers expected; got {kind}")


def _of_list(value: list[Any] | tuple[Any, ...], name: str) -> np.ndarray:
    kinds = set(map(type, value))
    if wrong := next((kind for kind in kinds if kind not in (int, float, type(None))), None):
        raise Unfit(f"{name}: numbers expected; got {_NAMES.get(wrong, wrong.__name__)}")
    try:
        if kinds <= {int}:
            return np.array(value, np.int64)
        return np.array([np.nan if one is None else one for one in value], np.float64)
    except OverflowError as error:
        raise Unfit(f"{name}: numbers below 2**63 expected") from error


_NAMES = {str: "text", bool: "true or false", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    return "nothing" if value is None else _NAMES.get(type(value), type(value).__name__)
