"""One thread ahead: batches gathered into reused memory while the caller works, cold pages asked for before that.

Hand-overs between threads cost 10-20 us, so small batches travel in chunks of about 1 MB. A chunk's pages are asked
for (`posix_fadvise(WILLNEED)`) 32 MB before it is gathered, and only where a probe finds them cold: asking costs a
third of the speed when they are warm.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from .gather import Allocate, Gather, Slot
from .rows import row_ranges

CHUNK_BYTES = 1 << 20  # more in flight falls out of the cache: 16 MB was 1.4 times slower on 60 KB rows
CHUNK_BATCHES = 256
AHEAD_BYTES = 32 << 20  # asked for before they are gathered: a disk needs many requests at once to reach its speed
_PROBES = 4  # pages looked at before a chunk is taken to be warm
_LONGEST_REST = 64  # chunks that are not probed after a run of warm ones
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


Indices = Sequence[int] | np.ndarray


class _End:
    def __init__(self, error: BaseException | None = None):
        self.error = error


class _Chunk(NamedTuple):
    """sample_ids of some batches together, and where each begins and ends among them."""

    rows: np.ndarray
    cuts: list[tuple[int, int]]


class Prefetcher:
    """Iterates over batches, in order.

    paths: shard -> its file. batches: index lists. resolve: indices -> sample_ids, int64. buffers: memory for so many
    batches, one of them being filled: a batch is valid until buffers - 1 more were taken. Closing the iterator stops
    the thread; an error in the thread is raised at the next batch.
    """

    def __init__(
        self,
        gather: Gather,
        paths: Callable[[int], str],
        batches: Iterable[Indices],
        resolve: Callable[[Indices], np.ndarray],
        row_bytes: float,
        buffers: int,
        allocate: Allocate,
    ):
        self._gather, self._paths = gather, paths
        self._valid, self._row_bytes = max(buffers - 1, 1), max(row_bytes, 1.0)
        self._source, self._resolve = iter(batches), resolve
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._free: SimpleQueue[list[Slot] | None] = SimpleQueue()
        self._allocate = allocate
        for _ in range(max(buffers, 2)):
            self._free.put([])
        self._rest, self._resting = 0, 0  # chunks not to probe: doubled by each warm one, none after a cold one
        self._ahead, self._most = 1, 1  # chunks asked for ahead while pages are cold; batches a chunk, doubled from 1
        self._stop = threading.Event()
        self._generator = np.random.default_rng(0)  # which pages to probe; never which rows to read
        self._thread = threading.Thread(target=self._work, name="predistill-prefetch", daemon=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._thread.start()
        held: deque[tuple[int, list[Slot]]] = deque()  # (number of batches up to the chunk's end, its memory)
        taken = 0
        try:
            while True:
                chunk = self._ready.get()
                if isinstance(chunk, _End):
                    if chunk.error is not None:
                        raise chunk.error
                    return
                batches, slots = chunk
                held.append((taken + len(batches), slots))
                for batch in batches:
                    yield batch
                    taken += 1
                    while held and held[0][0] <= taken + 1 - self._valid:
                        self._free.put(held.popleft()[1])
        finally:
            self._stop.set()
            self._free.put(None)
            self._thread.join()

    def _work(self) -> None:
        try:
            ahead: deque[_Chunk] = deque()
            while not self._stop.is_set():
                while len(ahead) <= self._ahead and (chunk := self._next_chunk()) is not None:
                    self._ask_for(chunk)
                    ahead.append(chunk)
                if not ahead:
                    break
                slots = self._free.get()
                if slots is None:
                    return
                self._ready.put((self._gather_chunk(ahead.popleft(), slots), slots))
            self._ready.put(_End())
        except BaseException as error:  # handed to the caller at its next batch
            self._ready.put(_End(error))

    def _next_chunk(self) -> _Chunk | None:
        lists: list[Indices] = []
        size = 0.0
        for batch in self._source:
            lists.append(batch)
            size += len(batch) * self._row_bytes
            if size >= CHUNK_BYTES or len(lists) >= self._most:
                break
        if not lists:
            return None
        self._most = min(2 * self._most, CHUNK_BATCHES)
        together = np.concatenate([np.asarray(one) for one in lists]) if len(lists) > 1 else lists[0]
        ends = np.cumsum([len(one) for one in lists]).tolist()
        return _Chunk(self._resolve(together), list(zip([0, *ends], ends, strict=False)))

    def _gather_chunk(self, chunk: _Chunk, slots: list[Slot]) -> list[dict[str, Any]]:
        """Fixed-size rows of a whole chunk are one gather, cut afterwards; ragged ones pad batch by batch."""
        together = not self._gather.ragged and len(chunk.cuts) > 1
        while len(slots) < (1 if together else len(chunk.cuts)):
            slots.append(Slot(self._allocate))
        if not together:
            return [
                self._gather.batch(chunk.rows[begin:end], slot)
                for (begin, end), slot in zip(chunk.cuts, slots, strict=False)
            ]
        items = list(self._gather.batch(chunk.rows, slots[0]).items())
        return [{name: values[begin:end] for name, values in items} for begin, end in chunk.cuts]

    def _ask_for(self, chunk: _Chunk) -> None:
        """Ask for a chunk's pages where a probe finds them cold."""
        if self._resting > 0 or not hasattr(os, "posix_fadvise"):
            self._resting -= 1
            return
        ranges = row_ranges(self._gather, chunk.rows)
        if any(_is_cold(self._paths(shard), found) for shard, found in self._sample(ranges)):
            self._rest = self._resting = 0
            self._ahead = max(1, min(int(AHEAD_BYTES / (len(chunk.rows) * self._row_bytes + 1)), CHUNK_BATCHES))
            for shard, found in ranges.items():
                advise(self._paths(shard), found)
        else:
            self._ahead = 1
            self._rest = self._resting = min(max(1, 2 * self._rest), _LONGEST_REST)

    def _sample(self, ranges: Mapping[int, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        shards = list(ranges)
        for at in self._generator.integers(0, len(shards), _PROBES if shards else 0).tolist():
            found = ranges[shards[at]]
            yield shards[at], found[self._generator.integers(0, len(found), 1)]


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
