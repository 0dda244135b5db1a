"""What a transformers image processor does to an image, in plain numbers, so that anyone can do it again.

C channels, H and W the size of the pixels. Pixels are made with Pillow and numpy: Pillow resizes in fixed-point
arithmetic, which every CPU does alike, and the rest is a table of 256 float32 values a channel. They are equal, bit for
bit, to those of the processors of transformers that use Pillow; those that use torchvision differ by its rounding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, StoreCorrupt
from ..strict import reason, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
_LARGEST = 8192  # pixels of an edge: a float32 RGB image of that size takes 800 MB
_FINITE = 1e38  # float32 takes 3.4e38
_WARPED_FROM = 384  # pixels: ConvNeXT's processors neither keep the ratio nor crop from here on
_LEVIT_MARGIN = 256 / 224
_PROBES = ((37, 53), (90, 41), (48, 48))  # (height, width) of images on which a processor is looked at


def pillow() -> Any:
    """The package PIL. Raises ConfigError where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ConfigError("images need Pillow, which is not installed: pip install predistill[images]") from error
    return PIL


@dataclass(frozen=True)
class Processing:
    """From a decoded image to pixel values: resize, centre crop, rescale, normalise, in this order.

    mode: "RGB" or "L", what images are converted to. shortest_edge: pixels that the shorter edge is resized to; size:
    (height, width) that the image is resized to instead; neither: not resized. resample: Pillow's number of the filter.
    crop: (height, width) cut out of the middle, padded with 0 where the image is smaller. scale: what levels 0..255 are
    multiplied with; offset: what is added. normalize: pairs of (mean, std), one number a channel, applied one after
    another. bgr: channels are turned round at the end. reduce_labels: in masks 0 means nothing and n is class n - 1.
    """

    mode: str
    shortest_edge: int | None = None
    size: tuple[int, int] | None = None
    resample: int = 2
    crop: tuple[int, int] | None = None
    scale: float = 1.0
    offset: float = 0.0
    normalize: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    bgr: bool = False
    reduce_labels: bool = False

    @classmethod
    def of(cls, processor: Any, channels: int | None = None) -> Processing:
        """What `processor`, of transformers, does. channels: of the teacher, where its config says.

        Raises ConfigError where it does more than can be replayed, or gives images of different sizes.
        """
        mean = _numbers(getattr(processor, "image_mean", None))
        channels = channels or (len(mean) if len(mean) > 1 else 3)
        if channels not in MODES:
            raise ConfigError(f"images of 1 or 3 channels can be stored; the teacher takes {channels}")
        try:
            made = cls(MODES[channels], **_geometry(processor), **_arithmetic(processor, channels))
            made.check(processor)
        except ConfigError:
            raise
        except Exception as error:  # whatever a processor raises that wants more than images
            raise _cannot(processor, " ".join(str(error).split())[:200] or type(error).__name__) from error
        return made

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def output(self) -> tuple[int, int]:
        """(H, W) of pixel values. Raises ConfigError where it would differ from image to image."""
        if self.crop or self.size:
            return self.crop or self.size or (0, 0)
        raise ConfigError(
            "the processor gives each image a size of its own: one with a size of height and width, or a centre crop, "
            "expected"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row's pixel values."""
        return (self.channels, *self.output)

    @cached_property
    def table(self) -> np.ndarray:
        """float32 [C, 256]: the value of each level, in the steps and precisions that transformers takes."""
        values = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        made = np.tile(values, (self.channels, 1))
        made = made + np.float32(self.offset) if self.offset else made
        for mean, std in self.normalize:
            made = (made - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
        return made

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing, before the crop."""
        if self.size:
            return self.size
        if self.shortest_edge is None:
            return height, width
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)

    def plain(self, image: Image, resample: int | None = None) -> np.ndarray:
        """uint8 [H, W] or [H, W, C] of an image resized and cropped as the processor does; resample: another filter."""
        height, width = self.resized(image.height, image.width)
        filter_ = self.resample if resample is None else resample
        levels = np.asarray(image.resize((width, height), filter_))
        return levels if self.crop is None else _centre(levels, *self.crop)

    def values(self, levels: np.ndarray) -> np.ndarray:
        """float32 [C, H, W] of uint8 levels [H, W] or [H, W, C]."""
        planes = levels[None] if levels.ndim == 2 else np.moveaxis(levels, -1, 0)
        made = np.stack([table[plane] for table, plane in zip(self.table, planes, strict=True)])
        return made[::-1] if self.bgr else made

    def check(self, processor: Any) -> None:
        """Raises ConfigError where `processor` makes other pixels of a few images of noise than this does."""
        noise = np.random.Generator(np.random.PCG64(0))
        for height, width in _PROBES:
            levels = noise.integers(0, 256, (height, width, 3)[: 2 if self.channels == 1 else 3], np.uint8)
            image = pillow().Image.fromarray(levels)
            there = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float32)
            here = self.values(self.plain(image))
            if there.shape != here.shape:
                raise _cannot(processor, f"its settings say pixels of {here.shape}, it gives {there.shape}")
            apart = float(np.abs(there - here).max())
            if apart > self._tolerance(processor):
                raise _cannot(processor, f"its pixels are up to {apart:.3g} from what its settings say")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Processing:
        """Raises StoreCorrupt where `data` is not what `to_json` gave, or asks for images that no processor makes."""
        try:
            made = dict(data)
            for name in ("size", "crop"):
                made[name] = tuple(made[name]) if made.get(name) else None
            pairs = made.get("normalize") or ()
            made["normalize"] = tuple((tuple(map(float, mean)), tuple(map(float, std))) for mean, std in pairs)
            found = cls(**made)
            found._check_ranges()
            return found
        except (TypeError, ValueError, OverflowError) as error:
            raise StoreCorrupt(
                f"settings.processing does not say how pixels are made ({reason(error)}): {shown(data)}"
            ) from error

    def _check_ranges(self) -> None:
        """Raises ValueError."""
        pairs = [pair for pair in (self.size, self.crop) if pair is not None]
        sizes = [*itertools.chain(*pairs), *([] if self.shortest_edge is None else [self.shortest_edge])]
        if not all(type(one) is int and 0 < one <= _LARGEST for one in sizes) or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"size and crop are a height and a width, and sizes whole numbers from 1 to {_LARGEST}")
        if self.mode not in MODES.values() or type(self.resample) is not int or not 0 <= self.resample <= 5:
            raise ValueError(f"mode is one of {', '.join(MODES.values())}, and resample a number from 0 to 5")
        numbers = [self.scale, self.offset, *itertools.chain(*itertools.chain(*self.normalize))]
        if not all(type(one) in (int, float) and abs(one) <= _FINITE for one in numbers):
            raise ValueError("scale, offset, means and deviations are finite numbers that float32 holds")
        for mean, std in self.normalize:
            if not (len(mean) == len(std) == self.channels and min(map(abs, std)) >= 1 / _FINITE):
                raise ValueError("normalize has a mean and a deviation that is not 0 for each channel")
        if type(self.bgr) is not bool or type(self.reduce_labels) is not bool:
            raise ValueError("bgr and reduce_labels are true or false")

    def _tolerance(self, processor: Any) -> float:
        """torchvision rounds a resized level otherwise by one or two; Pillow not at all."""
        if getattr(processor, "backend", "pil") == "pil":
            return 0.0
        return 2.5 * float(np.abs(np.diff(self.table, axis=1)).max())


def _geometry(processor: Any) -> dict[str, Any]:
    """shortest_edge, size, resample, crop of a processor."""
    made: dict[str, Any] = {"resample": int(getattr(processor, "resample", None) or 0)}
    kind = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if getattr(processor, "do_resize", False):
        size = _size(processor.size)
        edge = size.get("shortest_edge", 0)
        if kind == "ConvNextImageProcessor" and edge:
            if edge < _WARPED_FROM:
                made |= {"shortest_edge": int(edge / processor.crop_pct), "crop": (edge, edge)}
            else:
                made["size"] = (edge, edge)
        elif edge:
            if size.get("longest_edge"):
                raise ValueError(f"a size of {size}")
            made["shortest_edge"] = int(_LEVIT_MARGIN * edge) if kind == "LevitImageProcessor" else edge
        else:
            made["size"] = (size["height"], size["width"])
    if getattr(processor, "do_center_crop", False):
        size = _size(processor.crop_size)
        made["crop"] = (size["height"], size["width"])
    return made


def _arithmetic(processor: Any, channels: int) -> dict[str, Any]:
    """scale, offset, normalize, bgr, reduce_labels of a processor."""
    rescales = getattr(processor, "do_rescale", False)
    made: dict[str, Any] = {"scale": float(processor.rescale_factor) if rescales else 1.0}
    if rescales and getattr(processor, "rescale_offset", False):
        made["offset"] = -1.0
    std = _each(getattr(processor, "image_std", None) or 1.0, channels)
    pairs = []
    if getattr(processor, "do_normalize", False):
        pairs.append((_each(processor.image_mean, channels), std))
    if getattr(processor, "include_top", False):  # EfficientNet's divide by the deviation once more
        pairs.append((_each(0.0, channels), std))
    turned = bool(getattr(processor, "do_flip_channel_order", False))
    reduced = bool(getattr(processor, "do_reduce_labels", False))
    return {**made, "normalize": tuple(pairs), "bgr": turned, "reduce_labels": reduced}


def _size(size: Any) -> dict[str, int]:
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(float, np.atleast_1d(value))) if value is not None else ()


def _each(value: Any, channels: int) -> tuple[float, ...]:
    numbers = _numbers(value)
    if len(numbers) not in (1, channels):
        raise ValueError(f"{len(numbers)} means or deviations for images of {channels} channels")
    return numbers if len(numbers) == channels else numbers * channels


def _centre(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[height, width, ...] out of the middle, with zeros where the image does not reach, as transformers places it."""
    own_height, own_width = levels.shape[:2]
    top, left = (own_height - height) // 2, (own_width - width) // 2
    if top >= 0 and left >= 0:
        return levels[top : top + height, left : left + width]
    full = (max(height, own_height), max(width, own_width))
    above, before = math.ceil((full[0] - own_height) / 2), math.ceil((full[1] - own_width) / 2)
    padded = np.zeros((*full, *levels.shape[2:]), levels.dtype)
    padded[above : above + own_height, before : before + own_width] = levels
    top, left = top + above, left + before
    return padded[top : top + height, left : left + width]


def _cannot(processor: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{type(processor).__name__} does what cannot be done again from the stored image ({why}): a processor that "
        "resizes, crops, rescales and normalises expected"
    )
