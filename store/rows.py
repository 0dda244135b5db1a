"""The rows of one batch: which shards they are in, how long they are, which bytes of the files they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import StoreCorrupt

if TYPE_CHECKING:
    from .gather import Gather
    from .mapped import MappedShard

Group = tuple[int, slice | np.ndarray, np.ndarray]  # shard, places in the batch, rows in the shard

Copy = tuple[int, int, int, int, int]  # stored entries [0, 1) to places [2, 3); padding at [3, 4)


class Extent(NamedTuple):
    """One part of one column in one shard: values [entries, width], starts [rows + 1] or None for fixed rows."""

    values: np.ndarray
    starts: np.ndarray | None


class Opened(NamedTuple):
    """A shard, and what is read of it: an extent each part of each column."""

    mapped: MappedShard
    extents: Mapping[tuple[str, str], Extent]


class BatchRows:
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
        """Rows by shard."""
        if "groups" not in self._cache:
            self._cache["groups"] = self._group()
        return self._cache["groups"]

    def pairs(self, places: slice | np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, int]]:
        """(place in the batch, number) of each row of a group."""
        at = range(self.count) if isinstance(places, slice) else places.tolist()
        return zip(at, numbers.tolist(), strict=True)

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

    def copies(self, name: str, symbol: str, longest: int) -> list[tuple[int, list[Copy]]]:
        """By shard: which stored entries go where in the padded batch [B * longest], for copies row by row."""
        key = ("copies", name if symbol == "*" else symbol)
        if key not in self._cache:
            made = []
            for shard, places, local in self.groups():
                starts = self._starts(shard, name, symbol)
                begin, end = starts[local], starts[local + 1]
                first = np.arange(self.count)[places] * longest
                columns = (begin, end, first, first + end - begin, first + longest)
                made.append((shard, list(zip(*(column.tolist() for column in columns), strict=True))))
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
        narrow = self._shard.astype(np.uint16) if len(self._gather.first_row) < 2**16 else self._shard
        order = np.argsort(narrow, kind="stable")  # numpy sorts 16-bit numbers by radix, 10x faster
        shard = self._shard[order]
        edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), self.count]
        return [(int(shard[a]), order[a:b], self._local[order[a:b]]) for a, b in zip(edges, edges[1:], strict=False)]


def row_ranges(gather: Gather, sample_ids: np.ndarray) -> Mapping[int, np.ndarray]:
    """shard -> int64 [n, 2]: byte ranges of the file that these rows need, sorted, neighbours merged."""
    rows, found = BatchRows(gather, sample_ids), {}
    for shard, _, local in rows.groups():
        ranges, opened = [], gather.opened(shard)
        for name, parts in gather.parts.items():
            for part in parts:
                values, starts = opened.extents[name, part.name]
                if values.size:
                    begin, end = (local, local + 1) if starts is None else (starts[local], starts[local + 1])
                    ranges.append(opened.mapped.offset(values) + np.stack([begin, end], axis=1) * part.entry_bytes)
        if ranges:
            found[shard] = _merge(np.concatenate(ranges))
    return found


def _merge(ranges: np.ndarray, gap: int = 64 << 10) -> np.ndarray:
    """Sorted by start; ranges closer than `gap` bytes become one."""
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 1])
    cuts = np.flatnonzero(ranges[1:, 0] > ends[:-1] + gap) + 1
    return np.stack([ranges[np.concatenate([[0], cuts]), 0], ends[np.concatenate([cuts, [len(ranges)]]) - 1]], axis=1)
