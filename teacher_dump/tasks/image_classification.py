"""Image classification: one image; single-label, multi-label and regression heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ...store.head import logits_of
from ...store.images.pixels import PIXEL_HASH
from ...store.schema import LABELS
from ..config import DumpConfig
from ..data import SourceData
from ..logits.classes import Classes
from ..rows.image_rows import ImageRows, ImageSamples
from ..teachers.images import ReadsImages


class ImageClassification:
    """C classes (or one real number) for each view of an image."""

    model_class = "AutoModelForImageClassification"

    def __init__(self, config: DumpConfig, teacher: ReadsImages, source: SourceData):
        self.teacher, self.images = teacher, ImageRows(config, teacher, source)
        self.classes = Classes(config, teacher, source)
        self.notices, self.label_names, self.views = self.classes.notices, self.classes.names, self.images.views
        self.columns = [self.images.column, *([self.classes.column] if self.classes.column else [])]
        self.fields = [*self.images.fields, *self.classes.fields(config.dtype)]
        self.settings = {
            **self.images.settings, **self.classes.settings, "fields": list(config.fields), "dtype": config.dtype,
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        self.images.check(split, start, rows)
        self.classes.check(split, start, rows)

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table, view: int = 0) -> ImageSamples:
        samples = self.images.prepare(split, source_index, rows, view)
        labels, missing = self.classes.of(rows, split), self.classes.labels.missing(len(rows))
        mixed = self.images.mixed_rows(samples).reshape(-1, *(1,) * (labels.ndim - 1))
        samples.values[LABELS] = np.where(mixed, missing, labels)
        return samples

    def collate(self, samples: ImageSamples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {self.teacher.pixel_argument: self.images.pixels(samples, rows)}

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any classifier will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: ImageSamples, rows: np.ndarray) -> dict[str, Any]:
        return {"logits": logits_of(model(**in_dtype(model, inputs)))}

    def outputs(self, samples: ImageSamples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        found = self.classes.outputs(captured["logits"], samples.values[LABELS][rows])
        return {PIXEL_HASH: samples.hashes[rows], **found}


def in_dtype(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pixels in what the model computes in."""
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return {name: value.to(dtype) for name, value in inputs.items()}
