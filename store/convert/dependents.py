"""Which rows must go with others, and where files of images move to.

Of a row of the source, the first view that is stored holds what all of its views need: the file of an image, the
context of a question. So with it go all others. A row that another image was mixed into goes with that image; where it
was the one that held its own image's file, the file moves to the first view that stays.

N rows of the store.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..addresses import addresses
from ..codecs import parts_of
from ..images.views import VIEW_MIX_WITH
from ..reader import TeacherStore


class Rows(NamedTuple):
    """Of each row of the store: its source row, numbered through all splits; whether it is the first stored view of it;
    the source row of the image mixed in, or -1. int64 [N], bool [N], int64 [N]."""

    source: np.ndarray
    first: np.ndarray
    mixed: np.ndarray


class Going(NamedTuple):
    """gone: bool [N]. moves: sample_id of a row that stays -> that of the row whose files it takes over."""

    gone: np.ndarray
    moves: dict[int, int]


def going(store: TeacherStore, asked: np.ndarray) -> Going:
    """asked: int64, sample_ids. What goes with them. Raises StoreCorrupt."""
    rows = rows_of(store)
    gone = np.zeros(len(rows.source), bool)
    gone[asked] = True
    sources = int(rows.source.max(initial=-1)) + 1
    headless = np.zeros(sources, bool)
    headless[rows.source[gone & rows.first]] = True
    gone |= headless[rows.source]
    mixed = rows.mixed >= 0
    while True:
        left = np.bincount(rows.source[~gone], minlength=sources)
        more = mixed & ~gone
        more[more] = left[rows.mixed[more]] == 0
        if not more.any():
            return Going(gone, _moves(rows, gone))
        gone |= more


def rows_of(store: TeacherStore) -> Rows:
    total = int(store.first_row[-1])
    source, first, mixed = np.empty(total, np.int64), np.zeros(total, bool), np.full(total, -1)
    found = 0
    for split in store.splits:
        mine = addresses(store, split)
        order = np.lexsort((mine.view, mine.source_index))
        ascending = mine.source_index[order]
        begins = np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(order)]
        numbers = np.empty(len(order), np.int64)
        numbers[order] = found + np.cumsum(begins) - 1
        source[mine.sample_ids], first[mine.sample_ids[order[begins]]] = numbers, True
        if VIEW_MIX_WITH in store.fields:
            mixed[mine.sample_ids] = _partners(store, split, ascending[begins], found)
        found += int(begins.sum())
    return Rows(source, first, mixed)


def _partners(store: TeacherStore, split: str, known: np.ndarray, found: int) -> np.ndarray:
    """Numbers of the source rows mixed into the rows of a split; -1 for none, or one that is not there (any more)."""
    spec = store.fields[VIEW_MIX_WITH]
    [part] = parts_of(spec)
    shards = [at for at, shard in enumerate(store.shards) if shard.split == split]
    wanted = np.concatenate([store.mapped(at).part(spec, part)[0].reshape(-1) for at in shards])
    if not len(known):
        return np.full(len(wanted), -1)
    at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where((known[at] == wanted) & (wanted >= 0), found + at, -1)


def _moves(rows: Rows, gone: np.ndarray) -> dict[int, int]:
    held = np.flatnonzero(rows.first & gone)
    staying = np.flatnonzero(~gone)
    orphans = staying[np.isin(rows.source[staying], rows.source[held])]
    _, at = np.unique(rows.source[orphans], return_index=True)  # the first view of each: rows stand view after view
    holder = dict(zip(rows.source[held].tolist(), held.tolist(), strict=True))
    return {int(orphans[one]): holder[int(rows.source[orphans[one]])] for one in at}


def with_files(store: TeacherStore, columns: dict[str, pa.Array], shard: int, moves: dict[int, int]) -> None:
    """Columns of a shard in which rows have the files of other rows."""
    begin, end = int(store.first_row[shard]), int(store.first_row[shard + 1])
    mine = {row - begin: holder for row, holder in moves.items() if begin <= row < end}
    if not mine:
        return
    for spec in store.fields.values():
        if spec.codec == "bytes":
            column, mask = columns[spec.name], np.zeros(end - begin, np.uint8)
            mask[list(mine)] = 1
            files = [_file(store, spec.name, mine[row]) for row in sorted(mine)]
            chosen = pa.Array.from_buffers(pa.uint8(), len(mask), [None, pa.py_buffer(mask)]).cast(pa.bool_())
            columns[spec.name] = pa.compute.replace_with_mask(column, chosen, pa.array(files, column.type))


def _file(store: TeacherStore, name: str, row: int) -> bytes:
    shard = int(np.searchsorted(store.first_row, row, side="right")) - 1
    return store.mapped(shard).checked(name)[row - int(store.first_row[shard])].as_py()
