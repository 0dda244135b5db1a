"""Where the encoded files of a store of images are."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..addresses import addresses
from ..errors import StoreCorrupt
from ..reader import TeacherRows
from .pixels import IMAGE


class _Places(NamedTuple):
    """source: int64 [N], each row's source_index; split: int16 [N], the number of its split. images: of each split the
    numbers of its images, ascending, and the rows that have their files."""

    source: np.ndarray
    split: np.ndarray
    images: list[tuple[np.ndarray, np.ndarray]]


class Files:
    """Where the encoded file of each image of a store is, or of another column: in the row of its first view, which is
    view 0 but where that was dropped. Rows are found by their addresses: a shard need not have all that it planned."""

    def __init__(self, store: Any, column: str = IMAGE) -> None:
        whole, self._column = range(int(store.first_row[-1])), column
        self.rows = TeacherRows(store, whole, [store.fields[column]], None)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def of(self, sample_ids: np.ndarray, source_index: np.ndarray | None = None) -> list[bytes]:
        """The files of these rows; given `source_index`, of the images of these numbers in the rows' own splits."""
        if not len(sample_ids):
            return []
        places = self._places
        wanted = places.source[sample_ids] if source_index is None else source_index
        splits, found = places.split[sample_ids], np.empty(len(sample_ids), np.int64)
        for split in np.unique(splits):
            mine, (numbers, holders) = splits == split, places.images[split]
            at = np.searchsorted(numbers, wanted[mine]).clip(max=len(numbers) - 1)
            if (numbers[at] != wanted[mine]).any():
                raise StoreCorrupt(f"{self.rows.store.path}: a row asks for an image that its split does not have")
            found[mine] = holders[at]
        return self.rows[found][self._column]

    @functools.cached_property
    def _places(self) -> _Places:
        store = self.rows.store
        total = int(store.first_row[-1])
        made = _Places(np.zeros(total, np.int64), np.zeros(total, np.int16), [])
        for number, split in enumerate(store.splits):
            rows = addresses(store, split)
            made.source[rows.sample_ids], made.split[rows.sample_ids] = rows.source_index, number
            order = np.lexsort((rows.view, rows.source_index))
            numbers, at = np.unique(rows.source_index[order], return_index=True)
            made.images.append((numbers, rows.sample_ids[order[at]]))
        return made
