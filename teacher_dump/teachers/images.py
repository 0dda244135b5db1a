"""Teachers of images: a processor reads their inputs, and pixels are made as it makes them, without it.

B rows, C channels, H and W the size of the pixels.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...store.head import logits_of
from ...store.identity import digest
from ...store.images.pixels import PIXEL_VALUES, Processing
from ...store.images.processing import pillow
from ...store.probe import evaluating
from .given import GivenTeacher
from .teacher import Teacher

_TRANSIENT = ("_name_or_path", "transformers_version", "processor_class", "image_processor_type", "_processor_class")
_REQUIRED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class ReadsImages(Teacher):
    """What a teacher of images has in place of a tokenizer. Raises ConfigError where its processor does more than can
    be done again from stored images."""

    packages = ("torch", "transformers", "pillow", "numpy", "pyarrow")

    @cached_property
    def processing(self) -> Processing:
        made = Processing.of(self.processor, _whole(getattr(self.config, "num_channels", None)))
        made.output  # noqa: B018  raises where it differs from image to image
        return made

    @cached_property
    def pixel_argument(self) -> str:
        """The name under which its forward takes pixels."""
        return PIXEL_VALUES

    @property
    def parameters(self) -> int:
        """Multiplications of one image."""
        with FlopCounterMode(display=False) as counted:
            self._of_one()
        return max(counted.get_total_flops() // 2, 1)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Of one image: (C, h, w) where each pixel has some."""
        return tuple(logits_of(self._of_one()).shape[1:])

    def _of_one(self) -> Any:
        """What the skeleton gives of a black image."""
        first = next(iter(self._skeleton.parameters()), torch.zeros(0))
        pixels = torch.zeros((1, *self.processing.shape), dtype=first.dtype, device=first.device)
        with torch.no_grad(), evaluating(self._skeleton):
            return self._skeleton(**{self.pixel_argument: pixels})

    def save_reader(self, folder: Path) -> dict[str, Path]:
        self.processor.save_pretrained(folder / "processor")
        return {"processor": folder / "processor"}

    def _load_reader(self) -> None:
        """With Pillow, whose pixels are the same on every computer, where there is a choice."""
        pillow()
        self.processor = transformers.AutoImageProcessor.from_pretrained(self.where, backend="pil", **self._given())

    def _reader(self) -> dict[str, Any]:
        said = {name: value for name, value in self.processor.to_dict().items() if name not in _TRANSIENT}
        return {"processor": {"name": self._name, "sha256": digest([said, self.processing.to_json()])}}

    def _pad_id(self) -> int:
        return 0


class ImageTeacher(ReadsImages):
    """A teacher that is loaded."""

    def load(self) -> torch.nn.Module:
        model: Any = super().load()
        model.config.pad_token_id = getattr(self.config, "pad_token_id", None)
        return model


class GivenImageTeacher(ReadsImages, GivenTeacher):
    """A module that is given: pixels are its `pixel_values`, or the one argument that it cannot do without."""

    needs = (PIXEL_VALUES,)

    @property
    def num_labels(self) -> int:
        return int(self._logits.shape[1])

    @cached_property
    def pixel_argument(self) -> str:
        taken = inspect.signature(self._skeleton.forward).parameters
        needed = [one.name for one in taken.values() if one.kind in _REQUIRED and one.default is one.empty]
        return needed[0] if PIXEL_VALUES not in taken and len(needed) == 1 else PIXEL_VALUES

    @cached_property
    def processing(self) -> Processing:
        made = Processing.of(self.processor)
        made.output  # noqa: B018  raises where it differs from image to image
        return made

    def _check_inputs(self) -> None:
        if self.pixel_argument == PIXEL_VALUES:
            super()._check_inputs()

    def _probe_inputs(self) -> dict[str, Tensor]:
        pixels = torch.zeros((2, *self.processing.shape), device=self.device)
        return {self.pixel_argument: pixels.to(self.dtype)}

    def _suits(self, logits: tuple[int, ...], inputs: tuple[int, ...], shape: str) -> bool:
        return len(logits) == shape.count(",") + 1 and logits[0] == inputs[0]

    def _said(self, first: Tensor) -> str:
        return f"{first.shape[0]} images of {list(first.shape[1:])}"


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
