"""What ways of keeping the teacher's inside cost and lose: bytes a token against the error of what a reader gets back.

relative L2 is |decoded - exact| / |exact| over all values of a column, cosine the mean over its vectors (of a position;
of a query, for attentions); of several columns the worst counts. Attentions kept as queries and keys are made again
before they are compared, and a head mean is compared with every head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...store import FieldSpec
from ...store.attention import AttentionSettings, attention_probabilities, attention_scores
from ...store.codecs import LIMITS, codec_of
from .inner import Place, Way, place_of
from .layers import HEAD_MEAN, QUERIES_KEYS, SQUARE


@dataclass
class Loss:
    """Sums over one column: squared error, squared values, cosines, and how many of these."""

    error: float = 0.0
    size: float = 0.0
    cosines: float = 0.0
    count: int = 0

    def add(self, exact: np.ndarray, decoded: np.ndarray) -> None:
        """n vectors, [n, width] each. Vectors of zeros have no cosine."""
        exact, decoded = exact.astype(np.float64), decoded.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite, where a dtype cannot hold them
            norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(decoded, axis=1)
            there = norms > 0
            self.cosines += float(((exact * decoded).sum(axis=1)[there] / norms[there]).sum())
        self.count += int(there.sum())
        self.error += float(((decoded - exact) ** 2).sum())
        self.size += float((exact**2).sum())


@dataclass
class Cost:
    """One way of keeping one field, or one module. bytes_per_token: of all its columns; losses: by column."""

    field: str
    way: Way
    specs: tuple[FieldSpec, ...]
    bytes_per_token: float
    losses: dict[Any, Loss] = dataclasses.field(default_factory=dict)

    @property
    def relative_l2(self) -> float:
        """Infinite where the dtype cannot hold the values."""
        return max((math.sqrt(one.error / one.size) if one.size else 0.0 for one in self.losses.values()), default=0.0)

    @property
    def cosine(self) -> float:
        return min((one.cosines / one.count for one in self.losses.values() if one.count), default=1.0)

    @property
    def fits(self) -> bool:
        """Can the dtype hold the values?"""
        return math.isfinite(self.relative_l2)

    @property
    def codec(self) -> str:
        return self.way.name if self.field in SQUARE else self.way.dtype

    def is_in(self, way: Way) -> bool:
        """Is this how a store that is kept in `way` has it?"""
        return self.way.dtype == way.dtype and (self.field not in SQUARE or self.way.storage == way.storage)

    def to_json(self, chosen: Way) -> dict[str, Any]:
        """cosine, relative_l2: None where the dtype cannot hold the values. chosen: how the store has it."""
        return {
            "field": self.field, "codec": self.codec,
            "bytes_per_token": round(self.bytes_per_token, 2), "cosine": self.cosine if self.fits else None,
            "relative_l2": self.relative_l2 if self.fits else None, "chosen": self.is_in(chosen),
        }  # fmt: skip

    def add(
        self, found: Mapping[Place, Tensor], visible: Callable[[AttentionSettings], Tensor],
        settings: Mapping[int, AttentionSettings],
    ) -> None:  # fmt: skip
        """What is lost of one row, [1, …] each. visible: keys of a layer, bool [1, 1, S, S]; settings: by layer."""
        if self.field not in SQUARE:
            for spec in self.specs:
                exact = host(found[place_of(spec)])
                vectors = exact.shape[1] if spec.shape[0] == "S" else 1
                decoded = coded(exact, spec).reshape(vectors, -1)
                self.losses.setdefault(spec.name, Loss()).add(exact.reshape(vectors, -1), decoded)
            return
        for number in sorted({int(place_of(spec)[1]) for spec in self.specs}):
            exact = host(found[self.field, number])
            width = exact.shape[-1]
            decoded = np.broadcast_to(self._square(number, found, visible, settings.get(number)), exact.shape)
            self.losses.setdefault(number, Loss()).add(exact.reshape(-1, width), decoded.reshape(-1, width))

    def _square(
        self, number: int, found: Mapping[Place, Tensor], visible: Callable[[AttentionSettings], Tensor],
        settings: AttentionSettings | None,
    ) -> np.ndarray:  # fmt: skip
        """[1, H or 1, S, S]: a layer's attentions, or scores, as a reader gets them."""
        specs = [spec for spec in self.specs if place_of(spec)[1] == number]
        if self.way.storage != QUERIES_KEYS:
            exact = found[self.field, number].float()
            return coded(host(exact.mean(1, keepdim=True) if self.way.storage == HEAD_MEAN else exact), specs[0])
        assert settings is not None
        queries, keys = (torch.from_numpy(coded(host(found[place_of(spec)]), spec)) for spec in specs)
        scores = attention_scores(queries, keys, settings)
        if self.field == "attentions":
            scores = attention_probabilities(scores, visible(settings).cpu(), settings.sinks)
        return scores.numpy()


def coded(values: np.ndarray, spec: FieldSpec) -> np.ndarray:
    """values [1, *row shape] as a reader gets them, float32; infinite where the dtype cannot hold them."""
    codec = codec_of(spec)
    if spec.codec == "dense" and not np.abs(values).max(initial=0) <= LIMITS[spec.dtype]:
        return np.full_like(values, np.inf)
    return codec.decode(codec.encode(values, spec), spec).astype(np.float32)


def host(tensor: Tensor) -> np.ndarray:
    """float32, on the CPU."""
    return tensor.detach().float().cpu().numpy()
