"""Attention from queries and keys: scores, which keys are visible, probabilities.

B rows, S tokens, H heads, K key heads, d head size; arrays are [.., query, key] throughout. A layer's probabilities are

    scores = softcap · tanh(scaling · q kᵀ / softcap)          without the tanh where there is no soft-cap
    probabilities = softmax over the visible keys, of (scores, sink); the sink's own share is left out

Each of the H / K queries that share a key head is next to the other (grouped queries: Ainslie et al. 2023,
arXiv:2305.13245); soft-cap: Gemma 2 (arXiv:2408.00118); sinks: one logit a head that no key belongs to (gpt-oss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import StoreCorrupt


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer does with its queries and keys.

    heads, key_heads, head_dim: H, K (a divisor of H) and d.
    scaling: factor of q·k. softcap: in the unit of scores; None is no cap.
    window: keys nearer than this many positions are visible, |query - key| < window; None is all.
    causal: keys after the query are not visible.
    sinks: one logit a head; None is no sink.
    """

    heads: int
    key_heads: int
    head_dim: int
    scaling: float
    softcap: float | None = None
    window: int | None = None
    causal: bool = False
    sinks: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sinks": None if self.sinks is None else list(self.sinks)}

    @classmethod
    def from_json(cls, data: Any) -> AttentionSettings:
        """Raises StoreCorrupt where `data` describes no attention."""
        wrong = _wrong(data)
        if wrong:
            raise StoreCorrupt(f"attention settings of a column: {wrong} expected; got {str(data)[:200]}")
        sinks = data.get("sinks")
        return cls(**{**data, "sinks": None if sinks is None else tuple(map(float, sinks))})


def _wrong(data: Any) -> str | None:
    """What was expected of the first entry that is wrong; None where all are right."""
    names = AttentionSettings.__dataclass_fields__
    if not isinstance(data, Mapping) or not {"heads", "key_heads", "head_dim", "scaling"} <= set(data) <= set(names):
        return f"an object of {', '.join(names)}"
    for name in ("heads", "key_heads", "head_dim", "window"):
        size = data.get(name)
        if not (type(size) is int and 0 < size < 2**31) and not (name == "window" and size is None):
            return f"{name} a positive int"
    if data["heads"] % data["key_heads"]:
        return "heads a multiple of key_heads"
    if not _is_finite(data["scaling"]):
        return "scaling a number"
    if data.get("softcap") is not None and not (_is_finite(data["softcap"]) and data["softcap"] > 0):
        return "softcap a number above 0"
    if type(data.get("causal", False)) is not bool:
        return "causal true or false"
    sinks = data.get("sinks")
    if sinks is not None and not (
        isinstance(sinks, list) and len(sinks) == data["heads"] and all(map(_is_finite, sinks))
    ):
        return "sinks one number a head"
    return None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def visible_keys(mask: Tensor, settings: AttentionSettings, position_ids: Tensor | None = None) -> Tensor:
    """bool [B, 1, S, S]: which keys each query sees; a padded query sees none.

    mask: [B, S], True (or not 0) at tokens. position_ids: int [B, S] (or [1, S]) of rows that hold several documents,
    which do not see each other: one begins wherever the position is not one more than that before. None: one document.
    """
    mask = mask.bool()
    visible = mask[:, None, :, None] & mask[:, None, None, :]
    if settings.causal or settings.window is not None:
        places = torch.arange(mask.shape[1], device=mask.device)
        distance = places[:, None] - places  # query - key
        if settings.causal:
            visible = visible & (distance >= 0)
        if settings.window is not None:
            visible = visible & (distance.abs() < settings.window)
    if position_ids is not None:
        begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
        document = begins.cumsum(-1)
        visible = visible & (document[:, None, :, None] == document[:, None, None, :])
    return visible


def attention_scores(queries: Tensor, keys: Tensor, settings: AttentionSettings) -> Tensor:
    """[B, S, H, d], [B, S, K, d] -> [B, H, S, S]: scaled and soft-capped, not masked; float32 at least, also under
    autocast.

    Raises ValueError where shapes are not those of `settings`.
    """
    rows, length, heads, size = queries.shape
    groups = heads // settings.key_heads
    if (heads, size) != (settings.heads, settings.head_dim) or keys.shape != (rows, length, settings.key_heads, size):
        raise ValueError(
            f"queries [B, S, {settings.heads}, {settings.head_dim}] and keys [B, S, {settings.key_heads}, "
            f"{settings.head_dim}] expected; got {list(queries.shape)} and {list(keys.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        left = queries.to(dtype).transpose(1, 2).reshape(rows, settings.key_heads, groups * length, size)
        right = keys.to(dtype).permute(0, 2, 3, 1)  # [B, K, d, S]
        scores = (left @ right).reshape(rows, heads, length, length) * settings.scaling
        if settings.softcap is not None:
            scores = torch.tanh(scores / settings.softcap) * settings.softcap
    return scores


def attention_probabilities(scores: Tensor, visible: Tensor, sinks: Tensor | Sequence[float] | None = None) -> Tensor:
    """Softmax over the visible keys: [B, H, S, S], bool [B, 1, S, S] -> [B, H, S, S], 0 at keys that are not visible.

    sinks: [H], the logit of each head that belongs to no key. A query that sees nothing has zeros, without NaN in
    values or gradients, whatever its scores.
    """
    lowest = torch.finfo(scores.dtype).min
    logits = torch.where(visible, scores, lowest)
    if sinks is None:
        return torch.softmax(logits, -1).masked_fill(~visible, 0)
    sink = torch.as_tensor(sinks, dtype=scores.dtype, device=scores.device).reshape(1, -1, 1, 1)
    logits = torch.cat([logits, sink.expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(logits, -1)[..., :-1].masked_fill(~visible, 0)
