"""One answer a row: the teacher's logits [C] and the row's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...store.errors import ConfigError, DataError
from ...store.reader import TeacherRows
from ...store.schema import ATTENTION_MASK, LABELS, LOGITS, MISSING_LABEL
from ..losses.catalogue import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from ..losses.rows import row_loss
from ..losses.terms import Term, check_term
from ..metrics import agreement, compute_metrics_for
from ..objective import Batch, Evaluated, Objective, Step, logits_of
from ..settings import DEFAULT_TEMPERATURE
from ..tokens import check_positions, retokenized


class TextClassification:
    """Students that label a text or a pair of texts, as tasks/__init__.py asks for them."""

    model_class = "AutoModelForSequenceClassification"
    temperature = DEFAULT_TEMPERATURE
    columns = (LOGITS,)
    averaged: Mapping[str, str] = {LOGITS: LABELS}
    pipeline = "text-classification"
    usage = ('classify = pipeline("text-classification", model="path/to/this/folder")', 'classify("…")')

    def __init__(self, store: Any) -> None:
        self.store, self.problem_type = store, problem_type_of(store)
        self.settings = label_settings(store)
        self.compute_metrics = compute_metrics_for(self.problem_type)

    def objective(self, terms: Sequence[Term]) -> ClassificationObjective:
        return ClassificationObjective(terms, self.problem_type, self.settings["num_labels"])

    def check_config(self, name: str, config: Any) -> None:
        """A head that was trained for another number of labels is refused."""
        refuse_other_head(name, config, "ForSequenceClassification", self.settings["num_labels"])

    def check_student(self, model: nn.Module) -> None:
        """Any classifier will do."""

    def check_rows(self, model: nn.Module, longest: int) -> None:
        check_positions(model, longest)

    def learnable(self, rows: TeacherRows, objective: Objective) -> TeacherRows:
        """To train on labels only: the rows that have one."""
        if objective.fields:
            return rows
        if LABELS not in rows.store.fields:
            raise ConfigError(f"{rows.store.path} has no labels to train on; give --alpha above 0")
        labels = torch.as_tensor(rows.column(LABELS))
        kept = (~unlabelled({LABELS: labels}, self.problem_type, self.settings["num_labels"])).any(-1).numpy()
        return rows.kept(kept)

    def retokenized(self, rows: TeacherRows, tokenizer: Any, text_column: str | None) -> Any:
        asked = rows.store.settings
        dumped = [asked.get("text_column"), asked.get("text_pair_column")]
        columns = [text_column] if text_column else dumped
        return retokenized(rows, tokenizer, [one for one in columns if one], asked.get("max_length"))

    def card_notes(self, config: Any) -> list[str]:
        return ["Labels: " + ", ".join(f"`{label}`" for label in config.id2label.values()) + "."]


def refuse_other_head(name: str, config: Any, kind: str, num_labels: int) -> None:
    """Raises DataError where the student `name` has a head of this kind for another number of labels."""
    heads = [one for one in config.architectures or [] if one.endswith(kind)]
    if heads and config.num_labels != num_labels:
        raise DataError(
            f"student {name} has a head of {config.num_labels} labels, the store's teacher has {num_labels}: give a "
            "student of as many labels, or one without a head"
        )


def label_settings(store: Any) -> dict[str, Any]:
    """num_labels, id2label, label2id and problem_type of a config, as the store's teacher has them."""
    if LOGITS not in store.fields:
        raise ConfigError(f"{store.path} has no {LOGITS}, but {', '.join(store.fields)}: dump --fields logits")
    count = int(store.fields[LOGITS].shape[-1])
    names = store.label_names or [f"LABEL_{number}" for number in range(count)]
    return {
        "num_labels": count,
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": problem_type_of(store),
    }


def problem_type_of(store: Any) -> str:
    """The kind of head that made a store's logits, as transformers' configs name it.

    Told by the shape of the labels where the dump did not say.
    """
    if store.settings.get("problem_type") in PROBLEM_TYPES:
        return store.settings["problem_type"]
    labels = store.fields.get(LABELS)
    if labels is None:
        return REGRESSION if LOGITS in store.fields and store.fields[LOGITS].shape == (1,) else SINGLE_LABEL
    if labels.dtype.startswith("int"):
        return SINGLE_LABEL
    return MULTI_LABEL if labels.shape else REGRESSION


class ClassificationObjective(Objective):
    """What a batch of student logits costs.

    problem_type, num_labels: of the head, as transformers' configs name them.
    Raises ConfigError where no term is left, or a term cannot teach such a head.
    """

    keeps_logits = True

    def __init__(self, terms: Sequence[Term], problem_type: str, num_labels: int) -> None:
        super().__init__(terms)
        self.problem_type, self.num_labels = problem_type, num_labels
        for term in self.terms:
            check_term(term, problem_type, num_labels)

    @property
    def fields(self) -> list[str]:
        return [LOGITS] if any(term.name != "labels" for term in self.terms) else []

    @property
    def evaluation_fields(self) -> list[str]:
        return [LOGITS]  # for the agreement, whatever the terms read

    def counts(self, batch: Batch) -> torch.Tensor:
        found = [self._mask(term, batch).sum() for term in self.terms]
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.int64)

    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: torch.Tensor) -> Step:
        outputs = model(**inputs)
        sums = self.sums(logits_of(outputs), batch)
        return Step(self.combine(sums, counts), sums.detach(), outputs)

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        logits = self.check_logits(logits_of(model(**inputs)))
        batch = {name: value[:rows] for name, value in batch.items()}
        if not all(name in batch for name in self.fields):
            return Evaluated(None, None, logits)
        sums, counts = self.sums(logits[:rows], batch), self.counts(batch)
        found = [sums.new_zeros(())] * 2
        if LOGITS in batch and self.problem_type != REGRESSION:
            agreed = agreement(logits[:rows], batch[LOGITS], self.problem_type)[self.spoken_of(batch)]
            found = [agreed.sum(), sums.new_tensor(agreed.numel())]
        return Evaluated(self.combine(sums, counts), torch.stack([*sums, *counts.to(sums), *found]), logits)

    def scores(self, totals: torch.Tensor) -> dict[str, float]:
        """totals: sums [terms], counts [terms], rows that agree with the teacher, rows compared."""
        size = len(self.terms)
        sums, counts, (agreed, compared) = totals[:size], totals[size : 2 * size], totals[2 * size :].tolist()
        found = {"loss": self.combine(sums, counts).item()}
        for name, value, count in zip(self.names, sums.tolist(), counts.tolist(), strict=True):
            if count:
                found[f"loss_{name}"] = value / count
        return {**found, "teacher_agreement": agreed / compared} if compared else found

    def sums(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[terms], float32 or wider: each term summed over its rows. logits: [B, C] or [B, S, C]."""
        teacher, labels = batch.get(LOGITS), batch.get(LABELS)
        logits = self.check_logits(logits)
        found = []
        for term in self.terms:
            loss, valid = row_loss(term, logits, teacher, labels, problem_type=self.problem_type)
            found.append(torch.where(valid & self._mask(term, batch), loss, 0).sum())
        return torch.stack(found) if found else logits.flatten()[:0].float()  # with a graph, for DDP

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
        """bool [B] or [B, S]: the rows or tokens that the term speaks of."""
        if term.name == "labels":
            return unlabelled(batch, self.problem_type, self.num_labels).logical_not().any(-1)
        if LOGITS not in batch:
            raise ConfigError(f"the term {term.name!r} needs {LOGITS}, which these rows do not have")
        spoken_of = self.spoken_of(batch)
        if term.name == "pseudo_labels":
            free = unlabelled(batch, self.problem_type, self.num_labels)
            sure = confidence(batch[LOGITS].float(), self.problem_type) >= term.options["threshold"]
            return spoken_of & (free & sure).any(-1)
        return spoken_of

    def spoken_of(self, batch: Batch) -> torch.Tensor:
        """bool [B] or [B, S]: the rows or tokens whose teacher logits count."""
        teacher = batch[LOGITS]
        if teacher.ndim == 3:
            return batch[ATTENTION_MASK].bool()
        return teacher.new_ones(len(teacher), dtype=torch.bool)


def unlabelled(batch: Mapping[str, torch.Tensor], problem_type: str, num_labels: int) -> torch.Tensor:
    """bool [..., 1], or [..., C] for several labels: which entries have no label."""
    labels = batch.get(LABELS)
    if labels is None:
        first = batch.get(LOGITS, next(iter(batch.values())))
        shape = first.shape[:-1] if LOGITS in batch else first.shape[:1]
        width = num_labels if problem_type == MULTI_LABEL else 1
        return torch.ones(*shape, width, dtype=torch.bool, device=first.device)
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
