"""Which rows stand in which batch: deterministic under seed, epoch and rank, whatever reads them.

A *global* batch is what all ranks take together: `batch_size * world_size` rows. Rank r takes rows r, r + W,
r + 2W … of it, so that one rank with twice the batch sees the same global batches as two ranks. A last, smaller
global batch is divided evenly too; only when it has fewer rows than there are ranks are some repeated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler

MEGABATCH = 50  # global batches that are sorted by length together
CHUNK_BYTES = 64 * 2**20  # of neighbouring rows that a window takes together: one sequential read


class TrainBatchSampler(Sampler[list[int]]):
    """Batches of row numbers for training, for one rank.

    rows: how many rows there are, numbered 0 … rows-1 in source order.
    batch_size: rows a rank and micro-batch.
    lengths: int [rows] tokens of each row; given, rows of like length share a batch (less padding).
    order: "random" or "sequential".
    window: (rows a window, rows a chunk): shuffle inside windows of random chunks, so that at most a window's
        rows need be in the page cache at once; None shuffles everything.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        lengths: np.ndarray | None = None,
        order: str = "random",
        window: tuple[int, int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.rows, self.batch_size, self.lengths = rows, batch_size, lengths
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
        order = self._row_order(generator)
        if self.lengths is not None and self.order == "random":
            order = group_by_length(order, self.lengths, size, generator)
        for number in range(len(self)):
            batch = order[number * size : (number + 1) * size]
            if len(batch) < self.world_size:
                batch = np.resize(np.concatenate([batch, order]), self.world_size)
            yield batch[self.rank :: self.world_size].tolist()

    def _row_order(self, generator: np.random.Generator) -> np.ndarray:
        if self.order == "sequential":
            return np.arange(self.rows)
        if self.window is None:
            return generator.permutation(self.rows)
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


def shuffle_in_windows(rows: int, window_rows: int, chunk_rows: int, generator: np.random.Generator) -> np.ndarray:
    """A permutation of `rows`, window by window; a window is a random set of chunks of neighbours."""
    chunk_rows = max(1, min(chunk_rows, window_rows))
    chunks = generator.permutation(-(-rows // chunk_rows))
    per_window = max(1, window_rows // chunk_rows)
    order = []
    for first in range(0, len(chunks), per_window):
        starts = chunks[first : first + per_window, None] * chunk_rows
        window = (starts + np.arange(chunk_rows)).ravel()
        order.append(generator.permutation(window[window < rows]))
    return np.concatenate(order) if order else np.arange(0)


def group_by_length(order: np.ndarray, lengths: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Sort runs of MEGABATCH global batches by length, then mix the batches of each run.

    The very first batch holds the longest row of all (when memory runs out it does so at once), and a smaller
    last batch stays last.
    """
    runs = []
    for start in range(0, len(order), MEGABATCH * size):
        run = order[start : start + MEGABATCH * size]
        run = run[np.argsort(-lengths[run], kind="stable")]
        whole = len(run) // size * size
        batches = generator.permutation(run[:whole].reshape(-1, size), axis=0)
        runs.append(np.concatenate([batches.ravel(), run[whole:]]))
    grouped = np.concatenate(runs) if runs else order
    whole = len(grouped) // size * size
    if whole:
        longest = int(np.argmax(lengths[grouped[:whole]])) // size * size
        first = grouped[longest : longest + size].copy()
        grouped[longest : longest + size] = grouped[:size]
        grouped[:size] = first
    return grouped


def window_of(shuffle: str, nbytes: int, rows: int, held: int) -> tuple[int, int] | None:
    """(rows a window, rows a chunk) for rows of `nbytes` together; None where memory holds them: `held` bytes."""
    if shuffle == "global" or (shuffle == "auto" and nbytes <= held) or not rows:
        return None
    row_bytes = max(1, nbytes // rows)
    return max(1, held // row_bytes), max(1, CHUNK_BYTES // row_bytes)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return found
