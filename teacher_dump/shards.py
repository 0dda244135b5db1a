"""One shard, from source rows to a committed file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..store import DataError, FieldSpec, ShardPlan, StoreWriter
from .capture import Captured
from .data import SourceData
from .tasks import Samples, Task


@dataclass
class Tally:
    """What this run did. teacher_seconds: time in forward passes."""

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    teacher_seconds: float = 0.0
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A shard's rows, tokenised, and the source columns they carry."""

    samples: Samples
    carried: dict[str, pa.Array]


def prepare(source: SourceData, task: Task, kept: list[str], shard: ShardPlan) -> Prepared:
    """Raises DataError for a kept value that the column's type, of all splits, does not hold."""
    table = source.table(shard, list(dict.fromkeys([*task.columns, *kept])))
    of_view = {"view": shard.view} if shard.view else {}  # of tasks that have several
    samples = task.prepare(shard.split, np.arange(shard.start, shard.stop), table, **of_view)
    carried = {name: _one(table.column(name)) for name in kept}
    for name, kind in carried_types(source, kept).items():
        if carried[name].type == kind:
            continue
        try:
            carried[name] = carried[name].cast(kind)
        except pa.ArrowInvalid as error:
            raise DataError(f"split {shard.split}, rows {shard.start} to {shard.stop - 1}: --keep-columns {name} is "
                            f"kept as {kind} ({error}); give it one type in all splits") from error  # fmt: skip
    if len(samples) != len(table):  # a task that makes several rows of one
        chosen = pa.array(samples.source_index - shard.start)
        carried = {name: column.take(chosen) for name, column in carried.items()}
    return Prepared(samples, carried)


def carried_fields(source: SourceData, kept: list[str]) -> list[FieldSpec]:
    """Raises DataError for a column whose splits have no type in common."""
    types = carried_types(source, kept)
    return [FieldSpec(name, (), str(types[name]), codec="arrow", role="carried") for name in kept]


def carried_types(source: SourceData, kept: list[str]) -> dict[str, pa.DataType]:
    """Of each column, what holds the values of all splits: whole and other numbers as float64, nothing as anything."""
    schemas = {split: rows.features.arrow_schema for split, rows in source.splits.items()}
    found = {}
    for name in kept:
        kinds = {split: pa.schema([schema.field(name).remove_metadata()]) for split, schema in schemas.items()}
        try:
            found[name] = pa.unify_schemas(list(kinds.values()), promote_options="permissive").field(name).type
        except pa.ArrowTypeError as error:
            each = ", ".join(f"{one.field(name).type} in {split}" for split, one in kinds.items())
            raise DataError(f"--keep-columns {name}: one type expected in all splits; got {each}: convert it, or leave "
                            "the column out") from error  # fmt: skip
    return found


class ShardKeeper:
    """Puts what the teacher gave into a shard and commits it. Everything here runs in the background thread."""

    def __init__(self, writer: StoreWriter, task: Task, shard: ShardPlan, prepared: Prepared, tally: Tally):
        self._writer, self._task, self._samples, self._tally = writer, task, prepared.samples, tally
        self._carried = prepared.carried
        used = {size for spec in task.fields for size in spec.shape}
        lengths = {name: of_rows for name, of_rows in self._samples.lengths.items() if name in used}
        self._builder = writer.open_shard(shard, len(self._samples), lengths)
        self._ragged = {spec.name for spec in task.fields if "K" in spec.shape}
        self._loose = {spec.name: [None] * len(self._samples) for spec in task.fields if "*" in spec.shape}

    def keep_inputs(self) -> None:
        everything = np.arange(len(self._samples))
        for name, values in self._samples.values.items():
            if isinstance(values, pa.Array):
                self._builder.put_column(name, values)
            else:
                self._builder.put(name, everything, values)
        for name, column in self._carried.items():
            self._builder.put_column(name, column)
        self._builder.put_addresses(self._samples.content_hash, self._samples.source_index, self._samples.view)

    def keep(self, rows: np.ndarray, captured: Captured) -> None:
        """rows: int64 [B], positions in the shard."""
        found = self._task.outputs(self._samples, rows, captured.arrays())
        for name, values in sorted(found.items(), key=lambda item: item[0] in self._ragged):  # after their counts
            if name in self._loose:
                for row, value in zip(rows, values, strict=True):
                    self._loose[name][row] = value
            else:
                self._builder.put(name, rows, values)
        self._tally.teacher_seconds += captured.seconds()

    def commit(self) -> None:
        for name, values in self._loose.items():
            self._builder.put_column(name, _large_list(values))
        written = self._writer.commit(self._builder)
        if written is None:  # another worker took it over
            return
        self._tally.bytes += written["bytes"]
        for name, count in self._samples.notes.items():
            self._tally.notes[name] = self._tally.notes.get(name, 0) + count


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _large_list(rows: list[Any]) -> pa.Array:
    """One list of int64 a row."""
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    flat = np.concatenate(rows).astype(np.int64)
    values = pa.Array.from_buffers(pa.int64(), len(flat), [None, pa.py_buffer(flat)])
    kind = pa.large_list(pa.field("item", pa.int64(), nullable=False))
    return pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(starts)], children=[values])
