"""The yardstick of every reading benchmark: rows of one memory-mapped file, copied into one reused packed
buffer.

No format, no padding, no names, no thread: what is left is page tables and copying. Rows of one size are
one `np.take` a batch with a preallocated result; rows of their own sizes are one slice copy each. Both
idioms are timed for wide rows of one size and the faster is the limit (`best_of` in reader.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def aligned(size: int) -> np.ndarray:
    """uint8 [size] that starts on a page: where rows of whole pages are copied 16 bytes past one (numpy's own
    alignment), `rep movsb` takes six times as long, and the limit would flatter the store."""
    memory = np.empty(size + 4096, np.uint8)
    return memory[-memory.ctypes.data % 4096 :][:size]


class PlainRows:
    """A file of rows, one after another; starts: int64 [rows + 1], in bytes."""

    def __init__(self, path: Path, starts: np.ndarray, largest_batch: int):
        self._bytes = np.asarray(np.memmap(path, np.uint8, "r"))
        self._starts = starts
        sizes = np.diff(starts)
        self.same_size = bool((sizes == sizes[0]).all())
        self._buffer = aligned(largest_batch * int(sizes.max()))
        if self.same_size:
            item = np.dtype(np.float32) if sizes[0] % 4 == 0 else np.dtype(np.uint8)
            self._rows = self._bytes.view(item).reshape(len(sizes), -1)
            self._packed = self._buffer.view(item).reshape(largest_batch, -1)

    def take(self, batches: Iterable[np.ndarray]) -> None:
        """One np.take a batch; `clip` because numpy otherwise buffers `out`."""
        rows, packed = self._rows, self._packed
        for batch in batches:
            np.take(rows, batch, axis=0, out=packed[: len(batch)], mode="clip")

    def copy(self, batches: Iterable[np.ndarray]) -> None:
        """One slice copy a row."""
        source, target, starts = self._bytes, self._buffer, self._starts
        for batch in batches:
            place = 0
            for begin, end in zip(starts[batch].tolist(), starts[batch + 1].tolist(), strict=True):
                target[place : place + end - begin] = source[begin:end]
                place += end - begin
