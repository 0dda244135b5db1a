"""Rows that are read once, in order, as `datasets` streams them: never counted, never prepared into its cache.

What must be known before a dump begins is learnt of the first rows of each split, an ordinary source of rows. All
others are read a part at a time beside the teacher, looked at when they come, and gone when their shards are made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, table_cast

from ..store import ConfigError, DataError, Plan, ShardPlan, StoreMismatch
from ..store.growing import GrowingWriter
from ..store.parts import Part
from .config import DumpConfig
from .data import IMAGES, SLICE, SourceData, find, reading
from .paths import named_paths
from .rows import conll, squad
from .rows.images import as_files
from .survey import RowsHash
from .tasks import Task

FIRST = 1000  # rows of a split that a dump is planned by


@dataclass(frozen=True)
class Stream(SourceData):
    """splits: their first rows. streams: of all their rows. short: splits that have no more than the first."""

    config: DumpConfig
    streams: Mapping[str, datasets.IterableDataset]
    short: frozenset[str]
    _at_hand: dict[tuple[str, int], pa.Table] = field(default_factory=dict)  # the rows of the last part

    @property
    def expected(self) -> int | None:
        rows = [self._most(split) for split in self.splits]
        return None if None in rows else sum(filter(None, rows))

    def shards(self, grows_by: int, views: Mapping[str, int]) -> int | None:
        """How many there will be; None where nobody knows."""
        if self.expected is None:
            return None
        return sum(math.ceil((self._most(split) or 0) / grows_by) * views.get(split, 1) for split in self.splits)

    def table(self, shard: ShardPlan, columns: Sequence[str]) -> pa.Table:
        """Read anew where its part has gone by: another worker had claimed the shard, and did not make it."""
        held = self._at_hand.get((shard.split, shard.start))
        if held is None:
            rows = self._rows(shard.split, columns)
            rows.skip(shard.start)
            held = rows.peek(shard.stop - shard.start)
        return held.select([name for name in columns if name in held.column_names])

    def claim(
        self, writer: GrowingWriter, task: Task, kept: Sequence[str], tell: Callable[[int], None]
    ) -> Iterator[ShardPlan]:
        """Shards for this worker to make, as their rows come by; at last those that others leave."""
        most = self.config.max_samples
        for split, rows in writer.ends.items():
            if most is not None and rows > most:
                raise StoreMismatch(
                    f"{writer.path} has {rows} rows of split {split}, and --max-samples {most} asks for fewer: give at "
                    f"least {rows}, or another --output-dir"
                )
        columns = list(dict.fromkeys([*task.columns, *kept]))
        for split in self.splits:
            for part in self._parts(split, writer, task, columns):
                yield from writer.claim_of(part)
        self._at_hand.clear()
        yield from writer.claim(tell)

    def _parts(self, split: str, writer: GrowingWriter, task: Task, columns: Sequence[str]) -> Iterator[Part]:
        """Those that are there, once their rows were found to be the same, then new ones. Raises StoreMismatch, and
        DataError for the first row of a new part that cannot be used."""
        rows, seen, start, number = self._rows(split, columns), RowsHash(), 0, 0
        views = getattr(task, "views", {}).get(split, 1)
        while (left := (self.config.max_samples or math.inf) - start) > 0:
            part = writer.part(split, start)
            size = part.stop - start if part else int(min(writer.plan.grows_by or 0, left))
            table = rows.peek(size + 1)
            ended, table = len(table) <= size, table.slice(0, size)
            if part is None and not len(table):
                return
            read = seen.copy()
            read.update(table)
            if part is None:
                task.check(split, start, table)
                stop = start + len(table)
                shards = [ShardPlan(split, number * views + view, start, stop, view) for view in range(views)]
                part = writer.append(Part(split, start, stop, ended, read.hexdigest(), shards))
                if part.stop != stop:  # another worker was quicker, and read another number of rows
                    continue
            if (part.stop, part.rows_sha256) != (start + len(table), read.hexdigest()):
                raise _changed(writer, part, start + len(table))
            rows.drop(len(table))
            self._at_hand.clear()
            self._at_hand[split, start] = table
            yield part
            start, seen, number = part.stop, read, number + 1

    def _rows(self, split: str, columns: Sequence[str]) -> _Rows:
        features = self.splits[split].features
        return _Rows(_chunks(self.config, split, self.streams[split], features, columns))

    def _most(self, split: str) -> int | None:
        """Rows that a split may have; None where nobody knows."""
        return len(self.splits[split]) if split in self.short else self.config.max_samples


class _Rows:
    """Rows in order: looked at, then dropped."""

    def __init__(self, chunks: Iterator[pa.Table]):
        self._chunks, self._held = chunks, [next(chunks)]

    def peek(self, count: int) -> pa.Table:
        """The next `count`, or as many as there are."""
        while sum(map(len, self._held)) < count and (more := next(self._chunks, None)) is not None:
            self._held.append(more)
        return pa.concat_tables(self._held).slice(0, count)

    def drop(self, count: int) -> None:
        self._held = [pa.concat_tables(self._held).slice(count)]

    def skip(self, count: int) -> None:
        while count and (size := len(self.peek(min(count, SLICE)))):
            self.drop(size)
            count -= size


def open_stream(config: DumpConfig, stored: Plan | None) -> Stream:
    """The rows that `config` names. stored: the plan that goes on, if any, whose first rows are taken for the first
    again: what was learnt of them holds. Raises ConfigError for what cannot be streamed, DataError."""
    for path in (named_paths(config.dataset) or {}).values():
        if path.suffix in conll.SUFFIXES or Path(path.stem).suffix in conll.SUFFIXES:
            raise ConfigError(f"--streaming: {path.name} is read whole, as all CoNLL files are; leave --streaming away")
    with reading(config):
        name, revision, found = find(config, lambda builder: builder.as_streaming_dataset())
    streams = {split: _streamed(rows) for split, rows in found.items()}
    before = stored.identity["dataset"].get("first_rows", {}) if stored and stored.grows_by else {}
    most = min(FIRST, config.max_samples or FIRST)
    read = {split: _first(config, split, rows, before.get(split, most)) for split, rows in streams.items()}
    first = {split: rows for split, (rows, _) in read.items()}
    if articles := next((split for split, rows in first.items() if squad.are_articles(rows)), None):
        raise ConfigError(
            f"--streaming: split {articles} of {config.dataset} holds articles, as SQuAD's own JSON does, which are "
            "read whole; leave --streaming away"
        )
    short = frozenset(split for split, (_, all_of_them) in read.items() if all_of_them)
    return Stream(name, revision, first, config, streams, short)


def _streamed(rows: Any) -> datasets.IterableDataset:
    """A saved dataset is one too."""
    return rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows


def _first(
    config: DumpConfig, split: str, stream: datasets.IterableDataset, most: int
) -> tuple[datasets.Dataset, bool]:
    """(rows, are they all?). Where nothing else says what columns there are, the first rows do."""
    with reading(config):
        table = next(iter(_tables(stream)), None)
        features = stream.features or datasets.Features.from_arrow_schema(table.schema) if table else None
        rows: Any = _Rows(_chunks(config, split, stream, features)).peek(most + 1) if features else ()
        if not len(rows):
            raise DataError(f"split {split} has no rows; at least one expected")
        first = datasets.Dataset(InMemoryTable(rows.slice(0, most)), datasets.DatasetInfo(features=features))
        return first, len(rows) <= most


def _chunks(
    config: DumpConfig, split: str, stream: datasets.IterableDataset, features: datasets.Features,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:  # fmt: skip
    """All rows, some at a time, of the types of the first; at first none. columns: of those that there are, images as
    files; None: all, as they are."""
    schema, at = features.arrow_schema, 0
    tables, table = _tables(stream), schema.empty_table()
    while table is not None:
        with reading(config, f", split {split}, after row {at}"):
            table = table_cast(table, schema)
            if columns is not None:
                table = as_files(table.select([name for name in columns if name in features]), features)
            at += len(table)
        yield table
        with reading(config, f", split {split}, after row {at}"):
            table = next(tables, None)


def _tables(stream: datasets.IterableDataset) -> Iterator[pa.Table]:
    """As they are read. Of a CSV, whose types are those of its first piece, IterableDataset.iter would put pieces
    together before they are made alike, and fail where an empty cell comes after 10,000 whole numbers."""
    if stream.features is not None or not stream._ex_iterable.iter_arrow:
        return stream.with_format("arrow").iter(IMAGES)
    read = copy.copy(stream._ex_iterable)
    read._state_dict = None  # from the first row, wherever others are
    return (table for _, table in read.iter_arrow())


def _changed(writer: GrowingWriter, part: Part, end: int) -> StoreMismatch:
    ends = f"the source ends at row {end}" if end < part.stop else "their content differs"
    return StoreMismatch(
        f"{writer.path}: rows {part.start} to {part.stop} of split {part.split} are not those of "
        f"{writer.file_of(part)}: {ends}; give the source as it was, or another --output-dir"
    )
