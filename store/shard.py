"""One Arrow file: fill it, write it. mapped.py reads it back.

A shard is one Arrow IPC file with one record batch. `ShardBuilder` allocates every buffer of it beforehand, since
the lengths of all rows are known once they are tokenised, and puts rows in their places in whatever order batches
come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from . import schema
from .buffers import Buffer, Memory, RaggedBuffer, entries_of, leaf
from .codecs import WHOLE_COLUMN, Part, check_values, codec_of, parts_of
from .errors import DataError, StoreCorrupt
from .schema import FieldSpec
from .strict import check_name, is_count, shown


@dataclass(frozen=True)
class ShardPlan:
    """A contiguous range [start, stop) of one split's source rows, under one view."""

    split: str
    number: int
    start: int
    stop: int
    view: int = 0

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, where: str) -> ShardPlan:
        """Raises StoreCorrupt."""
        try:
            made = cls(**data)
        except TypeError:
            made = cls("", 0, 0, -1)
        counts = is_count(made.number) and is_count(made.start) and is_count(made.stop) and is_count(made.view, 2**31)
        if not (counts and made.start <= made.stop and type(made.split) is str):
            raise StoreCorrupt(
                f"{where}: a shard has a split, a number, the rows from start to stop, and a view; got {shown(data)}"
            )
        check_name(made.name, where)
        return made


class ShardBuilder:
    """Every buffer of one shard, filled in any order, then one record batch.

    rows: samples in the shard. lengths: {"S": int64[rows]} and {"P": ...} where fields need them.
    """

    def __init__(
        self,
        plan: ShardPlan,
        fields: Sequence[FieldSpec],
        rows: int,
        lengths: Mapping[str, np.ndarray],
        memory: Memory | None = None,
    ):
        memory = Memory() if memory is None else memory
        self.plan, self.fields, self.rows = plan, list(fields), rows
        self.lengths = {name: np.asarray(value, np.int64) for name, value in lengths.items()}
        self.columns: dict[str, pa.Array] = {}
        self.source_index = np.arange(plan.start, plan.start + rows, dtype=np.int64)
        self._placed: dict[str, np.ndarray] = {}
        self._view = np.full(rows, plan.view, np.int32)
        self._buffers: dict[str, list[Buffer | RaggedBuffer]] = {}
        for spec in self.fields:
            if spec.codec not in WHOLE_COLUMN and "*" not in spec.shape:
                self._buffers[spec.name] = [
                    RaggedBuffer(part, rows)
                    if schema.is_ragged(part.shape)
                    else Buffer(part, self.lengths, rows, memory)
                    for part in parts_of(spec)
                ]
                self._placed[spec.name] = np.zeros(rows, bool)
        self._specs = {spec.name: spec for spec in self.fields}

    def _buffer(self, part: Part, memory: Memory) -> Buffer | RaggedBuffer:
        ragged = schema.is_ragged(part.shape)
        return RaggedBuffer(part, self.rows) if ragged else Buffer(part, self.lengths, self.rows, memory)

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Place the values of some rows.

        rows: int64 [B], positions inside the shard, each row once over all calls.
        values: [B, *shape]; for a token-level field right-padded [B, Smax, ...], or flat [sum of lengths, ...]. A
            last axis "K" is padded to any length; the counts of the same rows must have been put before.
        Raises DataError where the dtype cannot hold a value, or it is not finite.
        """
        spec, rows, values = self._specs[name], np.asarray(rows, np.int64), np.asarray(values)
        if _square(spec):
            self._place_square(spec, rows, values)
        else:
            flat, owner = self._flatten(spec, rows, values)
            counts = self._counts(spec, rows)
            if counts is not None:
                flat = np.where(np.arange(flat.shape[1]) < counts[:, None], flat, 0)
            check_values(flat, spec, lambda entry: self.source_index[rows[owner[entry]]])
            for buffer, part in zip(self._buffers[name], codec_of(spec).encode(flat, spec), strict=True):
                if isinstance(buffer, RaggedBuffer):
                    assert counts is not None
                    buffer.place(rows, self.lengths[str(spec.shape[0])][rows], counts, part)
                else:
                    buffer.place(rows, part)
        self._placed[name][rows] = True

    def put_column(self, name: str, column: pa.Array | pa.ChunkedArray) -> None:
        """A whole column at once: carried columns, encoded bytes, and fields of shape ("*", ...)."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if len(column) != self.rows:
            raise DataError(f"column {name}: the shard has {self.rows} rows; got {len(column)}")
        spec = self._specs[name]
        if spec.codec == "bytes":
            column = column.cast(pa.large_binary())
        elif spec.codec != "arrow":
            column = column.cast(schema.array_type(spec.shape, spec.dtype))
        self.columns[name] = column

    def put_addresses(
        self, content_hash: np.ndarray, source_index: np.ndarray | None = None, view: np.ndarray | None = None
    ) -> None:
        """content_hash: uint8 [rows, 16]; source_index: int64 [rows], by default start, start + 1, …; view: int [rows],
        by default the plan's: it tells the rows of one source row apart."""
        digest = np.ascontiguousarray(content_hash, np.uint8).reshape(self.rows, 16)
        if source_index is not None:
            self.source_index = np.asarray(source_index, np.int64)
        if view is not None:
            self._view = np.ascontiguousarray(view, np.int32)
        self.columns[schema.CONTENT_HASH] = pa.Array.from_buffers(
            pa.binary(16), self.rows, [None, pa.py_buffer(digest)]
        )

    def to_batch(self, fingerprint: str) -> pa.RecordBatch:
        """The shard as one record batch whose schema says what it is."""
        columns: dict[str, pa.Array] = {
            schema.SOURCE_INDEX: leaf(pa.int64(), self.source_index.reshape(-1, 1)),
            schema.VIEW: leaf(pa.int32(), self._view.reshape(-1, 1)),
            schema.CONTENT_HASH: self.columns[schema.CONTENT_HASH],
        }
        for spec in self.fields:
            columns[spec.name] = self._column(spec)
        names = [pa.field(name, column.type, nullable=column.null_count > 0) for name, column in columns.items()]
        shard = {**self.plan.to_json(), "rows": self.rows}
        described = pa.schema(names, metadata=schema.metadata(self.fields, shard, fingerprint))
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=described)

    def memory(self) -> list[np.ndarray]:
        """The buffers it was given; they may be used again once the shard is on disk."""
        buffers = [buffer for field in self._buffers.values() for buffer in field]
        return [buffer.memory for buffer in buffers if isinstance(buffer, Buffer)]

    @property
    def tokens(self) -> int:
        return int(self.lengths["S"].sum()) if "S" in self.lengths else 0

    def _column(self, spec: FieldSpec) -> pa.Array:
        if spec.name not in self._buffers:
            return self.columns[spec.name]
        missing = ~self._placed[spec.name]
        assert not missing.any(), f"{spec.name}: rows {np.flatnonzero(missing)[:5]} were never put"
        arrays = [(buffer.part, buffer.to_arrow()) for buffer in self._buffers[spec.name]]
        if len(arrays) == 1:
            return arrays[0][1]
        names = [pa.field(part.name, array.type, nullable=False) for part, array in arrays]
        return pa.StructArray.from_arrays([array for _, array in arrays], fields=names)

    def _flatten(self, spec: FieldSpec, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Valid entries only, and which of `rows` each belongs to."""
        if not (schema.is_list(spec.shape) or schema.is_ragged(spec.shape)):
            return values, np.arange(len(rows))
        lengths = self.lengths[str(spec.shape[0])][rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        if values.ndim == len(spec.shape) + 1:  # padded
            values = values[np.arange(values.shape[1]) < lengths[:, None]]
        if len(values) != len(owner):
            raise DataError(f"field {spec.name}: rows of {len(owner)} entries in all; got {len(values)}")
        return values, owner

    def _counts(self, spec: FieldSpec, rows: np.ndarray) -> np.ndarray | None:
        """Entries of each position of these rows, int64; None where the shape has no "K"."""
        if "K" not in spec.shape:
            return None
        name = spec.parameters["counts"]
        assert self._placed[name][rows].all(), f"{spec.name}: {name} of these rows must be put before"
        [buffer] = self._buffers[name]
        assert isinstance(buffer, Buffer) and buffer.starts is not None
        return buffer.values[entries_of(buffer.starts, rows), 0].astype(np.int64)

    def _place_square(self, spec: FieldSpec, rows: np.ndarray, values: np.ndarray) -> None:
        """Fields like (H, S, S): a row at a time, its padding cut on every axis."""
        for row, value in zip(rows, values, strict=True):
            sizes = [int(self.lengths[s][row]) if isinstance(s, str) else s for s in spec.shape]
            own = value[tuple(slice(size) for size in sizes)]
            check_values(own[None], spec, lambda _, row=row: self.source_index[row])  # type: ignore[misc]
            for buffer, part in zip(self._buffers[spec.name], codec_of(spec).encode(own, spec), strict=True):
                assert isinstance(buffer, Buffer) and buffer.starts is not None
                buffer.values[buffer.starts[row] : buffer.starts[row + 1], 0] = part.ravel()


def _square(spec: FieldSpec) -> bool:
    listed = schema.is_list(spec.shape) or schema.is_ragged(spec.shape)
    return bool(schema.symbols(spec.shape)) and not listed


def write_arrow(batch: pa.RecordBatch, sink: Any) -> None:
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def fsync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
