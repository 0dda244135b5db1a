"""One thread ahead: batches gathered into reused memory while the caller works, cold pages asked for before that.

Hand-overs between threads cost 10-20 us, so small batches travel in chunks of about 4 MB. A chunk's pages are asked
for (`posix_fadvise(WILLNEED)`) while the chunk before it is gathered, and only where a probe finds them cold: asking
costs a third of the speed when they are warm.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from .gather import Allocate, Gather, Slot, row_ranges

CHUNK_BYTES = 4 << 20
CHUNK_BATCHES = 256
_PROBES = 4  # pages looked at before a chunk is taken to be warm
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class _End:
    def __init__(self, error: BaseException | None = None):
        self.error = error


class Prefetcher:
    """Iterates over batches of sample_ids, in order.

    batches: int64 arrays. buffers: how many batches stay valid at a time (the one last taken, and buffers - 1
    before it). Closing the iterator stops the thread; an error in the thread is raised at the next batch.
    """

    def __init__(
        self, gather: Gather, paths: Sequence[str], batches: Iterable[np.ndarray], row_bytes: float,
        buffers: int, allocate: Allocate,
    ):  # fmt: skip
        self._gather, self._paths, self._buffers, self._row_bytes = gather, paths, buffers, max(row_bytes, 1.0)
        self._source = iter(batches)
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._free: SimpleQueue[list[Slot] | None] = SimpleQueue()
        self._allocate = allocate
        for _ in range(max(buffers, 1) + 1):
            self._free.put([])
        self._stop = threading.Event()
        self._generator = np.random.default_rng(0)  # which pages to probe; never which rows to read
        self._thread = threading.Thread(target=self._work, name="predistill-prefetch", daemon=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._thread.start()
        held: deque[tuple[int, list[Slot]]] = deque()  # (number of the chunk's last batch, its memory)
        taken = 0
        try:
            while True:
                chunk = self._ready.get()
                if isinstance(chunk, _End):
                    if chunk.error is not None:
                        raise chunk.error
                    return
                batches, slots = chunk
                held.append((taken + len(batches) - 1, slots))
                for batch in batches:
                    while held and held[0][0] <= taken - self._buffers:
                        self._free.put(held.popleft()[1])
                    taken += 1
                    yield batch
        finally:
            self._stop.set()
            self._free.put(None)
            self._thread.join()

    def _work(self) -> None:
        try:
            following = self._next_chunk()
            while following and not self._stop.is_set():
                chunk, following = following, self._next_chunk()
                if following:
                    self._ask_for(following)
                slots = self._free.get()
                if slots is None:
                    return
                self._ready.put((self._gather_chunk(chunk, slots), slots))
            self._ready.put(_End())
        except BaseException as error:  # handed to the caller at its next batch
            self._ready.put(_End(error))

    def _next_chunk(self) -> list[np.ndarray]:
        chunk: list[np.ndarray] = []
        size = 0.0
        for batch in self._source:
            chunk.append(batch)
            size += len(batch) * self._row_bytes
            if size >= CHUNK_BYTES or len(chunk) >= CHUNK_BATCHES:
                break
        return chunk

    def _gather_chunk(self, chunk: list[np.ndarray], slots: list[Slot]) -> list[dict[str, Any]]:
        """Fixed-size rows of a whole chunk are one gather, cut afterwards; ragged ones pad batch by batch."""
        together = not self._gather.ragged and len(chunk) > 1
        while len(slots) < (1 if together else len(chunk)):
            slots.append(Slot(self._allocate))
        if not together:
            return [self._gather.batch(batch, slot) for batch, slot in zip(chunk, slots, strict=False)]
        whole = self._gather.batch(np.concatenate(chunk), slots[0])
        ends = np.cumsum([len(batch) for batch in chunk]).tolist()
        items = list(whole.items())
        return [{name: values[begin:end] for name, values in items} for begin, end in zip([0, *ends], ends, strict=False)]

    def _ask_for(self, chunk: list[np.ndarray]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        rows = np.concatenate(chunk)
        if not len(rows):
            return
        ranges = row_ranges(self._gather, rows)
        total = sum(len(found) for found in ranges.values())
        probes = set(self._generator.integers(0, total, _PROBES).tolist()) if total else set()
        cold, seen = False, 0
        for shard, found in ranges.items():
            picked = [at - seen for at in probes if seen <= at < seen + len(found)]
            seen += len(found)
            if picked and _is_cold(self._paths[shard], found[picked]):
                cold = True
                break
        if cold:
            for shard, found in ranges.items():
                advise(self._paths[shard], found)


def _is_cold(path: str, ranges: np.ndarray) -> bool:
    """Does any of these byte ranges [n, 2] start or end on a page that is not in memory?"""
    if not _NOWAIT:
        return True
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for begin, end in ranges.tolist():
            for at in (begin, end - 1):
                try:
                    os.preadv(descriptor, [bytearray(1)], at, _NOWAIT)
                except OSError as error:
                    return error.errno == errno.EAGAIN  # a file system without the flag keeps its pages in memory
        return False
    finally:
        os.close(descriptor)


def advise(path: str, ranges: np.ndarray) -> None:
    """Ask the kernel to read these byte ranges [n, 2] of a file in the background."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for begin, end in ranges.tolist():
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
