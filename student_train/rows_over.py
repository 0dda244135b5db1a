"""Rows that are made of other rows as they are read."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class RowsOver:
    """Rows that are other `rows` with something made, or replaced, as they are read; `_batch` says what."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if isinstance(index, int | np.integer):
            return {name: values[0] for name, values in self[[int(index)]].items()}
        return self._batch(np.arange(len(self))[index])

    def __getitems__(self, keys: Sequence[int]) -> dict[str, Any]:
        return self[list(keys)]

    def column(self, name: str) -> Any:
        return self.rows.column(name)

    def _batch(self, chosen: np.ndarray) -> dict[str, Any]:
        """chosen: int64 [B], numbers of rows."""
        raise NotImplementedError


def numbered(
    rows: Any, indices: Iterable[Sequence[int]], **reading: Any
) -> Generator[tuple[dict[str, Any], np.ndarray]]:
    """`rows.batches(indices)`, each batch with the numbers of its rows, int64 [B]."""
    asked: deque[Sequence[int]] = deque()  # filled by the reader's thread, ahead of what is read here

    def noted() -> Iterator[Sequence[int]]:
        for chosen in indices:
            asked.append(chosen)
            yield chosen

    with contextlib.closing(rows.batches(noted(), **reading)) as batches:
        for batch in batches:
            yield batch, np.asarray(asked.popleft(), np.int64)
