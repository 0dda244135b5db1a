"""Rows of the memory map into padded batches.

Narrow rows: one `take` per column and shard touched, without Python work per row or token. Rows of 16 KB and more: one
slice copy a row, which costs about 1 us beside the 2 us and more of its copy, reads each page once and writes each
byte once, wherever the rows stand; a take over several shards has to be scattered, and a padded one writes the padding
twice (docs/experiments.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from . import schema
from .codecs import WHOLE_COLUMN, Part, codec_of, parts_of, stored_parts
from .errors import StoreCorrupt
from .mapped import MOST, MappedShard, check_counts, check_square, counting
from .rows import BatchRows, Extent, Opened
from .schema import FieldSpec

WIDE = 16 << 10  # bytes a row from which it is copied by itself
PAGE = 4096  # bytes; buffers begin on a page: a copy to 16 bytes past its source, modulo a page, runs 6 times slower
Allocate = Callable[[int], np.ndarray]  # bytes -> uint8 array; training on CUDA gives pinned memory


def allocate(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


class Slot:
    """Reusable memory of one batch: an array asked for by name grows when it must and is never cleared."""

    def __init__(self, allocate: Allocate = allocate):
        self._allocate = allocate
        self._memory: dict[Any, np.ndarray] = {}

    def array(self, key: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = dtype.itemsize
        for length in shape:
            size *= length
        memory = self._memory.get(key)
        if memory is None or memory.size < size:
            memory = self._allocate(size + size // 4 + PAGE)
            memory = self._memory[key] = memory[-memory.ctypes.data % PAGE :]
        return np.ndarray(shape, dtype, memory)


class Gather:
    """Decoded, right-padded batches of some fields from a list of shards.

    open_shard(k) maps shard k; it is called at the first row that touches it. first_row: int64 [shards + 1],
    sample_id of each shard's first row. stored: columns that are not decoded: their parts come as `stored_parts` names
    them.
    """

    def __init__(
        self, fields: Sequence[FieldSpec], first_row: np.ndarray, open_shard: Callable[[int], MappedShard],
        stored: Collection[str] = (),
    ):  # fmt: skip
        self.fields, self.first_row, self.stored = list(fields), first_row, stored
        self.parts = {spec.name: parts_of(spec) for spec in fields if spec.codec not in WHOLE_COLUMN}
        opened = functools.partial(_opened, self.fields, self.parts, first_row, open_shard)
        self.opened = functools.lru_cache(MOST)(opened)
        self.ragged = any(schema.symbols(part.shape) for parts in self.parts.values() for part in parts)
        self.leaders: dict[str, str] = {}  # symbol -> the first column whose starts count it
        for spec in fields:
            if schema.is_list(spec.shape) and spec.name in self.parts:
                self.leaders.setdefault(str(spec.shape[0]), spec.name)

    def batch(self, sample_ids: np.ndarray, slot: Slot) -> dict[str, Any]:
        """sample_ids: int64 [B]. Arrays live in `slot`; fields with shape ("P", ...) come back scattered to [B, S]."""
        rows = BatchRows(self, sample_ids)
        out: dict[str, Any] = {}
        for spec in self.fields:
            if spec.codec in WHOLE_COLUMN:
                out[spec.name] = self._objects(spec, rows)
                continue
            if schema.is_ragged(spec.shape):
                out[spec.name] = self._ragged(spec, rows, slot)
                continue
            parts = [self._take(spec, part, rows, slot) for part in self.parts[spec.name]]
            if spec.name in self.stored:
                out |= dict(zip(stored_parts(spec), parts, strict=True))
                continue
            out[spec.name] = _widen(codec_of(spec).decode(parts, spec), spec, slot)
            if spec.name == schema.INPUT_IDS:
                out[schema.ATTENTION_MASK] = _mask(rows.lengths(spec.name, "S"), slot, schema.ATTENTION_MASK)
        if schema.POSITIONS in out:
            _scatter_positions(out, self.fields, rows.lengths(schema.POSITIONS, "P"))
        return out

    def extent(self, shard: int, name: str, part: Part) -> Extent:
        """A part of a shard, checked: token-level fields must have their row's number of tokens."""
        return self.opened(shard).extents[name, part.name]

    def _take(self, spec: FieldSpec, part: Part, rows: BatchRows, slot: Slot) -> np.ndarray:
        if not schema.symbols(part.shape):
            return self._take_fixed(spec, part, rows, slot)
        if schema.is_list(part.shape):
            return self._take_list(spec, part, rows, slot)
        return self._take_square(spec, part, rows, slot)

    def _take_fixed(self, spec: FieldSpec, part: Part, rows: BatchRows, slot: Slot) -> np.ndarray:
        out = slot.array((spec.name, part.name), (rows.count, schema.entry_width(part.shape)), part.numpy_dtype)
        for shard, places, local in rows.groups():
            values = self.extent(shard, spec.name, part).values
            if part.entry_bytes < WIDE:
                _take_into(values, local, out, places)
                continue
            for place, row in rows.pairs(places, local):
                out[place] = values[row]
        return out.reshape(rows.count, *part.shape)

    def _take_list(self, spec: FieldSpec, part: Part, rows: BatchRows, slot: Slot) -> np.ndarray:
        symbol = str(part.shape[0])
        lengths = rows.lengths(spec.name, symbol)
        longest, width = int(lengths.max(initial=0)), schema.entry_width(part.shape)
        pad = spec.pad if len(self.parts[spec.name]) == 1 else 0
        out = slot.array((spec.name, part.name), (rows.count, longest, width), part.numpy_dtype)
        flat = out.reshape(-1, width)
        if longest and part.entry_bytes * int(lengths.sum()) >= WIDE * rows.count:
            for shard, copies in rows.copies(spec.name, symbol, longest):
                values = self.extent(shard, spec.name, part).values
                for begin, end, first, middle, last in copies:
                    flat[first:middle] = values[begin:end]
                    flat[middle:last] = pad
        elif longest:
            for shard, places, entries in rows.entries(spec.name, symbol, longest):
                _take_into(self.extent(shard, spec.name, part).values, entries, out, places)
            flat[rows.padding(spec.name, symbol, longest)] = pad
        return out.reshape(rows.count, longest, *part.shape[1:])

    def _take_square(self, spec: FieldSpec, part: Part, rows: BatchRows, slot: Slot) -> np.ndarray:
        """(H, S, S) and the like: each row cut out of the padding on every axis."""
        lengths = {symbol: rows.lengths(spec.name, symbol) for symbol in schema.symbols(part.shape)}
        shape = tuple(int(lengths[size].max(initial=0)) if isinstance(size, str) else size for size in part.shape)
        out = slot.array((spec.name, part.name), (rows.count, *shape), part.numpy_dtype)
        out[...] = 0
        for shard, places, local in rows.groups():
            values, starts = self.extent(shard, spec.name, part)
            assert starts is not None
            for place, row in rows.pairs(places, local):
                own = tuple(int(lengths[size][place]) if isinstance(size, str) else size for size in part.shape)
                out[place][tuple(slice(size) for size in own)] = values[starts[row] : starts[row + 1], 0].reshape(own)
        return out

    def _ragged(self, spec: FieldSpec, rows: BatchRows, slot: Slot) -> np.ndarray:
        """("S", "K") and ("P", "K"): [B, longest, most entries], `pad` past each position's own."""
        counts = self._counts(spec, rows, slot)
        most = int(counts.max(initial=0))
        parts = [
            self._take_ragged(spec, part, part.sizes(counts), rows, slot)
            if schema.is_ragged(part.shape)
            else self._take(spec, part, rows, slot)
            for part in self.parts[spec.name]
        ]
        values = codec_of(spec).decode(parts, spec)[..., :most]
        if spec.pad:
            values[np.arange(most) >= counts[..., None]] = spec.pad
        return values

    def _counts(self, spec: FieldSpec, rows: BatchRows, slot: Slot) -> np.ndarray:
        """int64 [B, longest]: entries that each position keeps, 0 past the row's end."""
        opened = [self.opened(shard) for shard, _, _ in rows.groups()]
        where = _where(opened)
        beside = counting(spec, self.fields, where)
        counts = self._take(beside, self.parts[beside.name][0], rows, slot).astype(np.int64)
        [part] = [one for one in self.parts[spec.name] if schema.is_ragged(one.shape)]
        held = max((len(one.extents[spec.name, part.name].values) for one in opened), default=0)
        check_counts(spec, part, counts, held, where)
        return counts

    def _take_ragged(self, spec: FieldSpec, part: Part, sizes: np.ndarray, rows: BatchRows, slot: Slot) -> np.ndarray:
        """Zero where a position has fewer values than the longest. sizes: int64 [B, longest]."""
        totals, width = sizes.sum(axis=1), int(sizes.max(initial=0))
        for shard, places, local in rows.groups():  # before a stranger's counts ask for memory
            opened, starts = self.opened(shard), self.extent(shard, spec.name, part).starts
            assert starts is not None
            if not np.array_equal(starts[local + 1] - starts[local], totals[places]):
                raise StoreCorrupt(
                    f"{opened.mapped.path}: rows of {spec.name} hold another number of values than their counts tell"
                )
        flat = slot.array((spec.name, part.name, "flat"), (int(totals.sum()),), part.numpy_dtype)
        ends = totals.cumsum()
        for shard, places, local in rows.groups():
            values, starts = self.extent(shard, spec.name, part)
            assert starts is not None
            for place, row in rows.pairs(places, local):
                flat[ends[place] - totals[place] : ends[place]] = values[starts[row] : starts[row + 1], 0]
        out = slot.array((spec.name, part.name), (*sizes.shape, width), part.numpy_dtype)
        out[...] = 0
        out[np.arange(width) < sizes[..., None]] = flat
        return out

    def _objects(self, spec: FieldSpec, rows: BatchRows) -> list[Any]:
        found: list[Any] = [None] * rows.count
        for shard, places, local in rows.groups():
            chosen = pa.Array.from_buffers(pa.int64(), len(local), [None, pa.py_buffer(np.ascontiguousarray(local))])
            mapped = self.opened(shard).mapped
            column = mapped.checked(spec.name)
            taken = mapped.as_python(spec.name, functools.partial(_listed, column, chosen))
            for (place, _), value in zip(rows.pairs(places, local), taken, strict=True):
                found[place] = value
        return found


def _opened(
    fields: Sequence[FieldSpec], parts: Mapping[str, Sequence[Part]], first_row: np.ndarray,
    open_shard: Callable[[int], MappedShard], shard: int,
) -> Opened:  # fmt: skip
    mapped, extents = open_shard(shard), {}
    rows = int(first_row[shard + 1] - first_row[shard])
    if mapped.rows != rows:
        raise StoreCorrupt(f"{mapped.path}: {rows} rows by the manifest; got {mapped.rows}")
    leaders, squares = dict[Any, np.ndarray](), list[tuple[FieldSpec, Part, np.ndarray]]()
    for spec in fields:
        for part in parts.get(spec.name, ()):
            values, starts = mapped.part(spec, part)
            if starts is not None and schema.is_list(part.shape) and part.shape[0] != "*":
                leader = leaders.setdefault(part.shape[0], starts)
                if leader is not starts and not np.array_equal(leader, starts):
                    raise StoreCorrupt(f"{mapped.path}: column {spec.name} has other lengths than its row's tokens")
                starts = leader  # one copy in cache for all columns
            elif starts is not None and not schema.is_list(part.shape) and not schema.is_ragged(part.shape):
                squares.append((spec, part, starts))
            extents[spec.name, part.name] = Extent(values, starts)
    for spec, part, starts in squares:
        check_square(mapped.path, spec, part, starts, leaders)
    return Opened(mapped, extents)


def _where(opened: Sequence[Opened]) -> str:
    """The shard's file, or the folder of several."""
    paths = [one.mapped.path for one in opened]
    return str(paths[0] if len(paths) == 1 else paths[0].parent) if paths else "no shard"


def _listed(column: pa.Array, rows: pa.Array) -> list[Any]:
    return column.take(rows).to_pylist()


def _take_into(values: np.ndarray, entries: np.ndarray, out: np.ndarray, places: slice | np.ndarray) -> None:
    """out[places] = values[entries]; starts were checked, and "clip" needs no second buffer."""
    if not len(values):
        return
    if isinstance(places, slice):
        values.take(entries, axis=0, out=out.reshape(-1, values.shape[1]), mode="clip")
    else:
        out[places] = values.take(entries, axis=0, mode="clip").reshape(len(places), *out.shape[1:])


def _widen(values: np.ndarray, spec: FieldSpec, slot: Slot) -> np.ndarray:
    """Ids and labels as int64, what torch's embeddings and losses take."""
    if spec.role not in ("input", "label") or values.dtype.kind not in "iu" or values.dtype == np.int64:
        return values
    wide = slot.array((spec.name, "int64"), values.shape, np.dtype(np.int64))
    wide[...] = values
    return wide


def _mask(lengths: np.ndarray, slot: Slot, key: str) -> np.ndarray:
    mask = slot.array(key, (len(lengths), int(lengths.max(initial=0))), np.dtype(np.int64))
    mask[...] = np.arange(mask.shape[1]) < lengths[:, None]
    return mask


def _scatter_positions(out: dict[str, Any], fields: Sequence[FieldSpec], stored: np.ndarray) -> None:
    """Fields stored at some positions, back at [B, S, ...], `pad` elsewhere; `teacher_mask` bool [B, S] says where."""
    batch, longest = out[schema.ATTENTION_MASK].shape
    positions = out.pop(schema.POSITIONS)
    row, at = np.nonzero(np.arange(positions.shape[1]) < stored[:, None])
    places = positions[row, at].astype(np.int64)
    if places.size and not (places.min() >= 0 and places.max() < longest):
        raise StoreCorrupt(f"column {schema.POSITIONS}: positions below {longest} expected; got {places.max()}")
    for spec in fields:
        if spec.shape[:1] == ("P",) and spec.name in out:
            values = out[spec.name]
            full = np.full((batch, longest, *values.shape[2:]), spec.pad, values.dtype)
            full[row, places] = values[row, at]
            out[spec.name] = full
    out["teacher_mask"] = np.zeros((batch, longest), bool)
    out["teacher_mask"][row, places] = True
