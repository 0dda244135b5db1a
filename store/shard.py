"""One Arrow file: fill it, write it, map it.

A shard is one Arrow IPC file with one record batch. `ShardBuilder` allocates every buffer of it beforehand, since
the lengths of all rows are known once they are tokenised, and puts rows in their places in whatever order batches
come; `MappedShard` hands the same buffers back as numpy arrays over the memory map.
"""

from __future__ import annotations

import json
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


class MappedShard:
    """One shard, memory-mapped and read-only; every array is a view of the file.

    Raises StoreCorrupt where the file is not a shard, or says lengths and offsets that its buffers do not have.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            source = pa.memory_map(str(path))
            self._base, self.bytes = source.read_buffer(1).address, source.size()
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                raise StoreCorrupt(f"{path}: one record batch expected; got {reader.num_record_batches}")
            self.batch = reader.get_batch(0)
            self.batch.validate()
            self.names = self.batch.schema.names
            source.close()  # the mapping lives as long as its buffers: 4,000 shards need no 4,000 descriptors
        except FileNotFoundError as error:
            raise StoreCorrupt(f"{path} is missing: run the same dump again to make it anew") from error
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise StoreCorrupt(
                f"{path} is not a readable shard ({_one_line(error)}): delete it and its .json, "
                "then run the same dump again"
            ) from error
        self.rows, self._checked = self.batch.num_rows, set[str]()
        self.fields, self.place, self.fingerprint = _read_metadata(path, self.batch.schema.metadata or {})

    def part(self, spec: FieldSpec, part: Part) -> tuple[np.ndarray, np.ndarray | None]:
        """(values [entries, width], starts int64 [rows + 1] or None) of one part of a field."""
        array = self._array(spec.name)
        if part.name:
            if not pa.types.is_struct(array.type) or array.type.get_field_index(part.name) < 0:
                raise StoreCorrupt(f"{self.path}: column {spec.name} has no part {part.name!r}")
            array = array.field(part.name)
        expected = schema.array_type(part.shape, part.dtype)
        if not _same_type(array.type, expected):
            raise StoreCorrupt(f"{self.path}: column {spec.name} is {expected} by its description; got {array.type}")
        return self._views(spec.name, array, part)

    def column(self, name: str) -> pa.Array:
        """A column as Arrow has it: carried columns, bytes and addresses."""
        return self._array(name)

    def checked(self, name: str) -> pa.Array:
        """A column whose values are about to be copied: every offset in it is looked at once."""
        if name not in self._checked:
            try:
                self._array(name).validate(full=True)
            except pa.ArrowException as error:
                raise StoreCorrupt(f"{self.path}: column {name}: {_one_line(error)}") from error
            self._checked.add(name)
        return self._array(name)

    def offset(self, values: np.ndarray) -> int:
        """Where in the file a view starts, in bytes."""
        return values.ctypes.data - self._base

    def _array(self, name: str) -> pa.Array:
        if self.batch.schema.get_field_index(name) < 0:
            raise StoreCorrupt(f"{self.path}: no column {name!r}; it has {', '.join(self.names)}")
        return self.batch.column(name)

    def _views(self, name: str, array: pa.Array, part: Part) -> tuple[np.ndarray, np.ndarray | None]:
        where, starts = f"{self.path}: column {name}", None
        if array.null_count or array.offset:
            raise StoreCorrupt(f"{where}: no nulls and no offset expected")
        entries = self.rows
        if schema.symbols(part.shape):
            starts = (
                np.frombuffer(array.buffers()[1] or b"", np.int64, self.rows + 1)
                if self.rows
                else np.zeros(1, np.int64)
            )
            array = array.values
            entries = len(array)
            if starts[0] != 0 or starts[-1] != entries or (starts[1:] < starts[:-1]).any():
                raise StoreCorrupt(f"{where}: starts must rise from 0 to {entries}")
        width = schema.entry_width(part.shape)
        data = array.buffers()[-1]
        if entries * width * part.numpy_dtype.itemsize > (data.size if data else 0):
            raise StoreCorrupt(
                f"{where}: {entries} entries need {entries * part.entry_bytes} bytes; got {data and data.size}"
            )
        if array.offset or array.null_count:
            raise StoreCorrupt(f"{where}: no nulls and no offset expected")
        if data is not None and not self._base <= data.address <= self._base + self.bytes:
            raise StoreCorrupt(f"{where}: buffers must lie in the file as they are; these are compressed")
        if not entries:
            return np.zeros((0, width), part.numpy_dtype), starts
        return np.frombuffer(data, part.numpy_dtype, entries * width).reshape(entries, width), starts


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Equal but for names and nullability of list items, which other writers choose otherwise."""
    for kind in (pa.types.is_large_list, pa.types.is_fixed_size_list):
        if kind(expected):
            same_size = (
                not pa.types.is_fixed_size_list(expected) or found.list_size == expected.list_size
                if kind(found)
                else False
            )
            return same_size and _same_type(found.value_type, expected.value_type)
    return found.equals(expected)


def _read_metadata(path: Path, found: Mapping[bytes, bytes]) -> tuple[list[FieldSpec], dict[str, Any], str]:
    try:
        version = int(found[b"predistill.format_version"])
        schema.check_version(version, str(path))
        fields = [FieldSpec.from_json(one) for one in json.loads(found[b"predistill.fields"])]
        place = json.loads(found[b"predistill.shard"])
        return fields, place, found[b"predistill.fingerprint"].decode()
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"{path}: its schema metadata does not describe a shard ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def fsync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
