"""One answer an image: the teacher's logits [C] of each of its views, and the image's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...store.errors import ConfigError, DataError
from ...store.images.pixels import PIXEL_HASH, PIXEL_VALUES, Processing
from ...store.probe import evaluating
from ..images.check import PixelCheck
from ..losses.terms import Term
from ..objective import Batch, Evaluated, Step, logits_of
from .text_classification import ClassificationObjective, TextClassification, refuse_other_head


class ImageClassification(TextClassification):
    """Students that label images, as tasks/__init__.py asks for them.

    sizes: what a new student's config says where it is not told: image_size and num_channels of the store's pixels.
    """

    model_class = "AutoModelForImageClassification"
    pipeline = "image-classification"
    usage = ('classify = pipeline("image-classification", model="path/to/this/folder")', 'classify("picture.png")')

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.processing = Processing.from_json(store.settings["processing"])
        self.sizes = sizes_of(self.processing)

    def objective(self, terms: Sequence[Term]) -> ImageObjective:
        versions = self.store.identity.get("versions", {})
        return ImageObjective(terms, self.problem_type, self.settings["num_labels"], versions)

    def check_config(self, name: str, config: Any) -> None:
        """A head that was trained for another number of labels is refused."""
        refuse_other_head(name, config, "ForImageClassification", self.settings["num_labels"])

    def check_student(self, model: nn.Module) -> None:
        check_takes(model, self.processing)

    def check_rows(self, model: nn.Module, longest: int) -> None:
        """All images are of one size."""

    def retokenized(self, rows: Any, tokenizer: Any, text_column: str | None) -> Any:
        raise ConfigError("a store of images has no text to tokenise; give a student that takes pixel_values")


class ImageObjective(ClassificationObjective):
    """What a batch of images costs; some batches are held against the hashes of what the teacher saw.

    versions: of packages, by the store's identity.
    """

    def __init__(self, terms: Sequence[Term], problem_type: str, num_labels: int, versions: Mapping[str, str]) -> None:
        super().__init__(terms, problem_type, num_labels)
        self.check = PixelCheck(versions)

    @property
    def fields(self) -> list[str]:
        return [*super().fields, PIXEL_HASH] if super().fields else []

    @property
    def evaluation_fields(self) -> list[str]:
        return [*super().evaluation_fields, PIXEL_HASH]

    def settle(self, settings: Any) -> None:
        self.check.mode = settings.pixel_check

    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: torch.Tensor) -> Step:
        self.check.look(batch, training=True)
        return super().step(model, inputs, batch, counts)

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        self.check.look(batch, training=False)
        return super().evaluate(model, inputs, batch, rows)


def sizes_of(processing: Processing) -> dict[str, Any]:
    channels, height, width = processing.shape
    return {"image_size": height if height == width else [height, width], "num_channels": channels}


def check_takes(model: nn.Module, processing: Processing) -> torch.Tensor:
    """The student's logits of two images of nothing. Raises DataError where it does not take such pixels."""
    channels, height, width = processing.shape
    parameter = next(model.parameters())
    pixels = torch.zeros(2, channels, height, width, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad(), evaluating(model):
            return logits_of(model(**{PIXEL_VALUES: pixels}))
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        config = getattr(model, "config", None)
        own = {name: value for name in ("image_size", "num_channels") if (value := getattr(config, name, None))}
        said = f" (its config says {', '.join(f'{name} {value}' for name, value in own.items())})" if own else ""
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the store's images are {channels} x {height} x {width}, which the student does not take{said}: {reason}; "
            "give a student for images of this size"
        ) from None
