"""Where an answer begins and ends: the teacher's logits of both over the tokens of a window, and the label's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...store.errors import ConfigError, DataError, StoreMismatch
from ...store.reader import TeacherRows
from ...store.schema import (
    ATTENTION_MASK,
    END_LOGITS,
    END_POSITIONS,
    MISSING_LABEL,
    OFFSETS,
    START_LOGITS,
    START_POSITIONS,
)
from .. import spans
from ..losses.catalogue import SINGLE_LABEL
from ..losses.rows import row_loss
from ..losses.terms import Term, check_term
from ..objective import Batch, Evaluated, Objective, Step
from ..settings import DEFAULT_TEMPERATURE
from ..tokens import check_positions, tokenizer_difference

_ENDS, _POSITIONS = (START_LOGITS, END_LOGITS), (START_POSITIONS, END_POSITIONS)
_DENSE = ("nlp_architect_mse",)  # losses that have no value where a token cannot be the answer
_MANY = 3  # classes; as many as a row has tokens


class QuestionAnswering:
    """Students that find answers in a text, as tasks/__init__.py asks for them."""

    model_class = "AutoModelForQuestionAnswering"
    temperature = DEFAULT_TEMPERATURE
    columns = _ENDS
    averaged = dict(zip(_ENDS, _POSITIONS, strict=True))
    settings: dict[str, Any] = {}
    compute_metrics = None
    pipeline = "question-answering"
    usage = (
        "from transformers import AutoModelForQuestionAnswering, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForQuestionAnswering.from_pretrained(folder)",
        'inputs = tokenizer("Who …?", "A text that says who.", return_tensors="pt")',
        "outputs = model(**inputs)",
        "first, last = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
        'tokenizer.decode(inputs["input_ids"][0, first : last + 1])',
    )

    def __init__(self, store: Any) -> None:
        self.store = store

    def objective(self, terms: Sequence[Term]) -> SpanObjective:
        if any(term.name != "labels" for term in terms) and START_LOGITS not in self.store.fields:
            kept = ", ".join(self.store.fields)
            raise ConfigError(f"{self.store.path} has no {START_LOGITS}, but {kept}: dump --fields logits")
        return SpanObjective(terms)

    def check_config(self, name: str, config: Any) -> None:
        """Every reader has this head."""

    def check_student(self, model: nn.Module) -> None:
        """Any reader will do."""

    def check_rows(self, model: nn.Module, longest: int) -> None:
        check_positions(model, longest)

    def learnable(self, rows: TeacherRows, objective: Objective) -> TeacherRows:
        """To train on labels only: the rows that have one."""
        if set(objective.fields) - set(_POSITIONS):
            return rows
        kept = np.asarray(rows.with_fields(_POSITIONS).column(START_POSITIONS)) != MISSING_LABEL
        return rows.kept(kept)

    def retokenized(self, rows: Any, tokenizer: Any, text_column: str | None) -> Any:
        raise StoreMismatch(
            f"{tokenizer_difference(rows.store, tokenizer)}; a reader learns which of the teacher's own tokens an "
            "answer begins and ends with: give a student with the store's tokenizer"
        )

    def card_notes(self, config: Any) -> list[str]:
        return ["Exact match and F1 are SQuAD's, in percent; the questions' contexts were read in windows."]


class SpanObjective(Objective):
    """What a batch of windows costs: each term is the mean of its values for start and for end, over the row's tokens.

    Padding is no token: it enters neither softmax. Raises ConfigError where no term is left, or a term cannot teach
    where an answer is.
    """

    keeps_logits = False
    judges_rows = True
    threshold, longest = 0.0, spans.LONGEST

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__(terms)
        for term in self.terms:
            check_term(term, SINGLE_LABEL, _MANY)
            if term.loss in _DENSE:
                raise ConfigError(f"loss {term.loss} is not defined where rows differ in length; take mse")

    def settle(self, settings: Any) -> None:
        self.threshold, self.longest = settings.no_answer_threshold, settings.max_answer_length

    @property
    def fields(self) -> list[str]:
        labelled = [name for name in _POSITIONS if any(_reads_labels(term) for term in self.terms)]
        return [*labelled, *(name for name in _ENDS if any(term.name != "labels" for term in self.terms))]

    @property
    def evaluation_fields(self) -> list[str]:
        return [*_POSITIONS, *_ENDS, OFFSETS]  # to be judged and compared, whatever the terms read

    def counts(self, batch: Batch) -> torch.Tensor:
        found = [self._valid(term, batch).sum() for term in self.terms]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)

    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: torch.Tensor) -> Step:
        outputs = model(**inputs)
        sums = self.sums(span_logits(outputs), batch)
        return Step(self.combine(sums, counts), sums.detach(), outputs)

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        logits = span_logits(model(**inputs))
        kept = self._candidates(logits, batch)
        batch = {name: value[:rows] for name, value in batch.items()}
        if not all(name in batch for name in self.fields):
            return Evaluated(None, None, kept)
        sums, counts = self.sums(logits[:rows], batch), self.counts(batch)
        return Evaluated(self.combine(sums, counts), torch.cat([sums, counts.to(sums)]), kept)

    def scores(self, totals: torch.Tensor) -> dict[str, float]:
        """totals: sums [terms], counts [terms]."""
        sums, counts = totals.chunk(2)
        found = {"loss": self.combine(sums, counts).item()}
        for name, value, count in zip(self.names, sums.tolist(), counts.tolist(), strict=True):
            if count:
                found[f"loss_{name}"] = value / count
        return found

    def row_scores(self, rows: Any, kept: Any) -> dict[str, float]:
        return {} if kept is None else spans.judged(rows, np.asarray(kept), self.threshold)

    def sums(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[terms], float32 or wider: each term summed over its rows. logits: [B, 2, S]."""
        mask = _mask(batch)
        if logits.shape[-1] != mask.shape[-1]:
            raise DataError(f"logits for {mask.shape[-1]} tokens a row expected; the student gives {logits.shape[-1]}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        own = logits.masked_fill(~mask, -torch.inf)
        teacher, labels, found = _teacher(batch), _labels(batch), []
        for term in self.terms:
            loss, _ = row_loss(term, own, teacher, labels, problem_type=SINGLE_LABEL)
            found.append(torch.where(self._valid(term, batch), loss.mean(-1), 0).sum())
        return torch.stack(found) if found else logits.flatten()[:0]  # with a graph, for DDP

    def _valid(self, term: Term, batch: Batch) -> torch.Tensor:
        """bool [B]: the rows that a term speaks of."""
        labels, mask = _labels(batch), _mask(batch)
        free = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        if labels is not None:
            free = (labels == MISSING_LABEL).any(-1)
        if term.name == "labels":
            return ~free
        teacher = _teacher(batch)
        if teacher is None:
            raise ConfigError(f"the term {term.name!r} needs {START_LOGITS}, which these rows do not have")
        if term.name == "pseudo_labels":
            return free & (teacher.softmax(-1).amax(-1) >= term.options["threshold"]).all(-1)
        return torch.ones_like(free)

    def _candidates(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """[B, 1 or 2, 1 + K, 3]: the student's, and the teacher's where it is there."""
        if OFFSETS not in batch:
            return None
        taught = [torch.stack([batch[name] for name in _ENDS], 1)] if all(name in batch for name in _ENDS) else []
        made = [
            spans.candidates(each, batch[OFFSETS], _mask(batch)[:, 0], longest=self.longest)
            for each in (logits, *taught)
        ]
        return torch.stack(made, 1)


def span_logits(outputs: Any) -> torch.Tensor:
    """[B, 2, S], starts and ends, of whatever a model returns. Raises ConfigError where it has none."""
    found: list[Any]
    if isinstance(outputs, Mapping):
        found = [outputs.get("start_logits"), outputs.get("end_logits")]
    elif hasattr(outputs, "start_logits"):
        found = [outputs.start_logits, outputs.end_logits]
    else:
        found = list(outputs[:2]) if isinstance(outputs, tuple) else []
    shapes = {tuple(one.shape) for one in found if isinstance(one, torch.Tensor) and one.ndim == 2}
    if len(found) < 2 or len(shapes) != 1 or any(one is None for one in found):
        raise ConfigError(
            "a student that gives start_logits and end_logits [B, S], or a tuple that begins with both, expected; it "
            f"gives {type(outputs).__name__}: give a model for question answering"
        )
    return torch.stack(found, 1)


def _reads_labels(term: Term) -> bool:
    return term.name in ("labels", "pseudo_labels") or term.loss == "dkd"


def _mask(batch: Batch) -> torch.Tensor:
    """bool [B, 1, S]: which tokens can be the answer's."""
    if ATTENTION_MASK not in batch:
        raise ConfigError(f"rows with {ATTENTION_MASK} expected, by which padding is left out; they have none")
    return batch[ATTENTION_MASK].bool().unsqueeze(1)


def _teacher(batch: Batch) -> torch.Tensor | None:
    """[B, 2, S], -inf in padding."""
    if not all(name in batch for name in _ENDS):
        return None
    found = torch.stack([batch[name] for name in _ENDS], 1)
    return found.to(torch.promote_types(found.dtype, torch.float32)).masked_fill(~_mask(batch), -torch.inf)


def _labels(batch: Batch) -> torch.Tensor | None:
    """int64 [B, 2]."""
    return torch.stack([batch[name] for name in _POSITIONS], 1) if all(name in batch for name in _POSITIONS) else None
