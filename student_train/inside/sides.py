"""Both sides of a batch: the teacher's tensors as the store has them, and the student's as they were recorded.

B rows, S tokens, D width, H heads, d head size; `teacher.py` says what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...store.attention import AttentionSettings, attention_probabilities, attention_scores, visible_keys
from ...store.errors import ConfigError
from ...store.images.pixels import PIXEL_VALUES
from ...store.schema import ATTENTION_MASK, POSITION_IDS
from ..objective import Batch
from .pieces import WHOLE, Piece
from .projections import Projections
from .stored import StoredBatch
from .teacher import MAPS, OF_QUERIES, POOLED, TeacherInside

_ATTENDING = ("queries", "keys", "values", *OF_QUERIES)


class Sides:
    """A batch as the losses of the inside ask for it; what several of them ask for is made once.

    found: what was recorded of the student, by (kind, layer), its first rows those of the batch. projections: of the
    student's hidden states. attention: settings of those layers of the student whose attention is computed here, of
    queries and keys that were recorded. piece: of the batch, what it is all about; `found` is of that piece alone.
    """

    def __init__(
        self, batch: Batch, teacher: TeacherInside, found: Mapping[Any, Tensor] | None = None,
        projections: Projections | None = None, attention: Mapping[int, AttentionSettings] | None = None,
        piece: Piece = WHOLE,
    ) -> None:  # fmt: skip
        if ATTENTION_MASK not in batch and PIXEL_VALUES not in batch:
            raise ConfigError("losses of what is inside a model need attention_mask, which these rows do not have")
        self._batch = StoredBatch(batch, teacher.specs, piece)
        self._teacher, self._projections = teacher, projections
        self._found, self._attention = {} if found is None else found, attention or {}
        self.mask = self._batch[ATTENTION_MASK].bool() if ATTENTION_MASK in batch else None  # [B, S]; None: all count
        some = batch[PIXEL_VALUES] if self.mask is None else self.mask
        self.rows, self.device = len(some) if piece.rows is None else len(piece.rows), some.device
        self._visible: dict[tuple[Any, ...], Tensor] = {}

    def visible(self, layer: int) -> Tensor:
        """bool [B, 1, S, S]: the keys that each query of the teacher's attention `layer` sees."""
        stored = next(kind for kind in _ATTENDING if layer in self._teacher.layers(kind))
        return self._seen(self._teacher.settings(layer), self._teacher.positions(stored, layer))

    def _seen(self, settings: AttentionSettings, positions: int | None) -> Tensor:
        key = settings.causal, settings.window, positions
        if key not in self._visible:
            mask = self.counting(positions)
            self._visible[key] = visible_keys(mask, settings, self._batch.get(POSITION_IDS))
        return self._visible[key]

    def counting(self, positions: int | None) -> Tensor:
        """bool [B, S]: the mask; where every row has as many positions, one of these, all of which count."""
        if positions is None:
            assert self.mask is not None
            return self.mask
        return torch.ones(self.rows, positions, dtype=torch.bool, device=self.device)

    def teacher(self, kind: str, layer: int | str, grid: tuple[int, int] | None = None) -> Tensor:
        visible = self.visible(int(layer)) if kind in OF_QUERIES else None
        return as_positions(self._teacher.read(kind, layer, self._batch, visible), kind, grid)

    def student(self, kind: str, layer: int | str, projection: str = "", grid: tuple[int, int] | None = None) -> Tensor:
        """projection: a key of the projections; as it is where there is none of this key."""
        if kind in OF_QUERIES and layer in self._attention:
            return self._attended(kind, int(layer))
        value = as_positions(self._found[kind, layer][: self.rows], kind, grid)
        if self._projections is not None and projection in self._projections:
            return self._projections(projection, value)
        return value

    def _attended(self, kind: str, layer: int) -> Tensor:
        settings = self._attention[layer]
        queries, keys = (self._found[name, layer][: self.rows] for name in ("queries", "keys"))
        scores = attention_scores(queries, keys, settings)
        if kind == "attention_scores":
            return scores
        return attention_probabilities(scores, self._seen(settings, queries.shape[1] if self.mask is None else None))


def as_positions(value: Tensor, kind: str, grid: tuple[int, int] | None) -> Tensor:
    """A map [B, C, H, W] as [B, H * W, C], brought to `grid` by average pooling; pooled [B, C, 1, 1] as [B, C]; others
    as they are."""
    if kind == POOLED:
        return value.flatten(1)
    if kind not in MAPS or value.dim() != 4:
        return value
    if grid is not None and value.shape[2:] != grid:
        value = F.adaptive_avg_pool2d(value.to(torch.promote_types(value.dtype, torch.float32)), grid)
    return value.flatten(2).mT
