"""Rows of the memory map into padded batches, without Python work per row or token.

A random batch is one `take` per column and shard touched. A batch that touches many shards has about as many runs of
neighbours from one shard, which go straight to their places; one that touches few is taken shard by shard and then
scattered, which beats a call for every run even at 60 KB a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from . import schema
from .codecs import WHOLE_COLUMN, Part, codec_of, parts_of
from .errors import StoreCorrupt
from .schema import FieldSpec
from .shard import MappedShard

Allocate = Callable[[int], np.ndarray]  # bytes -> uint8 array; training on CUDA gives pinned memory

Group = tuple[int, slice | np.ndarray, np.ndarray]  # shard, places in the batch, rows in the shard


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
            memory = self._memory[key] = self._allocate(size + size // 4)
        return np.ndarray(shape, dtype, memory)


class Extent(NamedTuple):
    """One part of one column in one shard: values [entries, width], starts [rows + 1] or None for fixed rows."""

    values: np.ndarray
    starts: np.ndarray | None


class Gather:
    """Decoded, right-padded batches of some fields from a list of shards.

    open_shard(k) maps shard k; it is called at the first row that touches it. first_row: int64 [shards + 1],
    sample_id of each shard's first row.
    """

    def __init__(self, fields: Sequence[FieldSpec], first_row: np.ndarray, open_shard: Callable[[int], MappedShard]):
        self.fields, self.first_row, self.mapped = list(fields), first_row, open_shard
        self.parts = {spec.name: parts_of(spec) for spec in fields if spec.codec not in WHOLE_COLUMN}
        self._extents: dict[int, dict[tuple[str, str], Extent]] = {}
        self.ragged = any(schema.symbols(part.shape) for parts in self.parts.values() for part in parts)
        self.leaders: dict[str, str] = {}  # symbol -> the first column whose starts count it
        for spec in fields:
            if schema.is_list(spec.shape) and spec.name in self.parts:
                self.leaders.setdefault(str(spec.shape[0]), spec.name)

    def batch(self, sample_ids: np.ndarray, slot: Slot) -> dict[str, Any]:
        """sample_ids: int64 [B]. Arrays live in `slot`; fields with shape ("P", ...) come back scattered to [B, S]."""
        rows = _Rows(self, sample_ids)
        out: dict[str, Any] = {}
        for spec in self.fields:
            if spec.codec in WHOLE_COLUMN:
                out[spec.name] = self._objects(spec, rows)
                continue
            parts = [self._take(spec, part, rows, slot) for part in self.parts[spec.name]]
            out[spec.name] = _widen(codec_of(spec).decode(parts, spec), spec, slot)
            if spec.name == schema.INPUT_IDS:
                out[schema.ATTENTION_MASK] = _mask(rows.lengths(spec.name, "S"), slot, schema.ATTENTION_MASK)
        if schema.POSITIONS in out:
            _scatter_positions(out, self.fields, rows.lengths(schema.POSITIONS, "P"))
        return out

    def extent(self, shard: int, name: str, part: Part) -> Extent:
        """A part of a shard, checked: token-level fields must have their row's number of tokens."""
        if shard not in self._extents:
            self._extents[shard] = self._map(shard)
        return self._extents[shard][name, part.name]

    def _map(self, shard: int) -> dict[tuple[str, str], Extent]:
        mapped, extents = self.mapped(shard), {}
        rows = int(self.first_row[shard + 1] - self.first_row[shard])
        if mapped.rows != rows:
            raise StoreCorrupt(f"{mapped.path}: {rows} rows by the manifest; got {mapped.rows}")
        leaders: dict[Any, np.ndarray] = {}
        for spec in self.fields:
            for part in self.parts.get(spec.name, ()):
                values, starts = mapped.part(spec, part)
                if starts is not None and schema.is_list(part.shape) and part.shape[0] != "*":
                    leader = leaders.setdefault(part.shape[0], starts)
                    if leader is not starts and not np.array_equal(leader, starts):
                        raise StoreCorrupt(f"{mapped.path}: column {spec.name} has other lengths than its row's tokens")
                    starts = leader  # one copy in cache for all columns
                extents[spec.name, part.name] = Extent(values, starts)
        return extents

    def _take(self, spec: FieldSpec, part: Part, rows: _Rows, slot: Slot) -> np.ndarray:
        key = (spec.name, part.name)
        if not schema.symbols(part.shape):
            out = slot.array(key, (rows.count, schema.entry_width(part.shape)), part.numpy_dtype)
            for shard, places, local in rows.groups():
                _take_into(self.extent(shard, spec.name, part).values, local, out, places, 1)
            return out.reshape(rows.count, *part.shape)
        if schema.is_list(part.shape):
            return self._take_list(spec, part, rows, slot)
        return self._take_square(spec, part, rows, slot)

    def _take_list(self, spec: FieldSpec, part: Part, rows: _Rows, slot: Slot) -> np.ndarray:
        lengths = rows.lengths(spec.name, str(part.shape[0]))
        longest, width = int(lengths.max(initial=0)), schema.entry_width(part.shape)
        out = slot.array((spec.name, part.name), (rows.count * longest, width), part.numpy_dtype)
        if longest:
            for shard, places, entries in rows.entries(spec.name, str(part.shape[0]), longest):
                _take_into(self.extent(shard, spec.name, part).values, entries, out, places, longest)
            pad = spec.pad if len(self.parts[spec.name]) == 1 else 0
            out[rows.padding(spec.name, str(part.shape[0]), longest)] = pad
        return out.reshape(rows.count, longest, *part.shape[1:])

    def _take_square(self, spec: FieldSpec, part: Part, rows: _Rows, slot: Slot) -> np.ndarray:
        """(H, S, S) and the like, a row at a time: its copy is strided, and far wider than a call."""
        lengths = rows.lengths(spec.name, "S")
        longest = int(lengths.max(initial=0))
        shape = tuple(longest if isinstance(size, str) else size for size in part.shape)
        out = slot.array((spec.name, part.name), (rows.count, *shape), part.numpy_dtype)
        out[...] = 0
        for shard, places, local in rows.groups():
            values, starts = self.extent(shard, spec.name, part)
            assert starts is not None
            for place, row in zip(np.arange(rows.count)[places], local, strict=True):
                own = tuple(int(lengths[place]) if isinstance(size, str) else size for size in part.shape)
                stored = values[starts[row] : starts[row + 1], 0]
                if stored.size != np.prod(own):
                    raise StoreCorrupt(f"column {spec.name}: a row of shape {own} holds {stored.size} values")
                out[(place, *(slice(size) for size in own))] = stored.reshape(own)
        return out

    def _objects(self, spec: FieldSpec, rows: _Rows) -> list[Any]:
        found: list[Any] = [None] * rows.count
        for shard, places, local in rows.groups():
            chosen = pa.Array.from_buffers(pa.int64(), len(local), [None, pa.py_buffer(np.ascontiguousarray(local))])
            taken = self.mapped(shard).column(spec.name).take(chosen).to_pylist()
            for place, value in zip(np.arange(rows.count)[places], taken, strict=True):
                found[place] = value
        return found


class _Rows:
    """The rows of one batch: where they are, how long they are, computed once for all columns."""

    def __init__(self, gather: Gather, sample_ids: np.ndarray):
        self._gather, self.count = gather, len(sample_ids)
        first = gather.first_row
        if len(first) == 2:
            self._single, self._shard, self._local = True, np.zeros(0, np.int64), sample_ids - first[0]
        else:
            self._shard = np.searchsorted(first, sample_ids, side="right") - 1
            self._local = sample_ids - first[self._shard]
            self._single = self.count > 0 and bool((self._shard == self._shard[0]).all())
        self._cache: dict[Any, Any] = {}

    def groups(self) -> list[Group]:
        """Rows by shard: runs of neighbours (slices) where a batch touches many shards, else one group a shard."""
        if "groups" not in self._cache:
            self._cache["groups"] = self._group()
        return self._cache["groups"]

    def lengths(self, name: str, symbol: str) -> np.ndarray:
        """int64 [B]: S or P of each row, or a field's own length for "*"."""
        key = (name, symbol) if symbol == "*" else symbol
        if key not in self._cache:
            found = np.empty(self.count, np.int64)
            for shard, places, local in self.groups():
                starts = self._starts(shard, name, symbol)
                found[places] = starts[local + 1] - starts[local]
            self._cache[key] = found
        return self._cache[key]

    def entries(self, name: str, symbol: str, longest: int) -> list[Group]:
        """Like groups, with entry numbers [b * longest] in place of rows; past a row's end its last entry again."""
        key = ("entries", name if symbol == "*" else symbol)
        if key not in self._cache:
            made = []
            for shard, places, local in self.groups():
                starts = self._starts(shard, name, symbol)
                begin, last = starts[local], starts[local + 1] - 1
                made.append((shard, places, np.minimum(begin[:, None] + np.arange(longest), last[:, None]).ravel()))
            self._cache[key] = made
        return self._cache[key]

    def padding(self, name: str, symbol: str, longest: int) -> np.ndarray:
        """Entries of the padded batch [B * longest] past their row's end; int64, since a bool mask is half as fast."""
        key = ("padding", name if symbol == "*" else symbol)
        if key not in self._cache:
            past = np.arange(longest) >= self.lengths(name, symbol)[:, None]
            self._cache[key] = np.flatnonzero(past)
        return self._cache[key]

    def _starts(self, shard: int, name: str, symbol: str) -> np.ndarray:
        gather = self._gather
        if symbol != "*":
            if symbol not in gather.leaders:
                raise StoreCorrupt(f"column {name}: no column beside it tells how long its rows are ({symbol})")
            name = gather.leaders[symbol]
        starts = gather.extent(shard, name, gather.parts[name][0]).starts
        assert starts is not None
        return starts

    def _group(self) -> list[Group]:
        if not self.count:
            return []
        if self._single:
            return [(int(self._shard[0]) if len(self._shard) else 0, slice(0, self.count), self._local)]
        runs = _cuts(self._shard)
        if len(runs) <= 2 * np.count_nonzero(np.bincount(self._shard)):
            return [(int(self._shard[begin]), slice(begin, end), self._local[begin:end]) for begin, end in runs]
        narrow = self._shard.astype(np.uint16) if len(self._gather.first_row) < 2**16 else self._shard
        order = np.argsort(narrow, kind="stable")  # numpy sorts 16-bit numbers by radix, 10x faster
        shard = self._shard[order]
        return [(int(shard[begin]), order[begin:end], self._local[order[begin:end]]) for begin, end in _cuts(shard)]


def _cuts(numbers: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of equal numbers."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return list(zip(edges, edges[1:], strict=False))


def _take_into(values: np.ndarray, entries: np.ndarray, out: np.ndarray, places: slice | np.ndarray, per: int) -> None:
    """out[rows of places, `per` entries each] = values[entries]; starts were checked, "clip" needs no second buffer."""
    if not len(values):
        return
    if isinstance(places, slice):
        values.take(entries, axis=0, out=out[places.start * per : places.stop * per], mode="clip")
    else:
        out.reshape(-1, per * out.shape[1])[places] = values.take(entries, axis=0, mode="clip").reshape(len(places), -1)


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
    """Fields stored at some positions, back at [B, S, ...], zero elsewhere; `teacher_mask` bool [B, S] says where."""
    batch, longest = out[schema.ATTENTION_MASK].shape
    positions = out.pop(schema.POSITIONS)
    row, at = np.nonzero(np.arange(positions.shape[1]) < stored[:, None])
    places = positions[row, at].astype(np.int64)
    if places.size and not (places.min() >= 0 and places.max() < longest):
        raise StoreCorrupt(f"column {schema.POSITIONS}: positions below {longest} expected; got {places.max()}")
    for spec in fields:
        if spec.shape[:1] == ("P",) and spec.name in out:
            values = out[spec.name]
            full = np.zeros((batch, longest, *values.shape[2:]), values.dtype)
            full[row, places] = values[row, at]
            out[spec.name] = full
    out["teacher_mask"] = np.zeros((batch, longest), bool)
    out["teacher_mask"][row, places] = True


def row_ranges(gather: Gather, sample_ids: np.ndarray) -> Mapping[int, np.ndarray]:
    """shard -> int64 [n, 2]: byte ranges of the file that these rows need, sorted, neighbours merged."""
    rows, found = _Rows(gather, sample_ids), {}
    for shard, _, local in rows.groups():
        ranges = []
        for name, parts in gather.parts.items():
            for part in parts:
                values, starts = gather.extent(shard, name, part)
                if values.size:
                    begin, end = (local, local + 1) if starts is None else (starts[local], starts[local + 1])
                    ranges.append(
                        gather.mapped(shard).offset(values) + np.stack([begin, end], axis=1) * part.entry_bytes
                    )
        if ranges:
            found[shard] = _merge(np.concatenate(ranges))
    return found


def _merge(ranges: np.ndarray, gap: int = 64 << 10) -> np.ndarray:
    """Sorted by start; ranges closer than `gap` bytes become one."""
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 1])
    cuts = np.flatnonzero(ranges[1:, 0] > ends[:-1] + gap) + 1
    return np.stack([ranges[np.concatenate([[0], cuts]), 0], ends[np.concatenate([cuts, [len(ranges)]]) - 1]], axis=1)
