"""What a language model says now of the ids that a store has: not its own top k, nor draws of its own.

N positions, V vocabulary, K stored ids of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...store import schema
from ..config import DumpConfig
from ..logits.tokens import LOWEST, SAMPLED, TOP_K, Scores, TokenLogits


class AtStored(TokenLogits):
    """Takes the place of a task's TokenLogits for one batch. ids: int64 [N, K], those stored, in the batch's order;
    None where every logit is, or none.

    Of draws it gives how many of each id are to be expected: systematic draws are within one of it.
    """

    def __init__(self, config: DumpConfig, vocabulary: int, ids: np.ndarray | None):
        super().__init__(config, vocabulary)
        self._ids = None if ids is None else torch.from_numpy(np.ascontiguousarray(ids, np.int64))
        self._at, self._number, self.draws = 0, self.draws, None  # draws None: no random numbers are asked for
        self.kind = TOP_K if self.kind == SAMPLED else self.kind

    def _top(self, scores: Scores) -> dict[str, Tensor]:
        if self._ids is None:  # no logits are stored
            return {}
        ids = self._ids[self._at : self._at + len(scores.relative)].to(scores.relative.device)
        self._at += len(ids)
        relative = scores.relative.gather(1, ids)
        if self._number is None:
            return {schema.TOP_K_LOGITS: relative}
        other = torch.log_softmax(scores.relative / self.proposal, dim=-1).gather(1, ids)
        own = relative - scores.logsumexp[:, None]
        ratios = (own - other).exp().clamp(max=-LOWEST)
        return {schema.SAMPLE_COUNTS: self._number * other.exp(), schema.SAMPLE_RATIOS: ratios}


def stored_ids(found: dict[str, Any], mask: np.ndarray) -> np.ndarray | None:
    """int64 [N, K] of a batch of stored rows; mask: bool [B, S], positions with entries."""
    for name in (schema.TOP_K_INDICES, schema.SAMPLE_INDICES):
        if name in found:
            return found[name][mask].astype(np.int64)
    return None
