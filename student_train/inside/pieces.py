"""A batch a few rows at a time, rows of like length together, without the padding that only other rows need.

Losses of the inside make tensors as wide as the teacher and, for attention, of H S² numbers a row. Taken a piece at a
time they stay small, in a CPU's cache; and since a batch is padded to its longest row, most of what the whole would
compute of rows of 5 to 40 tokens is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """rows: int64, in any order; None: all. tokens: (first, end) of those that one of the rows has; None: all."""

    rows: Tensor | None = None
    tokens: tuple[int, int] | None = None

    def of(self, value: Tensor, axes: Sequence[int]) -> Tensor:
        """Of `value` [B, ...]; axes: those that are tokens."""
        value = self._cut(value, axes)
        return value if self.rows is None else value.index_select(0, self.rows)

    def add(self, total: Tensor, value: Tensor, axes: Sequence[int]) -> None:
        """To `total` [B, ...], in place, what belongs where `of` took it from."""
        total = self._cut(total, axes)
        if self.rows is None:
            total += value
        else:
            total.index_add_(0, self.rows, value)

    def _cut(self, value: Tensor, axes: Sequence[int]) -> Tensor:
        if self.tokens is not None:
            for axis in axes:
                value = value.narrow(axis, self.tokens[0], self.tokens[1] - self.tokens[0])
        return value


WHOLE = Piece()


class Pieces:
    """mask: [B, S], True (or not 0) at tokens, padded on either side; None: rows have none, or all as many."""

    def __init__(self, mask: Tensor | None, rows: int, device: torch.device) -> None:
        self._mask, self._rows, self._device = mask, rows, device

    def of(self, row_size: Callable[[int], int], most: int) -> Iterator[Piece]:
        """All rows, in pieces of at most `most` numbers, or of one row.

        row_size: tokens -> numbers that are made of a row; 0 where rows cannot be taken one after another.
        """
        if self._rows * row_size(0 if self._mask is None else self._mask.shape[1]) <= most:
            yield WHOLE
            return
        order = sorted(range(self._rows), key=lambda row: self._spans[row][1] - self._spans[row][0], reverse=True)
        while order:
            first, end = self._spans[order[0]]
            count = max(1, most // max(row_size(end - first), 1))
            rows, order = order[:count], order[count:]
            first, end = min(self._spans[row][0] for row in rows), max(self._spans[row][1] for row in rows)
            yield Piece(torch.tensor(rows, device=self._device), None if self._mask is None else (first, end))

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """Of each row, its first token and the place after its last; of one without any, all places."""
        if self._mask is None:
            return [(0, 0)] * self._rows
        mask = self._mask.bool().int()
        ends = mask.shape[1] - mask.flip(1).argmax(1)
        return list(zip(*torch.stack([mask.argmax(1), ends]).tolist(), strict=True))
