"""Rows of a store of images with their pixels, rebuilt: `pixel_values`, float32 [B, C, H, W], equal to the teacher's.
Of images with masks, `labels` too: int64 [B, H, W].

The encoded file of an image stands in the row of its view 0; a row of another view has only what was drawn for it, and
so has a row that another image is mixed into. Both files are looked up by (split, source_index). Pixels are made in
threads, a batch ahead of the one that is trained on.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ...store.images.files import Files
from ...store.images.pixels import IMAGE, MASK, PIXEL_VALUES, Processing, replay, replay_masks
from ...store.images.views import VIEW_FIELDS, VIEW_MIX_WITH, mixed
from ...store.reader import TeacherRows
from ...store.schema import LABELS, MISSING_LABEL
from ..rows_over import RowsOver, numbered

VIEWS = [spec.name for spec in VIEW_FIELDS]
IGNORED = 255  # of masks, where the store does not say
MOST_THREADS = 8
LEAST_ROWS = 8  # of a thread: handing over costs as much as decoding a small image


class PixelRows(RowsOver):
    """Rows of images as a student takes them: pixels in place of files and views. Safe to pickle and to fork.

    fields, stored: as TeacherRows.with_fields takes them.
    """

    def __init__(self, rows: TeacherRows, fields: Sequence[str] | None = None, stored: Sequence[str] = ()) -> None:
        if fields is None:
            fields, stored = [spec.name for spec in rows.specs], tuple(rows.stored)
        wanted = [*(name for name in fields if name not in (IMAGE, MASK)), *VIEWS]
        self.store, self.rows = rows.store, rows.with_fields(wanted, stored)
        self.sample_ids = rows.sample_ids
        self.files = Files(rows.store)
        self.masks = Files(rows.store, MASK) if MASK in rows.store.fields else None
        self._ignored = rows.store.settings.get("ignore_index", IGNORED)
        self.processing = Processing.from_json(rows.store.settings["processing"])
        self.lengths = np.broadcast_to(np.int64(1), len(rows))  # all are of one size

    def narrowed(self, fields: Sequence[str], stored: Sequence[str] = ()) -> PixelRows:
        return PixelRows(self.rows, fields, stored)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.files.nbytes

    def batches(self, indices: Iterable[Sequence[int]], buffers: int = 2, **reading: Any) -> Iterator[dict[str, Any]]:
        """As TeacherRows.batches; of pixels the caller owns the arrays."""
        ahead: deque[tuple[dict[str, Any], list[Future[dict[str, np.ndarray]]]]] = deque()
        threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0))))
        with (
            ThreadPoolExecutor(threads, "predistill-pixels") as pool,
            contextlib.closing(numbered(self.rows, indices, buffers=buffers + 1, **reading)) as found,
        ):
            for batch, chosen in found:
                ahead.append((batch, self._begun(pool, threads, batch, chosen)))
                if len(ahead) > 1:
                    yield self._ended(*ahead.popleft())
            if ahead:
                yield self._ended(*ahead.popleft())

    def _batch(self, chosen: np.ndarray) -> dict[str, Any]:
        batch = self.rows[chosen]
        return self._replaced(batch, [self._made(batch, chosen)])

    def _begun(
        self, pool: ThreadPoolExecutor, threads: int, batch: Mapping[str, Any], chosen: np.ndarray
    ) -> list[Future[dict[str, np.ndarray]]]:
        pieces = max(1, min(threads, len(chosen) // LEAST_ROWS))
        made = []
        for rows in np.array_split(np.arange(len(chosen)), pieces):
            views = {name: batch[name][rows] for name in VIEWS if name in batch}  # copies
            made.append(pool.submit(self._made, views, chosen[rows]))
        return made

    def _ended(self, batch: Mapping[str, Any], made: list[Future[dict[str, np.ndarray]]]) -> dict[str, Any]:
        return self._replaced(batch, [one.result() for one in made])

    def _replaced(self, batch: Mapping[str, Any], made: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """made: of pieces of the batch, one after another."""
        pixels = made[0] if len(made) == 1 else {name: np.concatenate([one[name] for one in made]) for name in made[0]}
        kept = {name: values for name, values in batch.items() if name not in VIEWS}
        return {**pixels, **kept}

    def _made(self, views: Mapping[str, Any], chosen: np.ndarray) -> dict[str, np.ndarray]:
        """pixel_values float32 [B, C, H, W]; of images with masks labels int64 [B, H, W], -100 where there is none."""
        views = {name: views[name] for name in VIEWS if name in views}
        ids, partners = self.sample_ids[chosen], [b""] * len(chosen)
        if VIEW_MIX_WITH in views:
            places = np.flatnonzero(mixed(views))
            for at, file in zip(places, self.files.of(ids[places], views[VIEW_MIX_WITH][places]), strict=True):
                partners[at] = file
        made = {PIXEL_VALUES: replay(self.files.of(ids), partners, views, self.processing).numpy()}
        if self.masks is not None:
            made[LABELS] = self._labels(self.masks.of(ids), views)
        return made

    def _labels(self, masks: Sequence[bytes], views: Mapping[str, Any]) -> np.ndarray:
        """int64 [B, H, W]; -100 for pixels of the ignored class, and for all of an image without a mask."""
        labels = np.full((len(masks), *self.processing.output), MISSING_LABEL, np.int64)
        there = np.flatnonzero([len(one) > 0 for one in masks])
        if len(there):
            own = {name: values[there] for name, values in views.items()}
            found = replay_masks([masks[at] for at in there.tolist()], own, self.processing)
            void = IGNORED if self.processing.reduce_labels else self._ignored
            labels[there] = np.where((found == void) | (found == self._ignored), MISSING_LABEL, found)
        return labels
