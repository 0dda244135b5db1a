"""The memory of a shard that is being filled: where each row's values go, in whatever order batches come."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from . import schema
from .codecs import Part


class Memory:
    """Large buffers, kept from shard to shard: memory touched for the first time costs more than the copy into it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()  # shards are opened in one thread and committed in another

    def take(self, size: int) -> np.ndarray:
        """uint8 [>= size], uncleared: the smallest kept buffer that fits well, or a new one."""
        with self._lock:
            fitting = [at for at, buffer in enumerate(self._free) if size <= buffer.size <= 2 * size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda at: self._free[at].size))
        return np.empty(size + size // 8, np.uint8)

    def give(self, buffers: list[np.ndarray]) -> None:
        """Take back what one shard used; what it left unused is let go."""
        with self._lock:
            self._free = buffers


class Buffer:
    """The values of one part, in place, and where each row starts."""

    def __init__(self, part: Part, lengths: Mapping[str, np.ndarray], rows: int, memory: Memory):
        self.part, self.rows = part, rows
        counts = schema.entries_per_row(part.shape, lengths)
        self.starts: np.ndarray | None = None
        if schema.symbols(part.shape):
            self.starts = np.zeros(rows + 1, np.int64)
            np.cumsum(counts, out=self.starts[1:])
        entries = rows if self.starts is None else int(self.starts[-1])
        width, dtype = schema.entry_width(part.shape), part.numpy_dtype
        self.memory = memory.take(entries * width * dtype.itemsize)
        self.values = np.ndarray((entries, width), dtype, self.memory)

    def place(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Values of these rows, one after another; of their entries, where rows are lists."""
        entries = rows if self.starts is None else entries_of(self.starts, rows)
        self.values[entries] = values.reshape(len(entries), -1)

    def to_arrow(self) -> pa.Array:
        kind = schema.array_type(self.part.shape, self.part.dtype)
        if self.starts is None:
            return leaf(kind, self.values)
        return _list(kind, self.starts, leaf(kind.value_type, self.values))


class RaggedBuffer:
    """A part of a field with a "K": how long its rows are is known only once the teacher has spoken, so pieces are
    kept as they come and put in order at the end."""

    def __init__(self, part: Part, rows: int):
        self.part, self.totals = part, np.zeros(rows, np.int64)
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []

    def place(self, rows: np.ndarray, lengths: np.ndarray, counts: np.ndarray, values: np.ndarray) -> None:
        """rows [B] of `lengths` positions each; counts [sum of lengths] entries; values [sum of lengths, most]."""
        sizes = self.part.sizes(counts)
        owner = np.repeat(np.arange(len(rows)), lengths)
        self.totals[rows] = np.bincount(owner, sizes, len(rows)).astype(np.int64)
        self._pieces.append((rows, values[np.arange(values.shape[1]) < sizes[:, None]]))

    def to_arrow(self) -> pa.Array:
        starts = np.zeros(len(self.totals) + 1, np.int64)
        np.cumsum(self.totals, out=starts[1:])
        values = np.empty(starts[-1], self.part.numpy_dtype)
        while self._pieces:  # each is let go once it is copied
            rows, piece = self._pieces.pop()
            values[entries_of(starts, rows)] = piece
        kind = schema.array_type(self.part.shape, self.part.dtype)
        return _list(kind, starts, leaf(kind.value_type, values.reshape(-1, 1)))


def entries_of(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64: where the entries of these rows stand, one row after another."""
    first, counts = starts[rows], starts[rows + 1] - starts[rows]
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum())


def _list(kind: pa.DataType, starts: np.ndarray, entries: pa.Array) -> pa.Array:
    return pa.Array.from_buffers(kind, len(starts) - 1, [None, pa.py_buffer(starts)], children=[entries])


def leaf(entry: pa.DataType, values: np.ndarray) -> pa.Array:
    """Array over `values` [N, width] without a copy: primitive, or a fixed-size list of primitives."""
    data = pa.py_buffer(values)
    if not pa.types.is_fixed_size_list(entry):
        return pa.Array.from_buffers(entry, len(values), [None, data])
    child = pa.Array.from_buffers(entry.value_type, values.size, [None, data])
    return pa.Array.from_buffers(entry, len(values), [None], children=[child])
