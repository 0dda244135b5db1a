"""How far what is stored is from what a teacher says now, beside what storing may have cost.

A stored value is at most half a step of its precision from what was said when it was stored; and a teacher that is run
with other rows beside one, or elsewhere, rounds otherwise, by some units in the last place of what it computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...store import FieldSpec, schema
from ...store.codecs import ROUNDING, codec_of
from ...store.images.pixels import PIXEL_HASH

UNITS, UNITS_OF_HALF = 64, 16  # in the last place, of the largest value of a batch: float32; float16 and bfloat16
_NO_LOGIT = -3e4  # ruled out by the teacher: as a logit, the least that float16 holds
_BITS = {"float16": 11, "bfloat16": 8, "float32": 24}  # of a significand
_SMALLEST = {"float16": 2.0**-25}  # half of the least step


@dataclass
class Deviation:
    """Of one column. largest, mean: of |stored - said now|; bound: of the value that is largest away; worst: the
    largest share of its own bound that a value is away, in the row of sample_id `row`; beyond: of `values`, those whose
    share is more than 1."""

    largest: float = 0.0
    bound: float = 0.0
    worst: float = 0.0
    beyond: int = 0
    values: int = 0
    row: int = -1
    _sum: float = 0.0

    @property
    def mean(self) -> float:
        return self._sum / max(self.values, 1)

    def add(self, away: np.ndarray, bounds: np.ndarray, rows: np.ndarray) -> None:
        """away, bounds: [M, ...]; rows: int64 [M], the sample_id of each."""
        if not away.size:
            return
        away = np.where(np.isnan(away), np.inf, away)
        share, furthest = away / bounds, int(away.argmax())
        if self.row < 0 or share.max() > self.worst:
            self.worst, self.row = float(share.max()), int(rows[int(share.argmax()) // (share.size // len(share))])
        if not self.values or away.flat[furthest] > self.largest:
            self.largest, self.bound = float(away.flat[furthest]), float(bounds.flat[furthest])
        self.beyond += int((share > 1).sum())
        self.values += away.size
        self._sum += float(away.sum())

    def to_json(self) -> dict[str, Any]:
        names = ("largest", "mean", "bound", "worst", "beyond", "values")
        return {name: getattr(self, name) for name in names}


def compare(spec: FieldSpec, stored: np.ndarray, now: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """(|stored - now|, the bound of each), of values of one shape. noise: what the teacher's own rounding may do."""
    if spec.name == PIXEL_HASH:  # 1 for other pixels
        return (stored != now).astype(np.float64), np.full(now.shape, 0.5)
    stored, now = stored.astype(np.float64), now.astype(np.float64)
    if spec.name == schema.SAMPLE_COUNTS:
        return np.abs(stored - now), np.full(now.shape, 1 + noise * spec.parameters.get("draws", 1))
    away = np.abs(stored - now)
    if spec.name == schema.TOP_K_LOGITS:
        away = np.where((stored <= _NO_LOGIT) & (now <= _NO_LOGIT), 0, away)
    if spec.name == schema.SAMPLE_RATIOS:
        noise = noise * np.maximum(np.abs(now), 1)
    return away, half_step(spec, stored, now) + noise


def half_step(spec: FieldSpec, stored: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The most that storing these values may have changed each."""
    if spec.codec == "dense":
        least = _SMALLEST.get(spec.dtype, 2.0**-149)
        return np.maximum(np.abs(now) * 2.0 ** -_BITS.get(spec.dtype, 24), least)
    if spec.codec == "uint8":  # a scale a position, by its least
        least = np.where(stored > _NO_LOGIT, stored, 0).min(axis=-1, keepdims=True)
        return np.broadcast_to(np.maximum(-least * (1 / 510 + ROUNDING), 2.0**-149), now.shape)
    levels, scales = codec_of(spec).encode(now, spec)
    level = np.abs(codec_of(spec).decode([np.ones_like(levels), scales], spec)).astype(np.float64)
    return level * (1 / 2 + 127 * ROUNDING)


def noise_of(dtype: Any, peak: float) -> float:
    """dtype: torch's, that the teacher computes in; peak: the largest value that it gave."""
    import torch

    half = dtype in (torch.float16, torch.bfloat16)
    return float((UNITS_OF_HALF if half else UNITS) * torch.finfo(dtype).eps * max(peak, 1.0))
