"""Which rows stand in which batch: deterministic under seed, epoch and rank, whatever reads them.

Orders are made a block of rows at a time, so that a billion rows need no memory (permutation.py).

A *global* batch is what all ranks take together: `batch_size * world_size` rows. Rank r takes rows r, r + W,
r + 2W … of it, so that one rank with twice the batch sees the same global batches as two ranks. A last, smaller
global batch is divided evenly too; only when it has fewer rows than there are ranks are some repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler

from ..store.mapped import MOST
from .permutation import BLOCK, pieces, shuffled

MEGABATCH = 50  # global batches that are sorted by length together
CHUNK_BYTES = 64 * 2**20  # of neighbouring rows that a window takes together: one sequential read
CHUNKS = (64, 2048)  # in a window: enough to mix, and fewer than shards stay mapped
Lengths = np.ndarray | Callable[[np.ndarray], np.ndarray]


class TrainBatchSampler(Sampler[list[int]]):
    """Batches of row numbers for training, for one rank.

    rows: how many rows there are, numbered 0 … rows-1 in source order.
    batch_size: rows a rank and micro-batch.
    lengths: int [rows] tokens of each row, or a function that tells those of some rows; given, rows of like length
        share a batch (less padding).
    longest: a row of the most tokens, which the very first batch holds: when memory runs out it does so at once. Where
        lengths are an array it is found in there.
    order: "random" or "sequential".
    window: (rows a window, rows a chunk): shuffle inside windows of random chunks, so that at most a window's
        rows need be in the page cache at once; None shuffles everything.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        lengths: Lengths | None = None,
        longest: int | None = None,
        order: str = "random",
        window: tuple[int, int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.lengths = rows, batch_size, lengths
        self.longest = int(np.argmax(lengths)) if isinstance(lengths, np.ndarray) and rows else longest
        self.order, self.window = order, window
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        return self.rows // size if self.drop_last else -(-self.rows // size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        size = self.batch_size * self.world_size
        runs = pieces(self._row_order(generator), MEGABATCH * size)
        if self.lengths is not None and self.order == "random":
            runs = group_by_length(runs, self.lengths, self.longest, size, generator)
        beginning = None
        for run in runs:
            beginning = run if beginning is None else beginning
            for start in range(0, len(run), size):
                batch = run[start : start + size]
                if len(batch) < size and self.drop_last:
                    return
                if len(batch) < self.world_size:
                    batch = np.resize(np.concatenate([batch, beginning]), self.world_size)
                yield batch[self.rank :: self.world_size].tolist()

    def _row_order(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        if self.order == "sequential":
            return (np.arange(start, min(start + BLOCK, self.rows)) for start in range(0, self.rows, BLOCK))
        if self.window is None:
            return shuffled(self.rows, generator)
        return shuffle_in_windows(self.rows, *self.window, generator)


class EvaluationBatchSampler(Sampler[list[int]]):
    """Rows in source order: gathered over ranks, the batches of all ranks are the rows one after another.

    Every rank takes as many rows of a global batch as the others; a last one that does not divide is filled
    with its own last row, which `real_rows` tells apart.
    """

    def __init__(self, rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.world_size
        for start in range(0, self.rows, size):
            stop = min(start + size, self.rows)
            share = -(-(stop - start) // self.world_size)
            mine = np.arange(start + self.rank * share, start + (self.rank + 1) * share)
            yield np.minimum(mine, stop - 1).tolist()

    def real_rows(self, number: int) -> tuple[int, int]:
        """Rows of batch `number` that are not filling: (over all ranks, in this rank's share)."""
        size = self.batch_size * self.world_size
        real = min(size, self.rows - number * size)
        share = -(-real // self.world_size)
        return real, min(max(real - self.rank * share, 0), share)


def shuffle_in_windows(
    rows: int, window_rows: int, chunk_rows: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """A permutation of `rows`, window by window; a window is a random set of chunks of neighbours."""
    chunk_rows = max(1, min(chunk_rows, window_rows))
    chunks = generator.permutation(-(-rows // chunk_rows))
    per_window = max(1, window_rows // chunk_rows)
    for first in range(0, len(chunks), per_window):
        window = chunks[first : first + per_window]
        for places in shuffled(len(window) * chunk_rows, generator):
            block = window[places // chunk_rows] * chunk_rows + places % chunk_rows
            yield block[block < rows]


def group_by_length(
    runs: Iterator[np.ndarray], lengths: Lengths, longest: int | None, size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Sort each run of MEGABATCH global batches by length, then mix its batches.

    The very first batch holds `longest`, which changes places with the first row, and a smaller last batch stays last.
    """
    first = None
    for run in runs:
        begins, first = first is None, run[0] if first is None else first
        if longest is not None:
            run = np.where(run == longest, first, run)
            run[0] = longest if begins else run[0]
        run = run[np.argsort(-(lengths(run) if callable(lengths) else lengths[run]), kind="stable")]
        whole = len(run) // size * size
        batches = generator.permutation(run[:whole].reshape(-1, size), axis=0)
        if begins and len(at := np.flatnonzero((batches == longest).any(1))):
            batches[[0, at[0]]] = batches[[at[0], 0]]
        yield np.concatenate([batches.ravel(), run[whole:]])


def window_of(shuffle: str, nbytes: int, rows: int, held: int, shards: int = 1) -> tuple[int, int] | None:
    """(rows a window, rows a chunk) for rows of `nbytes` together; None where memory holds them: `held` bytes, and no
    more shards than stay mapped: a row of one that does not costs 0.5 ms."""
    if shuffle == "auto" and shards > MOST:
        held = min(held, nbytes * MOST // (2 * shards))
    if shuffle == "global" or (shuffle == "auto" and nbytes <= held) or not rows:
        return None
    row_bytes = max(1, nbytes // rows)
    chunk = min(max(CHUNK_BYTES, held // CHUNKS[1]), held // CHUNKS[0])
    return max(1, held // row_bytes), max(1, chunk // row_bytes)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return found
