"""The loader that reads rows of a store in process, and rows of several stores as one.

Rows of `TeacherStore.select` are a map-style dataset as they are: `rows[7]` is a row, `rows[[4, 1]]` a batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..store.reader import TeacherRows
from .images.rows import PixelRows
from .sampler import EvaluationBatchSampler, TrainBatchSampler


def is_store_rows(dataset: Any) -> bool:
    """Does this dataset read whole batches by row number, as rows of a store do?"""
    return isinstance(dataset, TeacherRows) or (
        callable(getattr(dataset, "batches", None)) and hasattr(dataset, "lengths")
    )


def readable(rows: Any) -> Any:
    """Rows as a student takes them: of a store of images, with their pixels; others as they are."""
    is_images = isinstance(rows, TeacherRows) and "processing" in rows.store.settings
    return PixelRows(rows) if is_images else rows


def narrowed(rows: Any, fields: Sequence[str], stored: Sequence[str] = ()) -> Any:
    """The same rows with inputs, labels and those of `fields` that are in the store; no other column is read.

    stored: columns to be had as they are stored, not decoded.
    """
    rows = readable(rows)
    return rows.with_fields(fields, stored) if isinstance(rows, TeacherRows) else rows.narrowed(fields, stored)


def first_row(dataset: Any) -> Any:
    """One row as the collator takes it, of a store without teacher columns; of several datasets the first's."""
    dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    if is_store_rows(dataset):
        return narrowed(dataset, [])[[0]]
    return [dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))]


def longest(rows: Any) -> int:
    """Tokens of the longest row; a store of many shards knows it without opening them."""
    return rows.longest[1] if isinstance(rows, TeacherRows) else int(rows.lengths.max())


def by_length(rows: Any) -> dict[str, Any]:
    """What TrainBatchSampler is told so that rows of like length share a batch; a store's lengths are looked up as
    rows come up."""
    if isinstance(rows, TeacherRows):
        return {"lengths": rows.lengths_of, "longest": rows.longest[0]}
    return {"lengths": rows.lengths}


class StoreDataLoader(DataLoader):
    """Reads in process from `rows.batches` (reused buffers, one thread ahead) unless workers are asked for.

    held: batches that the training loop keeps at the same time (gradient_accumulation_steps): their buffers
        are not written to before that many more were taken.
    device: where batches are needed. On CUDA they are copied through pinned memory without blocking.
    evaluated: (rows over all ranks, rows of this rank) of the batch at hand that are not filling.
    """

    def __init__(
        self,
        rows: Any,
        batch_sampler: TrainBatchSampler | EvaluationBatchSampler,
        collate_fn: Callable[[Any], dict[str, torch.Tensor]],
        *,
        held: int = 1,
        device: torch.device | None = None,
        **workers: Any,
    ) -> None:
        super().__init__(rows, batch_sampler=batch_sampler, collate_fn=collate_fn, **workers)
        self.rows, self.held, self.device = rows, held, device
        self.evaluated = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, TrainBatchSampler):
            self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Any:
        batches = super().__iter__() if self.num_workers else self._read_in_process()
        return self._counted(batches) if isinstance(self.batch_sampler, EvaluationBatchSampler) else batches

    def _read_in_process(self) -> Iterator[dict[str, torch.Tensor]]:
        assert self.batch_sampler is not None and self.collate_fn is not None
        cuda = self.device is not None and self.device.type == "cuda"
        held, more = (self.held + 1, {"allocate": pinned}) if cuda else (self.held, {})
        with contextlib.closing(self.rows.batches(self.batch_sampler, buffers=held + 1, **more)) as batches:
            tensors = (self.collate_fn(batch) for batch in batches)
            yield from copied_ahead(tensors, self.device, held) if cuda else tensors

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        assert isinstance(self.batch_sampler, EvaluationBatchSampler)
        for number, batch in enumerate(batches):
            self.evaluated = self.batch_sampler.real_rows(number)
            yield batch


def pinned(size: int) -> np.ndarray:
    """uint8 [size] in page-locked memory, which CUDA copies from without blocking."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def gather_real(accelerator: Any, loader: StoreDataLoader, values: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks one after another, without those that only fill the last batch."""
    return accelerator.gather(values)[: loader.evaluated[0]]


def copied_ahead(
    batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device | None, held: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches on a CUDA device, copied without waiting; a copy has ended before its buffer is reused."""
    copies: deque[torch.cuda.Event] = deque()
    for batch in batches:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        copies.append(torch.cuda.Event())
        copies[-1].record()
        yield moved
        if len(copies) >= held:
            copies.popleft().synchronize()


class ConcatRows:
    """Rows of several stores, one after another: same task, tokenizer and columns, each its own teacher."""

    def __init__(self, parts: Sequence[Any], pads: Mapping[str, float] | None = None) -> None:
        self.parts, self.pads, self.store = list(parts), dict(pads or {}), parts[0].store
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.lengths = np.concatenate([part.lengths for part in self.parts])
        self.nbytes = sum(part.nbytes for part in self.parts)

    def narrowed(self, fields: Sequence[str], stored: Sequence[str] = ()) -> ConcatRows:
        """Columns that the stores keep in different ways are decoded."""
        specs = [part.store.fields for part in self.parts]
        alike = [name for name in stored if all(one.get(name) == specs[0].get(name) for one in specs)]
        return ConcatRows([narrowed(part, fields, alike) for part in self.parts], self.pads)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if isinstance(index, int | np.integer):
            part, row = self._address(np.asarray([index]))
            return self.parts[part[0]][int(row[0])]
        rows = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index, dtype=np.int64)
        return self._gather(rows)

    def __getitems__(self, keys: Sequence[int]) -> dict[str, Any]:
        return self._gather(np.asarray(keys, dtype=np.int64))

    def batches(self, indices: Iterable[Sequence[int]], buffers: int = 2, **_: Any) -> Iterator[dict[str, Any]]:
        """Arrays that the caller owns: any number of `buffers` is met by not reusing one."""
        return (self._gather(np.asarray(rows, dtype=np.int64)) for rows in indices)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([part.column(name) for part in self.parts])

    def _address(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.where(rows < 0, rows + len(self), rows)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        return part, rows - self.starts[part]

    def _gather(self, rows: np.ndarray) -> dict[str, Any]:
        part, local = self._address(rows)
        batch: dict[str, Any] = {}
        for number in np.unique(part):
            places = np.flatnonzero(part == number)
            for name, values in self.parts[number][local[places].tolist()].items():
                batch[name] = _place(batch.get(name), values, places, len(rows), self.pads.get(name, 0))
        return batch


def _place(target: np.ndarray | None, values: np.ndarray, places: np.ndarray, rows: int, pad: float) -> np.ndarray:
    """Rows of one store into their places of a batch, right-padded to the longer of both."""
    have = values.shape[1:] if target is None else target.shape[1:]
    shape = (rows, *(max(sizes) for sizes in zip(have, values.shape[1:], strict=True)))
    if target is None or target.shape != shape:
        wider = np.full(shape, pad, values.dtype)
        if target is not None:
            wider[tuple(slice(0, size) for size in target.shape)] = target
        target = wider
    own: tuple[Any, ...] = (places, *(slice(0, size) for size in values.shape[1:]))
    target[own] = values
    return target
