"""What a layer's attention was called with, as settings: read from the call, and tried against eager attention.

[B, H, S, d] here, as transformers passes queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionSettings, attention_probabilities, attention_scores, visible_keys
from .attention_capture import Call, eager_attention
from .errors import ConfigError

_TOLERANCE = 1e-5  # between probabilities from queries and keys and those of eager attention, both in float32


def visible_of(inputs: Mapping[str, Any], call: Call, settings: AttentionSettings, *, told: bool = False) -> Tensor:
    """bool [B, 1, S, S] of a model called with `inputs`: of its padding and `settings`.

    told: what the mask of the call itself says is heeded too, where it is one of queries and keys. Else positions that
    begin anew are several documents, which transformers looks for in a causal model without a mask and a cache.
    """
    mask, seen = inputs.get("attention_mask"), _allowed(call.mask) if told else None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _allowed(mask)  # type: ignore[return-value]
    places = inputs.get("position_ids") if mask is None and settings.causal and seen is None else None
    if mask is None:
        mask = torch.ones(call.queries.shape[0], call.queries.shape[2], dtype=torch.bool)
    visible = visible_keys(mask.to(call.queries.device), settings, places if _is_table(places) else None)
    return visible if seen is None else visible & seen


def _allowed(mask: Any) -> Tensor | None:
    """bool [B, 1, S, S] of a mask of queries and keys, bool or to be added; None for any other."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def settings_of(call: Call, inputs: Mapping[str, Any], layer: int) -> AttentionSettings:
    """Raises ConfigError where probabilities from queries and keys are not those of the model's eager attention."""
    queries, keys, options = call.queries, call.keys, call.options
    kind = type(call.module).__name__
    if queries.shape[-2] != keys.shape[-2] or queries.shape[-1] != keys.shape[-1]:
        raise ConfigError(f"{kind} attends to other tokens than its own; attention of one text to itself expected")
    causal, window = call.pattern or (_is_causal(call.mask), options.get("sliding_window"))
    if call.pattern is None and call.window not in (None, window, (window or 0) - 1):
        raise ConfigError(f"{kind} masks keys other than by a window, which is not modelled: use exact attentions")
    sinks, scaling, softcap = options.get("s_aux"), options.get("scaling"), options.get("softcap")
    settings = AttentionSettings(
        heads=queries.shape[1],
        key_heads=keys.shape[1],
        head_dim=queries.shape[-1],
        scaling=float(queries.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=None if softcap is None else float(softcap),
        window=None if window is None else int(window),
        causal=causal,
        sinks=None if sinks is None else tuple(sinks.detach().float().flatten().tolist()),
    )
    error = _error(call, inputs, settings)
    if not error <= _TOLERANCE:
        raise ConfigError(
            f"attention of layer {layer} ({kind}) is not what its queries and keys say: probabilities differ by "
            f"{error:.1e}; at most {_TOLERANCE:g} expected. Something is added that is not modelled: use exact "
            "attentions (--attention-storage exact)"
        )
    return settings


def _error(call: Call, inputs: Mapping[str, Any], settings: AttentionSettings) -> float:
    """Largest difference of probabilities, at queries that see something, both in float32 at least."""
    given = (call.queries, call.keys, call.values, call.mask)
    queries, keys, values, mask = (
        one.to(torch.promote_types(one.dtype, torch.float32))
        if isinstance(one, Tensor) and one.dtype.is_floating_point
        else one
        for one in given
    )
    own = eager_attention(call.module)(call.module, queries, keys, values, mask, **call.options)[1]
    visible = visible_of(inputs, call, settings)
    scores = attention_scores(queries.transpose(1, 2), keys.transpose(1, 2), settings)
    made = attention_probabilities(scores, visible, settings.sinks)
    gap = (made - own).abs().masked_fill(~visible.any(-1, keepdim=True), 0)
    return float(gap.max())


def _is_causal(mask: Any) -> bool:
    """Whether no query sees a key after it; without a mask eager attention sees all."""
    seen = _allowed(mask)
    return seen is not None and not bool(seen.triu(1).any())
