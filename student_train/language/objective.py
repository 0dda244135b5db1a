"""The objective of language models: token by token, and never the logits of a whole batch.

B rows, S tokens, V vocabulary, N the positions of a batch that predict a label: s where labels[s + 1] is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ...store.errors import ConfigError
from ...store.schema import LABELS, MISSING_LABEL, POSITION_IDS
from ..losses.fused import FusedLoss, TokenTerm
from ..losses.sparse import SparseTargets
from ..losses.terms import Term
from ..objective import Batch, Evaluated, Objective, Step, coefficients, term_names
from .losses import StudentTokens
from .targets import Columns, at_positions, token_targets

_NOTHING = (Term("labels"),)  # what an objective without terms runs, at no position
TEACHER_MASK = "teacher_mask"  # bool [B, S], which readers make where teacher fields are stored at some positions


class LanguageObjective(Objective):
    """Cross entropy to the next token, and divergences from the teacher's distribution of it.

    columns: what is stored of each row, by name. Raises ConfigError where a term cannot be computed from it.
    """

    keeps_logits = False
    judges_answers = False

    def __init__(self, terms: Sequence[Term], columns: Columns) -> None:
        super().__init__(terms)
        self.teacher, self.student = token_targets(columns), StudentTokens()
        for term in self.terms:
            self._check(term, columns)
        labelled = any(term.name == "labels" for term in self.terms)
        self.evaluated = self.terms if labelled else [*self.terms, Term("labels", weight=0.0)]

    def _check(self, term: Term, columns: Columns) -> None:
        if term.name == "pseudo_labels":
            raise ConfigError("--pseudo-labels is for rows without labels; every token of a text has its label")
        if term.name == "logits":
            if self.teacher is None:
                raise ConfigError(f"the rows hold no teacher's logits, but {', '.join(columns)}: dump --fields logits")
            self.teacher.check(term)

    @property
    def fields(self) -> list[str]:
        return list(dict.fromkeys(name for term in self.terms for name in self._columns(term)))

    @property
    def evaluation_fields(self) -> list[str]:
        seen = [self.teacher.prediction] if self.teacher and self.teacher.prediction else []
        return list(dict.fromkeys([*self.fields, *seen]))

    def counts(self, batch: Batch) -> torch.Tensor:
        for term in self.terms:
            if missing := [name for name in self._columns(term) if name not in batch]:
                raise ConfigError(f"the term {term.name!r} needs {missing[0]}, which these rows do not have")
        return _counts(self.terms, batch)

    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: torch.Tensor) -> Step:
        chosen, terms = positions(batch), self.terms or _NOTHING
        if not self.terms:  # the head runs at no position, so that DDP sees its gradient of 0
            chosen, counts = Positions(chosen.at[:0], chosen.labels[:0], None), counts.new_ones(1)
        outputs, found = self._run(model, inputs, batch, terms, counts, chosen)
        return Step(found.loss, found.sums[: len(self.terms)], outputs)

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        labels = batch[LABELS].clone()
        labels[rows:] = MISSING_LABEL
        batch = {**batch, LABELS: labels}
        places = [at for at, term in enumerate(self.evaluated) if all(name in batch for name in self._columns(term))]
        terms = [self.evaluated[at] for at in places]
        counts, chosen = _counts(terms, batch), positions(batch)
        _, found = self._run(model, inputs, batch, terms, counts, chosen, predictions=True)
        assert found.predictions is not None
        totals = torch.zeros(2, len(self.evaluated), dtype=torch.float64)
        totals[:, places] = torch.stack([found.sums, counts.to(found.sums)]).cpu().double()
        totals = torch.cat([totals.flatten(), self._compared(found.predictions, batch, chosen).cpu().double()])
        return Evaluated(found.loss if len(terms) == len(self.evaluated) else None, totals)

    def scores(self, totals: torch.Tensor) -> dict[str, float]:
        """totals: [2 * evaluated terms + 3], as `evaluate` gives them: sums, counts, and what `_compared` gives."""
        size = len(self.evaluated)
        sums, counts, (right, agreed, compared) = totals[:size], totals[size : 2 * size], totals[2 * size :].tolist()
        known = [at for at in range(size) if counts[at]]
        means = {term_names(self.evaluated)[at]: (sums[at] / counts[at]).item() for at in known}
        found = {f"loss_{name}": value for name, value in means.items()}
        if len(known) == size:
            weights = [term.weight for term in self.evaluated]
            found["loss"] = sum(weight * value for weight, value in zip(weights, means.values(), strict=True))
        if "labels" in means:
            found["perplexity"] = torch.tensor(means["labels"]).exp().item()
            found["token_accuracy"] = right / counts[term_names(self.evaluated).index("labels")].item()
        return {**found, "teacher_agreement": agreed / compared} if compared else found

    def _columns(self, term: Term) -> list[str]:
        return self.teacher.columns(term) if self.teacher and term.name == "logits" else []

    def _run(
        self, model: nn.Module, inputs: Batch, batch: Batch, terms: Sequence[Term], counts: torch.Tensor,
        chosen: Positions, predictions: bool = False,
    ) -> tuple[object, FusedLoss]:  # fmt: skip
        """What the model returned, and its losses. counts: int64 [terms]."""
        if POSITION_IDS in batch and POSITION_IDS not in inputs:
            raise ConfigError("the rows' documents are told apart by position_ids, which the student does not take")
        terms_of = partial(self._token_terms, terms, coefficients(terms, counts.float()), batch, chosen)
        return self.student.losses(model, inputs, chosen.at, terms_of, predictions=predictions)

    def _token_terms(
        self, terms: Sequence[Term], each: torch.Tensor, batch: Batch, chosen: Positions, vocabulary: int
    ) -> list[TokenTerm]:
        """each: [terms], their coefficients; vocabulary: size of the student's."""
        made = []
        for term, coefficient in zip(terms, each, strict=True):
            if self.teacher is None or term.name == "labels":
                made.append(TokenTerm(term, coefficient, None, chosen.labels))
            else:
                target = self.teacher.targets(term, batch, chosen.at, vocabulary)
                if isinstance(target, SparseTargets) and chosen.taught is not None:  # elsewhere the batch is padding
                    target = target._replace(logprobs=target.logprobs.masked_fill(~chosen.taught[:, None], -torch.inf))
                made.append(TokenTerm(term, coefficient, chosen.taught, target))
        return made

    def _compared(self, predictions: torch.Tensor, batch: Batch, chosen: Positions) -> torch.Tensor:
        """int64 [3]: predictions that are the label, those that are the teacher's, positions of the teacher."""
        right = (predictions == chosen.labels).sum()
        known = self.teacher is not None and self.teacher.prediction in batch
        theirs = self.teacher.predictions(batch, chosen.at) if self.teacher and known else None
        if theirs is None:
            return torch.stack([right, torch.zeros_like(right), torch.zeros_like(right)])
        taught = torch.ones_like(chosen.at, dtype=torch.bool) if chosen.taught is None else chosen.taught
        agreed = (predictions == theirs) & taught
        return torch.stack([right, agreed.sum(), taught.sum()])


class Positions(NamedTuple):
    """The N positions of a batch that predict a label, b * S + s each.

    at: int64 [N]; labels: int64 [N], what comes next; taught: bool [N], where the teacher is stored; None: everywhere.
    """

    at: torch.Tensor
    labels: torch.Tensor
    taught: torch.Tensor | None


def positions(batch: Batch) -> Positions:
    following = next_labels(batch)
    at = (following != MISSING_LABEL).flatten().nonzero().squeeze(1)
    taught = at_positions(batch[TEACHER_MASK], at).bool() if TEACHER_MASK in batch else None
    return Positions(at, at_positions(following, at), taught)


def next_labels(batch: Batch) -> torch.Tensor:
    """int64 [B, S]: the label that each position predicts, -100 where there is none."""
    if LABELS not in batch:
        raise ConfigError("rows of a language model need labels: the row's input_ids, or -100 where nothing is learnt")
    following = torch.full_like(batch[LABELS], MISSING_LABEL)
    following[:, :-1] = batch[LABELS][:, 1:]
    return following


def _counts(terms: Sequence[Term], batch: Batch) -> torch.Tensor:
    """int64 [terms]: positions that each term speaks of."""
    predicting = next_labels(batch) != MISSING_LABEL
    taught = predicting & batch[TEACHER_MASK].bool() if TEACHER_MASK in batch else predicting
    found = [(predicting if term.name == "labels" else taught).sum() for term in terms]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)
