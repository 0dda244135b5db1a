"""Every row looked at once, before the teacher runs: bad rows are found in seconds, and the data gets its hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..store.identity import digest
from .data import SourceData, check_columns, slices
from .tasks import Task


@dataclass(frozen=True)
class Survey:
    """rows_sha256: of the used columns' values in order, whatever their chunks, files or integer widths.

    carried_bytes: of the columns that are kept, a row on average.
    """

    rows_sha256: str
    carried_bytes: float


def survey(source: SourceData, task: Task, kept: list[str]) -> Survey:
    """Raises DataError for the first row that cannot be used."""
    columns = list(dict.fromkeys([*task.columns, *kept]))
    check_columns(source, kept)
    hashes, carried = {}, 0
    for split, rows in source.splits.items():
        state = RowsHash()
        for start, table in slices(rows, columns):
            task.check(split, start, table)
            state.update(table)
            carried += table.select(kept).nbytes
        hashes[split] = {"rows": len(rows), "values": state.hexdigest()}
    return Survey(digest(hashes), carried / max(source.rows, 1))


class RowsHash:
    """sha256 of columns of any Arrow type, taken a slice at a time; how rows are cut into slices does not matter.

    A column is hashed as flat streams: which values are there, the lengths of strings and lists, and the bytes of the
    values that are there (whole numbers as int64, real ones as float64).
    """

    def __init__(self) -> None:
        self._streams: dict[str, hashlib._Hash] = {}

    def update(self, table: pa.Table) -> None:
        for name in table.column_names:
            for chunk in table.column(name).chunks:
                self._add(name, chunk)

    def hexdigest(self) -> str:
        return digest({path: stream.hexdigest() for path, stream in self._streams.items()})

    def copy(self) -> RowsHash:
        made = RowsHash()
        made._streams = {path: stream.copy() for path, stream in self._streams.items()}
        return made

    def _feed(self, path: str, data: np.ndarray | memoryview | bytes) -> None:
        stream = self._streams.setdefault(path, hashlib.sha256())
        stream.update(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data)

    def _add(self, path: str, array: pa.Array) -> None:
        array = _plain(array)
        self._feed(f"{path}:there", np.asarray(array.is_valid()).astype(np.uint8))
        there, kind = array.drop_null(), array.type
        if pa.types.is_large_binary(kind):
            self._feed(f"{path}:lengths", np.asarray(pc.binary_length(there)).astype(np.int64))
            self._feed(f"{path}:bytes", _bytes(there))
        elif pa.types.is_struct(kind):
            for at, child in enumerate(there.flatten()):
                self._add(f"{path}.{kind.field(at).name}", child)
        elif hasattr(kind, "value_type"):
            self._feed(f"{path}:lengths", np.asarray(pc.list_value_length(there)).astype(np.int64))
            self._add(f"{path}[]", there.flatten())
        elif pa.types.is_int64(kind) or pa.types.is_float64(kind):
            self._feed(f"{path}:{kind}", np.asarray(there))
        elif not pa.types.is_null(kind):
            for value in there.to_pylist():
                self._feed(f"{path}:json", json.dumps(value, default=str).encode() + b"\n")


def _plain(array: pa.Array) -> pa.Array:
    """The same values in the widest type of their kind, so that storage types do not matter."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_map(kind):
        return array.cast(pa.large_list(pa.struct([kind.key_field, kind.item_field])))
    if pa.types.is_string(kind) or pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.large_string()).view(pa.large_binary())
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return array.cast(pa.large_binary())
    if pa.types.is_boolean(kind) or (pa.types.is_integer(kind) and not pa.types.is_uint64(kind)):
        return array.cast(pa.int64())
    return array.cast(pa.float64()) if pa.types.is_floating(kind) else array


def _bytes(array: pa.Array) -> memoryview | bytes:
    """The values of a large_binary array without nulls, one after another."""
    _, offsets, data = array.buffers()
    if data is None or not len(array):
        return b""
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]]
