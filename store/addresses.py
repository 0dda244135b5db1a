"""Do two stores speak of the same rows? Their addresses say where a row came from, content hashes what it says.

N rows of one split, in the order in which a store has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from . import schema
from .errors import StoreCorrupt
from .reader import TeacherStore


@dataclass(frozen=True)
class Addresses:
    """sample_ids: int64 [N], ascending; source_index: int64 [N]; view: int32 [N]; content_hash: uint64 [N, 2]."""

    sample_ids: np.ndarray
    source_index: np.ndarray
    view: np.ndarray
    content_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.source_index)


class Common(NamedTuple):
    """What two stores share of a split.

    rows: of both; common: rows of equal address and content. elsewhere: rows of the other whose content the first has
    too, wherever it stands. places: int64 [N], the place in the other of each row of the first; -1 where it is not
    there, or says something else. first: the first row that differs: (source_index, view, hash there or "", the
    other's hash or ""); None where no row does.
    """

    rows: tuple[int, int]
    common: int
    elsewhere: int
    places: np.ndarray
    first: tuple[int, int, str, str] | None

    @property
    def whole(self) -> bool:
        return self.first is None


def addresses(store: TeacherStore, split: str) -> Addresses:
    """28 bytes a row, copied from the shards; nothing else is read. Raises ConfigError, StoreCorrupt."""
    sample_ids = store.select(split=split, fields=[]).sample_ids
    shards = [at for at, shard in enumerate(store.shards) if shard.split == split]
    found = {name: np.concatenate([_column(store, at, name) for at in shards]) for name in schema.ADDRESS_COLUMNS}
    hashes = found[schema.CONTENT_HASH].view(np.uint64).reshape(-1, 2)
    return Addresses(sample_ids, found[schema.SOURCE_INDEX], found[schema.VIEW], hashes)


def compared(ours: Addresses, theirs: Addresses) -> Common:
    places = _places(ours, theirs)
    there = places >= 0
    there[there] = (ours.content_hash[there] == theirs.content_hash[places[there]]).all(1)
    common = int(there.sum())
    sizes = (len(ours), len(theirs))
    if common == max(sizes):
        return Common(sizes, common, common, places, None)
    elsewhere = int(np.isin(theirs.content_hash[:, 0], ours.content_hash[:, 0]).sum())
    first = _first(ours, theirs, places, there)
    return Common(sizes, common, elsewhere, np.where(there, places, -1), first)


def _places(ours: Addresses, theirs: Addresses) -> np.ndarray:
    """int64 [N]: where in `theirs` each address of `ours` stands; -1 for nowhere."""
    if np.array_equal(ours.source_index, theirs.source_index) and np.array_equal(ours.view, theirs.view):
        return np.arange(len(ours))
    if not len(theirs):
        return np.full(len(ours), -1)
    views = 1 + max(int(one.view.max(initial=0)) for one in (ours, theirs))
    wanted, known = (one.source_index * views + one.view for one in (ours, theirs))
    order = np.argsort(known, kind="stable")
    at = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
    return np.where(known[at] == wanted, at, -1)


def _first(ours: Addresses, theirs: Addresses, places: np.ndarray, there: np.ndarray) -> tuple[int, int, str, str]:
    if not there.all():
        at = int(np.flatnonzero(~there)[0])
        other = _hex(theirs, int(places[at])) if places[at] >= 0 else ""
        return int(ours.source_index[at]), int(ours.view[at]), _hex(ours, at), other
    extra = np.setdiff1d(np.arange(len(theirs)), places)
    at = int(extra[0])
    return int(theirs.source_index[at]), int(theirs.view[at]), "", _hex(theirs, at)


def _hex(rows: Addresses, at: int) -> str:
    return rows.content_hash[at].tobytes().hex()


def _column(store: TeacherStore, shard: int, name: str) -> np.ndarray:
    """One address column of a shard; hashes as bytes [16 * rows]."""
    mapped = store.mapped(shard)
    array, kind = mapped.column(name), schema.ADDRESS_COLUMNS[name]
    binary = pa.types.is_fixed_size_binary(kind)
    values, count = (np.dtype(np.uint8), 16 * mapped.rows) if binary else (kind.to_pandas_dtype(), mapped.rows)
    data = array.buffers()[1]
    if not array.type.equals(kind) or array.null_count or array.offset:
        raise StoreCorrupt(f"{mapped.path}: column {name} is {kind} without nulls; got {array.type}")
    if count * np.dtype(values).itemsize > (data.size if data else 0):
        raise StoreCorrupt(f"{mapped.path}: column {name} of {mapped.rows} rows is cut short")
    return np.frombuffer(data, values, count) if count else np.zeros(0, values)
