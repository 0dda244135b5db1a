"""What a store keeps of the teacher at each token, as targets of the loss: all logits, the largest, or samples.

N token positions of a batch are numbered through its rows: position b * S + s is token s of row b.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeAlias

import torch

from ...store.errors import ConfigError
from ...store.schema import (
    LOGITS,
    LOGSUMEXP,
    SAMPLE_COUNTS,
    SAMPLE_INDICES,
    SAMPLE_RATIOS,
    TOP_K_INDICES,
    TOP_K_LOGITS,
    FieldSpec,
    logsumexp_column,
)
from ..losses.sparse import SparseTargets, sample_targets, top_k_targets
from ..losses.terms import Term, check_dense, check_truncated
from ..objective import Batch

logger = logging.getLogger(__name__)
SAMPLED_LOSSES = ("kl", "soft_cross_entropy")  # linear in p, so unbiased where the samples are
Target: TypeAlias = torch.Tensor | SparseTargets
Columns: TypeAlias = Mapping[str, FieldSpec | None]  # of a store, or names alone


class DenseLogits:
    """Every logit of the teacher's vocabulary."""

    prediction = LOGITS  # column that tells what the teacher itself would say next

    def __init__(self, columns: Columns) -> None:
        """Nothing need be known of the column."""

    def check(self, term: Term) -> None:
        """Raises ConfigError where the term cannot be computed from what is stored."""
        check_dense(term)

    def columns(self, term: Term) -> list[str]:
        return [LOGITS]

    def targets(self, term: Term, batch: Batch, at: torch.Tensor, vocabulary: int) -> Target:
        """[N, V of the student]: a teacher's padding beyond it is cut off, what it has not cannot be (-inf)."""
        logits = at_positions(batch[LOGITS], at)[:, :vocabulary]
        missing = vocabulary - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def predictions(self, batch: Batch, at: torch.Tensor) -> torch.Tensor:
        """int64 [N]"""
        return at_positions(batch[LOGITS], at).argmax(-1)


class TopKLogits:
    """The largest logits, relative to the largest, with the log-sum-exp of all at one or more temperatures."""

    prediction = TOP_K_INDICES

    def __init__(self, columns: Columns) -> None:
        self.stored = set(columns)
        spec = columns[TOP_K_INDICES]
        self.vocabulary = int(spec.parameters["vocabulary"]) if spec and "vocabulary" in spec.parameters else None
        self.imported = spec.parameters.get("imported") if spec else None  # what others' values were, of an import

    def check(self, term: Term) -> None:
        check_truncated(term)
        exact = logsumexp_column(temperature_of(term))
        if self.imported == "logits":
            logger.warning("the store was imported from some logits of each token: what its others weigh is not known, "
                           "and they are taken to weigh nothing")  # fmt: skip
        elif exact not in self.stored and temperature_of(term) != 1:
            at = temperature_of(term)
            cure = "an import cannot know it" if self.imported else f"dump --temperatures {at:g} stores it"
            logger.warning(
                "the store has no %s: what the teacher's other tokens weigh at temperature %g is estimated; %s",
                exact, at, cure,
            )  # fmt: skip

    def columns(self, term: Term) -> list[str]:
        exact = logsumexp_column(temperature_of(term))
        return list(dict.fromkeys([TOP_K_LOGITS, TOP_K_INDICES, LOGSUMEXP, *({exact} & self.stored)]))

    def targets(self, term: Term, batch: Batch, at: torch.Tensor, vocabulary: int) -> Target:
        temperature = temperature_of(term)
        exact = logsumexp_column(temperature)
        return top_k_targets(
            at_positions(batch[TOP_K_LOGITS], at), at_positions(batch[LOGSUMEXP], at),
            at_positions(batch[TOP_K_INDICES], at), temperature=temperature,
            logsumexp_at=at_positions(batch[exact], at) if exact in batch else None,
            vocabulary=self.vocabulary or vocabulary,
        )  # fmt: skip

    def predictions(self, batch: Batch, at: torch.Tensor) -> torch.Tensor:
        return at_positions(batch[TOP_K_INDICES][..., :1], at)[:, 0]


class SampledTokens:
    """Tokens drawn from the teacher's distribution, with how often each was drawn."""

    prediction = ""

    def __init__(self, columns: Columns) -> None:
        self.weighted = SAMPLE_RATIOS in columns
        spec = columns[SAMPLE_COUNTS]
        self.draws = int(spec.parameters["draws"]) if spec and "draws" in spec.parameters else None

    def check(self, term: Term) -> None:
        if term.loss not in SAMPLED_LOSSES or term.options.get("standardize"):
            raise ConfigError(
                f"the store holds samples of the teacher's tokens, from which --loss {' or '.join(SAMPLED_LOSSES)} can "
                f"be computed, not {term.loss}: dump --top-k-logits for that"
            )
        if temperature_of(term) != 1:
            raise ConfigError(
                f"the store holds samples at temperature 1; got --temperature {temperature_of(term):g}: give 1, or "
                "dump --top-k-logits to be free in it"
            )

    def columns(self, term: Term) -> list[str]:
        return [SAMPLE_INDICES, SAMPLE_COUNTS, *([SAMPLE_RATIOS] if self.weighted else [])]

    def targets(self, term: Term, batch: Batch, at: torch.Tensor, vocabulary: int) -> Target:
        counts = at_positions(batch[SAMPLE_COUNTS], at)
        draws = self.draws or int(counts.sum(-1).amax()) if len(at) else 1
        ratios = at_positions(batch[SAMPLE_RATIOS], at) if self.weighted else None
        return sample_targets(at_positions(batch[SAMPLE_INDICES], at), counts, draws, ratios)

    def predictions(self, batch: Batch, at: torch.Tensor) -> None:
        """None: not even the most frequent draw is sure to be what the teacher would say."""


TokenTargets = DenseLogits | TopKLogits | SampledTokens
KINDS: dict[str, type[TokenTargets]] = {LOGITS: DenseLogits, TOP_K_LOGITS: TopKLogits, SAMPLE_INDICES: SampledTokens}


def token_targets(columns: Columns) -> TokenTargets | None:
    """What these columns hold of the teacher; None where they hold nothing of it."""
    return next((kind(columns) for column, kind in KINDS.items() if column in columns), None)


def temperature_of(term: Term) -> float:
    return term.temperature or 1.0


def at_positions(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] -> [N, ...]: entries of the N positions."""
    return values.flatten(0, 1).index_select(0, at)
