"""Rows of a shard's columns, decoded and without padding, a few at a time: what exports are made of.

E entries of N rows: tokens, positions, or rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .. import schema
from ..codecs import WHOLE_COLUMN, Part, codec_of, parts_of
from ..errors import StoreCorrupt
from ..mapped import MappedShard, counting
from ..schema import FieldSpec

CHUNK = 32 << 20  # bytes of a shard that are decoded together


class Values(NamedTuple):
    """Some rows of a column.

    values: of fixed rows [N, *shape]; of lists [E, *shape without its first axis]; of any other shape [values], one row
    after another. sizes: int64 [N], entries of each row; None for fixed rows. counts: int64 [E], where the shape ends
    in "K": values of each position.
    """

    values: np.ndarray
    sizes: np.ndarray | None
    counts: np.ndarray | None = None


def chunks(mapped: MappedShard, limit: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Rows [first, last) whose columns take about `limit` bytes together; at least one row."""
    row_bytes = max(1, sum(mapped.column(name).nbytes for name in mapped.names) // max(mapped.rows, 1))
    step = max(1, limit // row_bytes)
    for first in range(0, mapped.rows, step):
        yield first, min(first + step, mapped.rows)


def decoded(mapped: MappedShard, spec: FieldSpec, first: int, last: int) -> Values:
    """Rows [first, last) as a reader gets them: bfloat16 and int8 as float32, packed numbers as numbers."""
    parts = [(part, *mapped.part(spec, part)) for part in parts_of(spec)]
    codec = codec_of(spec)
    if not schema.symbols(spec.shape):
        return Values(codec.decode([_shaped(part, values[first:last]) for part, values, _ in parts], spec), None)
    if schema.is_ragged(spec.shape):
        return _ragged(mapped, spec, parts, first, last)
    sizes = _sizes(parts[0], first, last)
    if schema.is_list(spec.shape) and (len(spec.shape) > 1 or spec.codec == "dense"):
        found = [_shaped(part, _between(values, starts, first, last)) for part, values, starts in parts]
        return Values(codec.decode(found, spec), sizes)
    if len(parts) == 1:  # (H, "S", "S"), dense
        return Values(codec.decode([_between(*parts[0][1:], first, last)[:, 0]], spec), sizes)
    rows = [_one(mapped, spec, parts, row) for row in range(first, last)]
    return Values(np.concatenate(rows) if rows else np.zeros(0, np.float32), sizes)


def lengths(mapped: MappedShard, symbol: str, first: int, last: int) -> np.ndarray:
    """int64 [N]: how many tokens ("S") or stored positions ("P") rows have."""
    leader = next((one for one in mapped.fields if one.shape[:1] == (symbol,) and one.codec not in WHOLE_COLUMN), None)
    if leader is None:
        raise StoreCorrupt(f"{mapped.path}: no column tells how long its rows are ({symbol})")
    part = parts_of(leader)[0]
    if schema.is_ragged(leader.shape):
        beside = counting(leader, mapped.fields, mapped.path)
        part, leader = parts_of(beside)[0], beside
    return _sizes((part, *mapped.part(leader, part)), first, last)


def _ragged(mapped: MappedShard, spec: FieldSpec, parts: list, first: int, last: int) -> Values:
    """("S", "K"): padded to the longest position, decoded, and flat again."""
    own = decoded(mapped, counting(spec, mapped.fields, mapped.path), first, last)
    counts = own.values.astype(np.int64)
    most, found = int(counts.max(initial=0)), []
    for part, values, starts in parts:
        flat = _between(values, starts, first, last)
        if not schema.is_ragged(part.shape):
            found.append(_shaped(part, flat))
            continue
        sizes = part.sizes(counts)
        padded = np.zeros((len(counts), int(sizes.max(initial=0))), part.numpy_dtype)
        inside = np.arange(padded.shape[1]) < sizes[:, None]
        if int(sizes.sum()) != len(flat):
            raise StoreCorrupt(
                f"{mapped.path}: rows of {spec.name} hold another number of values than their counts tell"
            )
        padded[inside] = flat[:, 0]
        found.append(padded)
    values = codec_of(spec).decode(found, spec)[:, :most]
    ends = np.cumsum(np.concatenate([[0], counts]))
    assert own.sizes is not None
    rows = np.concatenate([[0], np.cumsum(own.sizes)])
    return Values(values[np.arange(most) < counts[:, None]], np.diff(ends[rows]), counts)


def _one(mapped: MappedShard, spec: FieldSpec, parts: list, row: int) -> np.ndarray:
    """One row of a field whose scales belong to axes that differ from row to row, flat."""
    own = {size: int(lengths(mapped, str(size), row, row + 1)[0]) for size in set(schema.symbols(spec.shape)) - {"*"}}
    found = []
    for part, values, starts in parts:
        flat = values[row] if starts is None else _between(values, starts, row, row + 1)[:, 0]
        known = dict(own) if "*" not in part.shape else {"*": len(flat)}
        shape = tuple(known[size] if isinstance(size, str) else size for size in part.shape)
        if flat.size != math.prod(shape):
            raise StoreCorrupt(f"{mapped.path}: column {spec.name}: a row of shape {shape} holds {flat.size} values")
        found.append(flat.reshape(shape))
    return codec_of(spec).decode(found, spec).reshape(-1)


def _sizes(part: tuple[Part, np.ndarray, np.ndarray | None], first: int, last: int) -> np.ndarray:
    starts = part[2]
    assert starts is not None
    return np.diff(starts[first : last + 1])


def _between(values: np.ndarray, starts: np.ndarray | None, first: int, last: int) -> np.ndarray:
    """Entries of some rows, [E, width]."""
    return values[first:last] if starts is None else values[starts[first] : starts[last]]


def _shaped(part: Part, values: np.ndarray) -> np.ndarray:
    sizes = part.shape[1:] if schema.symbols(part.shape) else part.shape
    return values.reshape(len(values), *(size for size in sizes if not isinstance(size, str)))
