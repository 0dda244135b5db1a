"""What the trainer asks of a loss: weighted terms into one, each with its own denominator.

In a micro-batch term k has a sum over the rows (or tokens) that it speaks of, and their count; over an
accumulation window and all ranks

    loss = Σ_k weight_k · (sum of the sums of term k) / (sum of the counts of term k)

so gradient accumulation, uneven micro-batches and several ranks give the loss of one large batch, also where
a micro-batch has no labelled row at all. A term without any row in the window adds nothing.

Each task has its own Objective (tasks/), which runs the student: what a language model has to keep of a batch
is not what a classifier has to.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..store.errors import ConfigError
from ..store.images.pixels import PIXEL_HASH, PIXEL_VALUES
from ..store.schema import END_POSITIONS, INPUT_IDS, LABELS, OFFSETS, START_POSITIONS, WORD_IDS
from .losses.terms import Term

Batch = Mapping[str, torch.Tensor]
NEVER_GIVEN = {  # columns that no student is given
    LABELS, START_POSITIONS, END_POSITIONS, OFFSETS, WORD_IDS, PIXEL_HASH,
}  # fmt: skip


class Step(NamedTuple):
    """A micro-batch of training. loss: scalar, with its graph; sums: [terms], without; what the model returned."""

    loss: torch.Tensor
    sums: torch.Tensor
    outputs: Any


class Evaluated(NamedTuple):
    """A batch of evaluation. loss: its mean; totals: [n], to be added up; None where columns are missing.

    logits: [B, C], or what else of each row metrics are computed of; None for a task that keeps none.
    """

    loss: torch.Tensor | None
    totals: torch.Tensor | None
    logits: torch.Tensor | None = None


class Objective(ABC):
    """What a batch costs a student.

    terms: weighted terms; those of weight 0 are left out, and their columns are not read. None at all is allowed: such
    an objective runs the student for another that has terms of its own (inside/objective.py), and its loss is 0.
    Raises ConfigError where each has weight 0.
    """

    keeps_logits: bool  # for compute_metrics
    stored_fields: Sequence[str] = ()  # of `fields`, those that it decodes itself, where it computes
    looks_inside = False  # does `attach` look at the student?
    judges_answers = True  # does `evaluate` look at nothing but what the student returns?
    judges_rows = False  # does `row_scores` wait for what `evaluate` keeps of each row?

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = [term for term in terms if term.weight]
        if terms and not self.terms:
            raise ConfigError("every term of the loss has weight 0; give one of them a weight above 0")

    def settle(self, settings: Any) -> None:  # noqa: B027
        """Take from DistillationSettings what is not said by terms."""

    def attach(self, model: nn.Module, inputs: Batch) -> None:  # noqa: B027
        """Meet the student before its optimizer does. inputs: of some rows, those columns that it takes."""

    @property
    @abstractmethod
    def fields(self) -> list[str]:
        """Teacher columns that the terms read."""

    @property
    @abstractmethod
    def evaluation_fields(self) -> list[str]:
        """Teacher columns that evaluation reads where they are stored."""

    @abstractmethod
    def counts(self, batch: Batch) -> torch.Tensor:
        """int64 [terms]: rows (or tokens) of a batch that each term speaks of; the student is not asked."""

    @abstractmethod
    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: torch.Tensor) -> Step:
        """Run `model` on `inputs`, those columns of `batch` that it takes. counts: int64 [terms] of the window."""

    @abstractmethod
    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        """The same without gradients, of the first `rows` rows; the others only fill the batch."""

    @abstractmethod
    def scores(self, totals: torch.Tensor) -> dict[str, float]:
        """Metrics, `loss` among them, from the totals of all batches and ranks: float64 [n]."""

    def row_scores(self, rows: Any, kept: Any) -> dict[str, float]:
        """Metrics of rows of a store that need more of them than a batch: `kept` is what `evaluate` kept of each, in
        order, an array [N, ...]; None where it kept nothing."""
        return {}

    @property
    def names(self) -> list[str]:
        """One name a term, for logs: labels, logits, pseudo_labels; a second of its kind has its number."""
        return term_names(self.terms)

    def combine(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Scalar: sums [terms] over counts [terms] of the whole window, weighted."""
        return (coefficients(self.terms, counts.to(sums)) * sums).sum()


class Totals:
    """Sums [n] that stay on their device until they are asked for."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        self.sums = values if self.sums is None else self.sums + values

    def drain(self) -> torch.Tensor | None:
        sums, self.sums = self.sums, None
        return sums


def coefficients(terms: Sequence[Term], counts: torch.Tensor) -> torch.Tensor:
    """[terms]: what the loss of one row (or token) is multiplied by. counts: float [terms], of the whole window."""
    return counts.new_tensor([term.weight for term in terms]) / counts.clamp(min=1)


def term_names(terms: Sequence[Term]) -> list[str]:
    kinds = [term.name for term in terms]
    return [kind if kinds.index(kind) == at else f"{kind}_{at}" for at, kind in enumerate(kinds)]


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits in whatever a model returns."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def accepted_inputs(model: Any) -> set[str]:
    """Names that a student's forward takes, labels left out; empty where it takes any."""
    student = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's
    parameters = inspect.signature(student.forward).parameters
    varying = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name for name, one in parameters.items() if one.kind not in varying}
    open_ended = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
    return set() if open_ended and not named & {INPUT_IDS, PIXEL_VALUES} else named - NEVER_GIVEN
