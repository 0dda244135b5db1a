"""Rows of images, as every task on images has them: files kept once, views drawn, pixels made ahead of the teacher.

B rows, C channels, H and W the size of the pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ...store import ConfigError, DataError, FieldSpec, content_hash
from ...store.images.pixels import IMAGE, PIXEL_HASH, Recipe, check, draw, image_size, pixel_hash, replay
from ...store.images.views import CROP, CUTMIX, FLIP, MIXUP, NOBODY, VIEW_FIELDS, VIEW_MIX_WITH, plain
from ..config import DumpConfig
from ..data import SourceData, read
from ..tasks import Samples
from ..teachers.images import ReadsImages
from .images import files, image_column

TRAIN = "train"  # the split of which there are views
_MOST_THREADS = 16
_MIXES = ("view_mix_with", "view_mix_with_crop", "view_mix_with_flip", "view_mix_ratio", "view_mix_box")


@dataclass
class ImageSamples(Samples):
    """files, partners, masks: encoded, a row, b"" where there is none. views: their view columns, {} in a store
    without. hashes: int64 [n], of the pixels of rows that were collated."""

    files: Sequence[bytes] = ()
    partners: Sequence[bytes] = ()
    masks: Sequence[bytes] = ()
    views: dict[str, np.ndarray] = field(default_factory=dict)
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    begun: dict[int, Future[np.ndarray]] = field(default_factory=dict)  # rows whose pixels are being made


class ImageRows:
    """The image column of a dataset. mixes: may another image be mixed in; taken: columns that are something else.

    views: by split, how many rows each image has. fields: of the inputs, in order. Raises ConfigError.
    """

    def __init__(self, config: DumpConfig, teacher: ReadsImages, source: SourceData, mixes: bool = True,
                 taken: Sequence[str] = ()):  # fmt: skip
        self.source, self.processing = source, teacher.processing
        self.column = image_column("--image-column", config.image_column, source.features, taken)
        self.recipe = _recipe(config, source, self.processing.output, mixes)
        many = config.views if self.recipe else 1
        self.views = {split: many if split == TRAIN else 1 for split in source.splits}
        drawn = [spec for spec in VIEW_FIELDS if mixes or spec.name not in _MIXES] if self.recipe else []
        self.fields = [
            FieldSpec(IMAGE, (), "binary", "bytes", role="input"), *drawn,
            FieldSpec(PIXEL_HASH, (), "int64", role="input"),
        ]  # fmt: skip
        self._drawn = [spec.name for spec in drawn]
        self.settings = {
            "image_column": self.column, "views": many,
            "view_transforms": list(self.recipe.transforms) if self.recipe else [],
            "crop_scale": list(self.recipe.crop_scale) if self.recipe else None,
            "view_seed": self.recipe.seed if self.recipe else None, "processing": self.processing.to_json(),
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table, column: str | None = None) -> None:
        """Every file of a column decoded once. Raises DataError naming the row."""
        name = column or self.column
        made = self._files(split, start, rows, name)
        for row, problem in enumerate(self._pool.map(_problem, made)):
            if problem:
                raise DataError(
                    f"split {split}, row {start + row}: column {name!r}: {problem}; mend it or drop the row"
                )

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table, view: int = 0) -> ImageSamples:
        made = self._files(split, 0, rows, self.column)
        hashes = np.frombuffer(b"".join(content_hash([one]) for one in made), np.uint8).reshape(len(made), 16)
        views, partners = self._views(split, source_index, made, view)
        samples = ImageSamples(
            {"S": np.ones(len(made), np.int64)}, {IMAGE: first_only(made, view), **views}, hashes, source_index,
            view=np.full(len(made), view, np.int32),
        )  # fmt: skip
        samples.files, samples.partners, samples.views = made, partners, views
        samples.hashes = np.zeros(len(made), np.int64)
        return samples

    def pixels(self, samples: ImageSamples, rows: np.ndarray) -> np.ndarray:
        """float32 [B, C, H, W]. Where rows follow one another the next batch's are begun, to be there when asked for.

        Raises DataError naming the row.
        """
        for row in rows.tolist():
            self._begin(samples, row)
        in_order = bool((np.diff(rows) == 1).all())
        for row in range(int(rows[-1]) + 1, min(int(rows[-1]) + 1 + len(rows), len(samples))) if in_order else ():
            self._begin(samples, row)
        made = np.empty((len(rows), *self.processing.shape), np.float32)
        found = {row: samples.begun.pop(row).result() for row in set(rows.tolist())}
        for at, row in enumerate(rows.tolist()):
            made[at] = found[row]
        return made

    def mixed_rows(self, samples: ImageSamples) -> np.ndarray:
        """bool [n]: rows that another image is mixed into, which have no label of their own."""
        nobody = np.full(len(samples), NOBODY)
        return samples.views.get(VIEW_MIX_WITH, nobody) != NOBODY

    def _begin(self, samples: ImageSamples, row: int) -> None:
        if row not in samples.begun:
            samples.begun[row] = self._pool.submit(self._make, samples, row)

    def _make(self, samples: ImageSamples, row: int) -> np.ndarray:
        """float32 [C, H, W] of one row; its hash is noted."""
        view = {name: values[row : row + 1] for name, values in samples.views.items()}
        try:
            made = replay([samples.files[row]], [samples.partners[row]], view, self.processing).numpy()
        except DataError as error:
            raise DataError(f"row {samples.source_index[row]}: column {self.column!r}: {error}") from error
        samples.hashes[row] = pixel_hash(made)[0]
        return made[0]

    def _views(
        self, split: str, source_index: np.ndarray, made: list[bytes], view: int
    ) -> tuple[dict[str, np.ndarray], list[bytes]]:
        """(view columns, partners' files) of these rows."""
        nobody = [b""] * len(made)
        if self.recipe is None:
            return {}, nobody
        if split != TRAIN:
            return {name: values for name, values in plain(len(made)).items() if name in self._drawn}, nobody
        own = dict(zip(source_index.tolist(), made, strict=True))
        rows = len(self.source.splits[split])

        def size_of(source: int) -> tuple[int, int]:
            return image_size(own[source] if source in own else others(source))

        others = _Others(self, split)
        views = draw(self.recipe, split, source_index, view, rows, size_of)
        partners = [
            b"" if one == NOBODY else own[one] if one in own else others(one) for one in views[VIEW_MIX_WITH].tolist()
        ]
        return {name: values for name, values in views.items() if name in self._drawn}, partners

    def _files(self, split: str, start: int, rows: pa.Table, name: str) -> list[bytes]:
        try:
            made: list[Any] = files(rows.column(name)).to_pylist()
        except DataError as error:
            raise DataError(f"split {split}, rows from {start}: column {name!r}: {error}") from error
        if None in made:
            row = start + made.index(None)
            raise DataError(f"split {split}, row {row}: column {name!r} is null; an image expected: drop the row")
        return made

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "predistill-pixels")


class _Others:
    """Files of rows outside the shard, each read when it is first asked for."""

    def __init__(self, images: ImageRows, split: str):
        self._images, self._split = images, split
        self._read: dict[int, bytes] = {}

    def __call__(self, source: int) -> bytes:
        if source not in self._read:
            table = read(self._images.source.splits[self._split], [self._images.column], [source])
            self._read[source] = files(table.column(self._images.column))[0].as_py() or b""
        return self._read[source]


def first_only(made: list[bytes], view: int) -> pa.Array:
    """Files as a column: of view 0; nothing in the rows of others."""
    return pa.array(made if view == 0 else [b""] * len(made), pa.large_binary())


def _problem(data: bytes) -> str | None:
    try:
        check(data)
    except DataError as error:
        return str(error)
    return None


def _recipe(config: DumpConfig, source: SourceData, output: tuple[int, int], mixes: bool) -> Recipe | None:
    """How views are drawn; None where each image has the processor's own view alone."""
    if config.views == 1 and not config.view_transforms:
        return None
    transforms = tuple(config.view_transforms) or (CROP, FLIP)
    least, largest = config.crop_scale
    recipe = Recipe(transforms, (float(least), float(largest)), config.view_seed, output)
    if not mixes and recipe.mixes:
        raise ConfigError(
            f"--view-transforms {','.join(transforms)}: {config.task} knows {CROP} and {FLIP}; leave {MIXUP} and "
            f"{CUTMIX} away"
        )
    if TRAIN not in source.splits:
        raise ConfigError(
            f"--views are of the split {TRAIN}, and there is {', '.join(source.splits)} alone: name it, as in "
            f"--dataset {TRAIN}=PATH"
        )
    return recipe
