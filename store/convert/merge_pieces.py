"""Which rows of which shards make each shard of a merged store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .. import schema
from ..addresses import Addresses, addresses
from ..codecs import WHOLE_COLUMN, parts_of
from ..errors import StoreMismatch
from ..reader import TeacherStore
from ..schema import FieldSpec
from ..shard import ShardPlan
from .merge_kinds import dataset_of, duplicates


class Source(NamedTuple):
    """Rows [first, last) of shard number `shard` of store number `store`."""

    store: int
    shard: int
    first: int
    last: int


class Piece(NamedTuple):
    """A shard to be: its rows from the first source, more columns of the same rows from the others.

    added: to each source_index.
    """

    plan: ShardPlan
    sources: list[Source]
    added: int


def pieces_of_rows(stores: Sequence[TeacherStore], keep_duplicates: bool) -> list[Piece]:
    """Shard after shard of store after store, split by split. Raises StoreMismatch for rows that are said twice."""
    made = []
    for split in dict.fromkeys(split for store in stores for split in store.splits):
        number, before = 0, list[tuple[int, Addresses]]()
        for at, store in enumerate(stores):
            if split not in store.splits:
                continue
            mine = addresses(store, split)
            if not keep_duplicates:
                _check_duplicates(stores, split, before, at, mine)
            added = _added(stores, split, before, at, mine)
            before.append((at, replace(mine, source_index=mine.source_index + added)))
            for shard, plan in enumerate(store.shards):
                if plan.split == split:
                    rows = int(store.first_row[shard + 1] - store.first_row[shard])
                    planned = ShardPlan(split, number, plan.start + added, plan.stop + added, plan.view)
                    made.append(Piece(planned, [Source(at, shard, 0, rows)], added))
                    number += 1
    return made


def _check_duplicates(
    stores: Sequence[TeacherStore], split: str, before: Sequence[tuple[int, Addresses]], at: int, mine: Addresses
) -> None:
    for other, theirs in before:
        if dataset_of(stores[other]) == dataset_of(stores[at]):
            continue  # parts of one dataset: what it says twice is its own matter
        count, first = duplicates(theirs, mine)
        if count:
            said = mine.content_hash[first].tobytes().hex()
            raise StoreMismatch(
                f"{count} of {len(mine)} rows of split {split} in {stores[at].path} say what rows of "
                f"{stores[other].path} say; the first is source_index {mine.source_index[first]}, content_hash {said}: "
                "take them out with predistill drop, or keep both with --duplicates keep"
            )


def _added(
    stores: Sequence[TeacherStore], split: str, before: Sequence[tuple[int, Addresses]], at: int, mine: Addresses
) -> int:
    """What is added to the source_index of a store whose numbers are taken. Raises StoreMismatch."""
    taken = [other for other, theirs in before if np.isin(mine.source_index, theirs.source_index).any()]
    if taken and all(dataset_of(stores[other]) == dataset_of(stores[at]) for other, _ in before):
        views = [other for other, theirs in before if _overlap(theirs, mine)]
        if not views:
            return 0
        raise StoreMismatch(
            f"{stores[views[0]].path} and {stores[at].path} say they are of one dataset (identity.dataset), but have "
            f"other rows at the same addresses of split {split}: dump one of them again"
        )
    if not taken:
        return 0
    return 1 + max(int(theirs.source_index.max(initial=-1)) for _, theirs in before)


def _overlap(ours: Addresses, theirs: Addresses) -> bool:
    views = 1 + max(int(one.view.max(initial=0)) for one in (ours, theirs))
    left, right = (one.source_index * views + one.view for one in (ours, theirs))
    return bool(np.isin(left, right).any())


def pieces_of_fields(stores: Sequence[TeacherStore]) -> list[Piece]:
    """Every shard ends where one of any store ends. Raises StoreMismatch where rows stand in another order."""
    made = []
    for split in stores[0].splits:
        first = addresses(stores[0], split)
        for other in stores[1:]:
            theirs = addresses(other, split)
            if not np.array_equal(first.content_hash, theirs.content_hash):
                raise StoreMismatch(f"{stores[0].path} and {other.path} have split {split} in another order")
        ends = [_ends(store, split) for store in stores]
        cuts = np.unique(np.concatenate([[0], *(end for _, end in ends)])).tolist()
        for number, (begin, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            sources = [_source(at, shards, end, begin, stop) for at, (shards, end) in enumerate(ends)]
            made.append(Piece(_plan(stores[0], sources[0], first, number, begin, stop), sources, 0))
    return made


def _ends(store: TeacherStore, split: str) -> tuple[list[int], np.ndarray]:
    """(numbers of a split's shards, where each ends among the split's rows)"""
    shards = [at for at, shard in enumerate(store.shards) if shard.split == split]
    return shards, np.cumsum([store.manifest["shards"][at]["rows"] for at in shards])


def _source(store: int, shards: Sequence[int], ends: np.ndarray, begin: int, stop: int) -> Source:
    at = int(np.searchsorted(ends, begin, side="right"))
    first = int(ends[at - 1]) if at else 0
    return Source(store, shards[at], begin - first, stop - first)


def _plan(store: TeacherStore, source: Source, rows: Addresses, number: int, begin: int, stop: int) -> ShardPlan:
    planned = store.shards[source.shard]
    if stop - begin == store.manifest["shards"][source.shard]["rows"]:
        return ShardPlan(planned.split, number, planned.start, planned.stop, planned.view)
    span = rows.source_index[begin:stop]
    return ShardPlan(planned.split, number, int(span.min()), int(span.max()) + 1, planned.view)


def check_same(stores: Sequence[TeacherStore], pieces: Sequence[Piece], names: Sequence[Collection[str]]) -> None:
    """Inputs, labels and what others are counted by must be equal in all stores. Raises StoreMismatch.

    names: of each store, columns that stand beside those of the others under names of their own.
    """
    for piece in pieces:
        lead = piece.sources[0]
        for source in piece.sources[1:]:
            for name in _compared(stores[0], stores[source.store], names[source.store]):
                spec = stores[0].fields[name]
                row = _first_other(stores, spec, lead, source)
                if row is not None:
                    index = stores[0].mapped(lead.shard).column(schema.SOURCE_INDEX)[lead.first + row].as_py()
                    raise StoreMismatch(
                        f"column {name} differs: {stores[0].path} and {stores[source.store].path} have other values in "
                        f"{piece.plan.split} source_index {index}; dump both with the same settings"
                    )


def _compared(first: TeacherStore, other: TeacherStore, apart: Collection[str]) -> list[str]:
    counts = {spec.parameters.get("counts") for store in (first, other) for spec in store.fields.values()}
    return [
        name for name, spec in first.fields.items()
        if name in other.fields and name not in apart
        and (spec.role in ("input", "label") or name == schema.POSITIONS or name in counts)
    ]  # fmt: skip


def _first_other(stores: Sequence[TeacherStore], spec: FieldSpec, lead: Source, source: Source) -> int | None:
    """The first row of a piece in which a column differs, bit by bit."""
    ours, theirs = (_rows(stores[one.store], spec, one) for one in (lead, source))
    if ours == theirs:
        return None
    single = range(lead.last - lead.first)
    at = (_rows(stores[one.store], spec, one._replace(first=one.first + row, last=one.first + row + 1))
          for row in single for one in (lead, source))  # fmt: skip
    return next((row for row, pair in enumerate(zip(at, at, strict=True)) if pair[0] != pair[1]), 0)


def _rows(store: TeacherStore, spec: FieldSpec, source: Source) -> list[object]:
    """Some rows of a column, comparable."""
    mapped = store.mapped(source.shard)
    if spec.codec in WHOLE_COLUMN:
        return mapped.checked(spec.name).slice(source.first, source.last - source.first).to_pylist()
    found: list[object] = []
    for part in parts_of(spec):
        values, starts = mapped.part(spec, part)
        if starts is None:
            found.append(values[source.first : source.last].tobytes())
            continue
        own = starts[source.first : source.last + 1]
        found += [(own - own[0]).tobytes(), values[own[0] : own[-1]].tobytes()]
    return found
