"""A shard of the memory map: its buffers as numpy arrays, checked before they are trusted."""

from __future__ import annotations

import copy
import errno
import functools
import json
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from . import schema
from .codecs import STORED_AS, Part
from .errors import StoreCorrupt, StoreError
from .schema import FieldSpec

MOST = 4096  # shards that stay mapped; Linux gives a process 65,530 maps, and one costs 16 KB of heap besides
Value = TypeVar("Value")
UNREADABLE = (  # types that Arrow has no kernel for, times past the year 9999, unknown zones; Arrow's errors are these
    ArithmeticError, ValueError, LookupError, TypeError, NotImplementedError, RecursionError,
)  # fmt: skip
_NO_MAPS = tuple(os.strerror(code) for code in (errno.ENOMEM, errno.EMFILE, errno.ENFILE))


def recent(open_shard: Callable[[int], MappedShard]) -> functools._lru_cache_wrapper[MappedShard]:
    """A store's method, by shard number, with the MOST results that were asked for last. It does not keep its store
    alive: who drops a store without closing it closes its index too."""
    method = weakref.WeakMethod(open_shard)

    def opened(shard: int) -> MappedShard:
        bound = method()
        assert bound is not None, "called by its own store"
        return bound(shard)

    return functools.lru_cache(MOST)(opened)


class MappedShard:
    """One shard, memory-mapped and read-only; every array is a view of the file.

    Raises StoreCorrupt where the file is not a shard, or says lengths and offsets that its buffers do not have;
    StoreError where this process has too many files mapped, or open.
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
            if isinstance(error, OSError) and any(reason in str(error) for reason in _NO_MAPS):
                raise StoreError(
                    f"{path} cannot be mapped beside all that this process has mapped ({_one_line(error)}): the shard "
                    "is sound; read fewer shards at once, or raise vm.max_map_count or ulimit -n"
                ) from error
            raise StoreCorrupt(
                f"{path} is not a readable shard ({_one_line(error)}): delete it and its .json, "
                "then run the same dump again"
            ) from error
        self.rows, self._checked = self.batch.num_rows, set[str]()
        self.fields, self.place, self.fingerprint = _read_metadata(path, self.batch.schema.metadata or {})

    def by_names(self, stored: Mapping[str, str]) -> MappedShard:
        """The same map with these columns alone: {name: stored name}."""
        columns = {name: self._array(one) for name, one in stored.items()}
        kinds = [self.batch.schema.field(one).with_name(name) for name, one in stored.items()]
        found = copy.copy(self)
        found.batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(kinds))
        found.names, found._checked = list(columns), set()
        return found

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

    def as_python(self, name: str, convert: Callable[[], Value]) -> Value:
        """What `convert` makes of a carried column. Raises StoreCorrupt where Python has no such values."""
        try:
            return convert()
        except UNREADABLE as error:
            kind = str(self._array(name).type).split("\n")[0][:100]  # a stranger's struct has names of any length
            raise StoreCorrupt(
                f"{self.path}: column {name} is {kind}, with values that Python cannot hold "
                f"({_one_line(error)}); read the other columns"
            ) from error

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
        if data is not None and entries and not self._base <= data.address <= self._base + self.bytes:
            raise StoreCorrupt(f"{where}: buffers must lie in the file as they are; these are compressed")
        if not entries:
            return np.zeros((0, width), part.numpy_dtype), starts
        return np.frombuffer(data, part.numpy_dtype, entries * width).reshape(entries, width), starts


def check_square(
    where: Path, spec: FieldSpec, part: Part, starts: np.ndarray, leaders: Mapping[Any, np.ndarray]
) -> None:
    """Does each row of a column like (H, "S", "S") hold the values that its tokens ask for? Raises StoreCorrupt.

    leaders: int64 [rows + 1], where rows of "S" and of "P" start.
    """
    unknown = next((symbol for symbol in schema.symbols(part.shape) if symbol not in leaders), None)
    if unknown is not None:
        raise StoreCorrupt(f"{where}: column {spec.name}: no column tells how long its rows are ({unknown})")
    lengths = {symbol: np.diff(own).astype(np.float64) for symbol, own in leaders.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # float64 is exact below 2**53, where int64 would wrap
        sizes: list[Any] = [lengths[size] if isinstance(size, str) else float(size) for size in part.shape]
        wanted: Any = math.prod(sizes)
    bad = np.diff(starts) != wanted
    if bad.any():
        row = int(bad.argmax())
        raise StoreCorrupt(
            f"{where}: column {spec.name}: row {row} holds {starts[row + 1] - starts[row]} values; "
            f"{wanted[row]:.0f} expected by its shape {spec.shape}"
        )


def counting(spec: FieldSpec, fields: Sequence[FieldSpec], where: object) -> FieldSpec:
    """The column that tells how many entries each position of a column with a "K" keeps. Raises StoreCorrupt."""
    name = spec.parameters["counts"]
    found = next((one for one in fields if one.name == name and one.shape == spec.shape[:1]), None)
    if found is None or found.codec != "dense" or found.pad:
        raise StoreCorrupt(f"{where}: column {spec.name} has no column of counts {name!r} beside it")
    if found.dtype in STORED_AS or not pa.types.is_integer(schema.ARROW_TYPES[found.dtype]):
        raise StoreCorrupt(f"{where}: counts of {spec.name} are whole numbers; {name} is {found.dtype}")
    return found


def check_counts(spec: FieldSpec, part: Part, counts: np.ndarray, held: int, where: object) -> None:
    """Raises StoreCorrupt unless each int64 count is one that a shard with `held` values of a part can have."""
    most = held * 8 // part.bits if part.bits else held
    if counts.size and not (counts.min() >= 0 and counts.max() <= most):
        raise StoreCorrupt(
            f"{where}: counts of {spec.name} are 0 to {most}, as many as are stored; "
            f"got {counts.min()} to {counts.max()}"
        )


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
        fields = _read_fields(found[b"predistill.fields"])
        place = json.loads(found[b"predistill.shard"])
        return fields, place, found[b"predistill.fingerprint"].decode()
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise StoreCorrupt(f"{path}: its schema metadata does not describe a shard ({_one_line(error)})") from error


@functools.lru_cache(64)
def _read_fields(text: bytes) -> list[FieldSpec]:
    """Of all shards of a store the same."""
    return [FieldSpec.from_json(one) for one in json.loads(text)]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
