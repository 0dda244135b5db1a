"""Terms into one loss, each with its own denominator.

A run is a list of weighted terms. In a micro-batch term k has a sum over the rows (or tokens) that it speaks
of, and their count; over an accumulation window and all ranks

    loss = Σ_k weight_k · (sum of the sums of term k) / (sum of the counts of term k)

so gradient accumulation, uneven micro-batches and several ranks give the loss of one large batch, also where
a micro-batch has no labelled row at all. A term without any row in the window adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..store.errors import ConfigError, DataError
from ..store.schema import ATTENTION_MASK, LABELS, LOGITS, MISSING_LABEL
from .losses.rows import row_loss
from .losses.terms import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Term, check_term

Batch = Mapping[str, torch.Tensor]


class Objective:
    """What a batch of student logits costs.

    terms: weighted terms; those of weight 0 are left out, and their columns are not read.
    problem_type, num_labels: of the head, as transformers' configs name them.
    Raises ConfigError where no term is left, or a term cannot teach such a head.
    """

    def __init__(self, terms: Sequence[Term], problem_type: str, num_labels: int) -> None:
        self.terms = [term for term in terms if term.weight]
        self.problem_type, self.num_labels = problem_type, num_labels
        if not self.terms:
            raise ConfigError("every term of the loss has weight 0; give one of them a weight above 0")
        for term in self.terms:
            check_term(term, problem_type, num_labels)

    @property
    def fields(self) -> list[str]:
        """Teacher columns that the terms read."""
        return [LOGITS] if any(term.name != "labels" for term in self.terms) else []

    @property
    def names(self) -> list[str]:
        """One name a term, for logs: labels, logits, pseudo_labels; a second of its kind has its number."""
        kinds = [term.name for term in self.terms]
        return [kind if kinds.index(kind) == at else f"{kind}_{at}" for at, kind in enumerate(kinds)]

    def counts(self, batch: Batch) -> torch.Tensor:
        """int64 [terms]: rows (or tokens) that each term speaks of."""
        return torch.stack([self._mask(term, batch).sum() for term in self.terms])

    def sums(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[terms], float32 or wider: each term summed over its rows. logits: [B, C] or [B, S, C]."""
        teacher, labels = batch.get(LOGITS), batch.get(LABELS)
        logits = self.check_logits(logits)
        found = []
        for term in self.terms:
            loss, valid = row_loss(term, logits, teacher, labels, problem_type=self.problem_type)
            found.append(torch.where(valid & self._mask(term, batch), loss, 0).sum())
        return torch.stack(found)

    def combine(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Scalar: sums [terms] over counts [terms] of the whole window, weighted."""
        weights = torch.tensor([term.weight for term in self.terms], dtype=sums.dtype, device=sums.device)
        return (weights * sums / counts.clamp(min=1).to(sums)).sum()

    def check_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., C], as many classes as the teacher has; a regression head may give [B]. Raises DataError."""
        if self.problem_type == REGRESSION and logits.ndim == 1:
            logits = logits.unsqueeze(-1)
        if logits.shape[-1] != self.num_labels:
            raise DataError(
                f"the student's logits have {logits.shape[-1]} labels, the store's teacher has "
                f"{self.num_labels}: give the student a head of {self.num_labels}"
            )
        return logits

    def _mask(self, term: Term, batch: Batch) -> torch.Tensor:
        """bool [B] or [B, S]: the rows or tokens that the term speaks of; the student is not asked."""
        if term.name == "labels":
            return unlabelled(batch, self.problem_type, self.num_labels).logical_not().any(-1)
        if LOGITS not in batch:
            raise ConfigError(f"the term {term.name!r} needs {LOGITS}, which these rows do not have")
        teacher = batch[LOGITS].float()
        if term.name == "pseudo_labels":
            free = unlabelled(batch, self.problem_type, self.num_labels)
            return (free & (confidence(teacher, self.problem_type) >= term.options["threshold"])).any(-1)
        if teacher.ndim == 3:
            return batch[ATTENTION_MASK].bool()
        return teacher.new_ones(len(teacher), dtype=torch.bool)


def unlabelled(batch: Batch, problem_type: str, num_labels: int) -> torch.Tensor:
    """bool [..., 1], or [..., C] for several labels: which entries have no label."""
    labels = batch.get(LABELS)
    if labels is None:
        first = next(iter(batch.values()))
        width = num_labels if problem_type == MULTI_LABEL else 1
        return torch.ones(len(first), width, dtype=torch.bool, device=first.device)
    if problem_type == SINGLE_LABEL:
        return (labels == MISSING_LABEL).unsqueeze(-1)
    return labels.isnan() if labels.ndim > 1 else labels.isnan().unsqueeze(-1)


def confidence(teacher: torch.Tensor, problem_type: str) -> torch.Tensor:
    """[..., 1]: probability of the teacher's prediction; [..., C] for several labels; 1 for regression."""
    if problem_type == REGRESSION:
        return torch.ones_like(teacher)
    if problem_type == MULTI_LABEL:
        return torch.sigmoid(teacher.abs())
    return torch.softmax(teacher, -1).amax(-1, keepdim=True)
