"""Random views of an image: what is drawn, from which seed, and the columns that keep it.

A row's parameters come from (view seed, split, source_index, view) alone, so they are the same whatever the batch, the
order or the number of workers. Crops are drawn as by torchvision's RandomResizedCrop: an area in `crop_scale` of the
image's, a ratio log-uniform in 3/4..4/3, ten tries, then the middle. Mixing takes another image of the same split:
mixup's weight is uniform in 0..1 (Beyer et al. 2022, arXiv 2106.05237), cutmix's box is drawn as by torchvision; where
both are asked for, a row has one or the other, each half of the time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..schema import FieldSpec

VIEW_CROP = "view_crop"
VIEW_FLIP = "view_flip"
VIEW_MIX_WITH = "view_mix_with"
VIEW_MIX_CROP = "view_mix_with_crop"
VIEW_MIX_FLIP = "view_mix_with_flip"
VIEW_MIX_RATIO = "view_mix_ratio"
VIEW_MIX_BOX = "view_mix_box"
VIEW_SEED = "view_seed"

CROP, FLIP, MIXUP, CUTMIX = TRANSFORMS = ("crop", "flip", "mixup", "cutmix")
VIEW_FIELDS = (
    FieldSpec(VIEW_CROP, (4,), "int32", role="input"),
    FieldSpec(VIEW_FLIP, (), "bool", role="input"),
    FieldSpec(VIEW_MIX_WITH, (), "int64", role="input"),
    FieldSpec(VIEW_MIX_CROP, (4,), "int32", role="input"),
    FieldSpec(VIEW_MIX_FLIP, (), "bool", role="input"),
    FieldSpec(VIEW_MIX_RATIO, (), "float32", role="input"),
    FieldSpec(VIEW_MIX_BOX, (4,), "int32", role="input"),
    FieldSpec(VIEW_SEED, (), "int64", role="input"),
)
NOBODY = -1  # view_mix_with of a row that nothing is mixed into

_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10
_A_CROP = 2 * _TRIES + 2  # numbers that a crop may take: areas and ratios, then top and left


@dataclass(frozen=True)
class Recipe:
    """How views are drawn. transforms: of "crop", "flip", "mixup", "cutmix"; crop_scale: least and largest share of the
    image's area; seed: other views for another; output: (H, W) of the pixels, where cutmix's boxes lie."""

    transforms: tuple[str, ...]
    crop_scale: tuple[float, float]
    seed: int
    output: tuple[int, int]

    def __post_init__(self) -> None:
        unknown = [name for name in self.transforms if name not in TRANSFORMS]
        if unknown:
            raise ConfigError(f"--view-transforms: of {', '.join(TRANSFORMS)} expected; got {unknown[0]!r}")
        least, largest = self.crop_scale
        if not 0 < least <= largest <= 1:
            raise ConfigError(f"--crop-scale: 0 < least <= largest <= 1 expected; got {least},{largest}")

    @property
    def mixes(self) -> bool:
        return MIXUP in self.transforms or CUTMIX in self.transforms


def view_seed(seed: int, split: str, source_index: int, view: int) -> int:
    """What a row's parameters are drawn from: 63 bits of the BLAKE2b of its address."""
    said = f"{seed}/{split}/{source_index}/{view}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): 53 bits each of what Philox gives, whose numbers are the same in all versions."""
    return (np.random.Philox(key=seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


def draw(
    recipe: Recipe, split: str, source_index: Sequence[int] | np.ndarray, view: int, rows: int,
    size_of: Callable[[int], tuple[int, int]],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The view columns of some rows. rows: of the split, among which partners are; size_of: (height, width) of the
    decoded image of a source row.

    Returns {view_crop: int32 [B, 4], view_flip: bool [B], ...}, as `VIEW_FIELDS` has them.
    """
    drawn = [_row(recipe, split, int(one), view, rows, size_of) for one in source_index]
    return _columns(drawn)


def plain(count: int) -> dict[str, np.ndarray]:
    """The view columns of rows that are as the processor makes them, in a store that has such columns."""
    return _columns([_Row()] * count)


@dataclass(frozen=True)
class _Row:
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    mix_with: int = NOBODY
    mix_crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    mix_flip: bool = False
    ratio: float = 1.0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    seed: int = -1


def _columns(rows: Sequence[_Row]) -> dict[str, np.ndarray]:
    def of(name: str, dtype: Any, *shape: int) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype).reshape(len(rows), *shape)

    return {
        VIEW_CROP: of("crop", np.int32, 4), VIEW_FLIP: of("flip", np.bool_), VIEW_MIX_WITH: of("mix_with", np.int64),
        VIEW_MIX_CROP: of("mix_crop", np.int32, 4), VIEW_MIX_FLIP: of("mix_flip", np.bool_),
        VIEW_MIX_RATIO: of("ratio", np.float32), VIEW_MIX_BOX: of("box", np.int32, 4), VIEW_SEED: of("seed", np.int64),
    }  # fmt: skip


def _row(
    recipe: Recipe, split: str, source: int, view: int, rows: int, size_of: Callable[[int], tuple[int, int]]
) -> _Row:
    """Every parameter has numbers of its own, so that asking for one more transform leaves the others as they were."""
    seed = view_seed(recipe.seed, split, source, view)
    own, mate, mix = np.split(uniforms(seed, 2 * (_A_CROP + 1) + 5), (_A_CROP + 1, 2 * (_A_CROP + 1)))
    made: dict[str, Any] = {"seed": seed, "crop": _crop(recipe, own, size_of(source)), "flip": _flip(recipe, own)}
    if recipe.mixes and rows > 1:
        ratio, box = _mix(recipe, mix)
        if ratio < 1 or any(box):
            partner = (source + 1 + int(mix[0] * (rows - 1))) % rows  # any but itself
            made |= {"mix_with": partner, "ratio": ratio, "box": box, "mix_flip": _flip(recipe, mate),
                     "mix_crop": _crop(recipe, mate, size_of(partner))}  # fmt: skip
    return _Row(**made)


def _crop(recipe: Recipe, drawn: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width); zeros where no crop is asked for."""
    if CROP not in recipe.transforms:
        return 0, 0, 0, 0
    height, width = size
    least, largest = recipe.crop_scale
    for attempt in range(_TRIES):
        area = height * width * (least + (largest - least) * drawn[2 * attempt])
        ratio = math.exp(_RATIOS[0] + (_RATIOS[1] - _RATIOS[0]) * drawn[2 * attempt + 1])
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top, left = (int(share * (room + 1)) for share, room in zip(drawn[-3:-1], (height - high, width - wide),
                                                                         strict=True))  # fmt: skip
            return top, left, high, wide
    ratio = min(max(width / height, math.exp(_RATIOS[0])), math.exp(_RATIOS[1]))
    wide = min(width, max(round(height * ratio), 1))
    high = min(height, max(round(wide / ratio), 1))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _flip(recipe: Recipe, drawn: np.ndarray) -> bool:
    return FLIP in recipe.transforms and bool(drawn[-1] < 0.5)


def _mix(recipe: Recipe, drawn: np.ndarray) -> tuple[float, tuple[int, int, int, int]]:
    """(weight of the row's own pixels, box that is the partner's): mixup has the first, cutmix the second."""
    cut = CUTMIX in recipe.transforms and (MIXUP not in recipe.transforms or drawn[1] < 0.5)
    kept = float(drawn[2])
    if not cut:
        return float(np.float32(kept)), (0, 0, 0, 0)
    height, width = recipe.output
    row, column = int(drawn[3] * height), int(drawn[4] * width)
    half = 0.5 * math.sqrt(1 - kept)
    top, bottom = max(row - int(half * height), 0), min(row + int(half * height), height)
    left, right = max(column - int(half * width), 0), min(column + int(half * width), width)
    empty = bottom <= top or right <= left
    return 1.0, (0, 0, 0, 0) if empty else (top, left, bottom - top, right - left)


def mixed(view: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [B]: which rows of view columns have another image in them."""
    return np.asarray(view[VIEW_MIX_WITH]) >= 0
