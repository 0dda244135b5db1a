"""Semantic segmentation: a class for each pixel of an image, at the resolution that the teacher has.

B rows, C classes, h and w of the logits, H and W of the pixels, which masks are resized to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ...store import ConfigError, DataError, FieldSpec
from ...store.head import logits_of
from ...store.images.pixels import MASK, PIXEL_HASH, decode_mask, replay_masks
from ...store.schema import LOGITS, MISSING_LABEL
from ..config import AUTO, NO_COLUMN, DumpConfig
from ..data import SourceData
from ..logits.classes import REAL_SUMMARIES
from ..rows.image_rows import ImageRows, ImageSamples, first_only
from ..rows.images import files, image_column, is_image
from ..rows.label_names import teacher_names
from ..teachers.images import ReadsImages
from .image_classification import in_dtype

MASKS = ("mask", "annotation", "label", "labels", "segmentation")  # columns of which the first of images is taken


class SemanticSegmentation:
    """C classes for each pixel. Labels are made of the masks as pixels are of the images: cropped and flipped alike."""

    model_class = "AutoModelForSemanticSegmentation"

    def __init__(self, config: DumpConfig, teacher: ReadsImages, source: SourceData):
        self.teacher, self.ignore_index = teacher, config.ignore_index
        self.mask = _mask_column(config, source)
        self.images = ImageRows(config, teacher, source, mixes=False, taken=[self.mask] if self.mask else MASKS)
        if self.mask == self.images.column:
            raise ConfigError(f"--mask-column {self.mask} is the column of the images too; name another")
        self.num_labels, shape = teacher.num_labels, teacher.logits_shape
        self.label_names = teacher_names(config.label_names, teacher.config.id2label, self.num_labels)
        self.notices: list[str] = []
        self.views = self.images.views
        self.columns = [self.images.column, *([self.mask] if self.mask else [])]
        image, *drawn = self.images.fields
        self.fields = [
            image, *([FieldSpec(MASK, (), "binary", "bytes", role="label")] if self.mask else []), *drawn,
            FieldSpec(LOGITS, shape, "float16" if config.dtype == "int8" else config.dtype),
            *(FieldSpec(f"teacher_{name}", (), "float32", role="summary") for name in REAL_SUMMARIES),
        ]  # fmt: skip
        self.settings = {
            **self.images.settings, "mask_column": self.mask, "ignore_index": self.ignore_index,
            "fields": list(config.fields), "dtype": config.dtype,
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        self.images.check(split, start, rows)
        if self.mask in rows.column_names:
            for row, data in enumerate(files(rows.column(self.mask)).to_pylist()):
                if problem := None if data is None else self._problem(data):
                    raise DataError(
                        f"split {split}, row {start + row}: column {self.mask!r}: {problem}; mend it or drop the row"
                    )

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table, view: int = 0) -> ImageSamples:
        samples = self.images.prepare(split, source_index, rows, view)
        if self.mask:
            there = self.mask in rows.column_names
            masks = [one or b"" for one in files(rows.column(self.mask)).to_pylist()] if there else [b""] * len(rows)
            samples.values[MASK] = first_only(masks, view)
            samples.masks = masks
        return samples

    def collate(self, samples: ImageSamples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {self.teacher.pixel_argument: self.images.pixels(samples, rows)}

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any segmenter will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: ImageSamples, rows: np.ndarray) -> dict[str, Any]:
        """Beside the logits [B, C, h, w] means over their pixels, [B], on the device; the loss over those with a class,
        NaN where there is none."""
        logits = logits_of(model(**in_dtype(model, inputs)))
        logprobs = logits.float().log_softmax(dim=1)
        probs = logprobs.exp()
        classes = torch.from_numpy(self._classes(samples, rows, *logits.shape[2:])).to(logits.device)
        known = classes >= 0
        losses = torch.where(known, -logprobs.gather(1, classes.clamp(min=0)[:, None])[:, 0], 0)
        return {
            "maps": logits, "confidence": probs.amax(dim=1).mean(dim=(1, 2)),
            "entropy": torch.special.entr(probs).sum(dim=1).mean(dim=(1, 2)),
            "loss": losses.sum(dim=(1, 2)) / known.sum(dim=(1, 2)),
        }  # fmt: skip

    def outputs(self, samples: ImageSamples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        summaries = {f"teacher_{name}": captured[name] for name in REAL_SUMMARIES}
        return {PIXEL_HASH: samples.hashes[rows], LOGITS: captured["maps"], **summaries}

    def _classes(self, samples: ImageSamples, rows: np.ndarray, height: int, width: int) -> np.ndarray:
        """int64 [B, height, width]: the class at the pixel of the mask in the middle of each, -100 where none is."""
        made = np.full((len(rows), height, width), MISSING_LABEL, np.int64)
        for at, row in enumerate(rows.tolist() if samples.masks else []):
            if samples.masks[row]:
                view = {name: values[row : row + 1] for name, values in samples.views.items()}
                mask = replay_masks([samples.masks[row]], view, self.images.processing)[0]
                down = (np.arange(height) * mask.shape[0] + mask.shape[0] // 2) // height
                across = (np.arange(width) * mask.shape[1] + mask.shape[1] // 2) // width
                classes = mask[down[:, None], across]
                known = (classes != self.ignore_index) & (classes >= 0) & (classes < self.num_labels)
                made[at] = np.where(known, classes, MISSING_LABEL)
        return made

    def _problem(self, data: bytes) -> str | None:
        """What is wrong with a mask."""
        try:
            levels = decode_mask(data)
        except DataError as error:
            return str(error)
        if self.images.processing.reduce_labels:
            levels = np.where((levels == 0) | (levels == 255), self.ignore_index, levels - 1)
        bad = (levels != self.ignore_index) & (levels != MISSING_LABEL) & ((levels < 0) | (levels >= self.num_labels))
        if not bad.any():
            return None
        return (
            f"class {levels[bad][0]} in the mask; the teacher has {self.num_labels}, so 0 to {self.num_labels - 1} "
            f"expected, or {self.ignore_index} where there is none (--ignore-index)"
        )


def _mask_column(config: DumpConfig, source: SourceData) -> str | None:
    """The column of masks; None where rows have none."""
    if config.mask_column == NO_COLUMN:
        return None
    if config.mask_column != AUTO:
        return image_column("--mask-column", config.mask_column, source.features)
    first = next(iter(source.features.values()))
    return next((name for name in MASKS if is_image(first.get(name)) and name != config.image_column), None)
