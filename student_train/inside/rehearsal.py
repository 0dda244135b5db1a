"""Before training: where the student's inside is, and whether the losses of zeros of these shapes can be computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...store.activations import Sites
from ...store.attention import AttentionSettings
from ...store.errors import ConfigError
from ...store.images.pixels import PIXEL_VALUES
from ...store.schema import ATTENTION_MASK, symbols
from ..objective import Batch
from .comparison import Comparison
from .projections import Projections
from .sides import Sides
from .teacher import MODULE

_BY_TOKEN = ("hidden_states", "queries", "keys", "values", MODULE)  # kinds whose second axis is S, with tokens
_OF_ATTENTION = {"attentions", "attention_scores", "queries", "keys", "values"}


def find_sites(model: nn.Module, inputs: Batch, kinds: set[str]) -> Sites:
    """Where the student's inside is. Attention by queries and keys, without eager attention, wherever that can be."""
    asked = kinds & _OF_ATTENTION
    if not asked:
        return Sites.find(model, inputs)
    try:
        return Sites.find(model, inputs, attention="queries-keys")
    except ConfigError:
        if asked != {"attentions"}:
            raise
        return Sites.find(model, inputs, attention="eager")


@torch.no_grad()
def rehearse(
    comparison: Comparison, projections: Projections | None, seen: Mapping[Any, Tensor] | None,
    attention: Mapping[int, AttentionSettings],
) -> None:  # fmt: skip
    """Compute the loss of zeros of the shapes that both sides have. Raises ConfigError where they do not suit it.

    seen: of images and of modules, what was recorded of two rows; attention: as Sides takes it with that.
    """
    teacher, rows, tokens = comparison.teacher, 2, 2
    batch = {ATTENTION_MASK: torch.ones(rows, tokens, dtype=torch.int64)}
    if seen is not None and not any(symbols(teacher.specs[name].shape) for name in comparison.columns):
        batch = {PIXEL_VALUES: torch.zeros(rows)}
    elif seen is not None:
        tokens = next(value.shape[1] for (kind, _), value in seen.items() if kind in _BY_TOKEN)
        batch = {ATTENTION_MASK: torch.ones(rows, tokens, dtype=torch.int64)}
    for name in comparison.columns:
        sizes = [tokens if isinstance(size, str) else size for size in teacher.specs[name].shape]
        batch[name] = torch.zeros(rows, *sizes)
    found = {}
    for key in comparison.wanted if seen is None else ():
        shape = comparison.student.shapes[key]
        square = key[0] in ("attentions", "attention_scores")
        middle = (*shape, tokens, tokens) if square else shape if key[0] == "pooled" else (tokens, *shape)
        found[key] = torch.zeros(rows, *middle)
    device = None if projections is None else next(projections.parameters()).device
    recorded = found if seen is None else seen
    sides = Sides(_on(batch, device), teacher, _on(recorded, device), projections, attention if seen else None)
    try:
        comparison.total(sides)
    except ValueError as error:
        raise ConfigError(f"the term {comparison.name!r}: {error}") from error


def _on(values: Mapping[Any, Tensor], device: torch.device | None) -> dict[Any, Tensor]:
    return {name: value.to(device) for name, value in values.items()}
