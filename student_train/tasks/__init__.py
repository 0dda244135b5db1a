"""One file a task: which student learns it, what its rows cost, and what is said of it afterwards.

To add a task: write its class in a file here, with what `Task` asks for, and add its line to `TASKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...store.errors import ConfigError
from ...store.schema import WORD_IDS
from ..dataset import is_store_rows
from ..losses.catalogue import INNER, REGRESSION, SINGLE_LABEL
from ..losses.terms import Term
from ..objective import Objective
from ..settings import DEFAULT_TEMPERATURE


class Entry(NamedTuple):
    """Where a task lives, and settings that it knows and not every task does."""

    module: str
    name: str
    settings: tuple[str, ...] = ()


TASKS = {
    "text-classification": Entry("text_classification", "TextClassification"),
    "question-answering": Entry(
        "question_answering", "QuestionAnswering", ("max_answer_length", "no_answer_threshold")
    ),
    "token-classification": Entry("token_classification", "TokenClassification"),
    "causal-lm": Entry("causal_lm", "CausalLM"),
    "image-classification": Entry("image_classification", "ImageClassification", ("pixel_check",)),
    "semantic-segmentation": Entry("semantic_segmentation", "SemanticSegmentation", ("pixel_check",)),
}


class Task(Protocol):
    """What training asks of a task. Built as `Task(store)`; raises ConfigError, DataError, StoreMismatch."""

    model_class: str  # transformers' Auto class that loads students
    temperature: float  # of the teacher's part where none is asked for
    columns: Sequence[str]  # of the store, that must agree where several stores are read one after another
    averaged: Mapping[str, str]  # columns that an ensemble averages, and the labels of each ("": none)
    settings: dict[str, Any]  # what a student's config must say
    compute_metrics: Callable[[Any], dict[str, float]] | None  # of logits, as a Trainer takes it
    pipeline: str  # transformers' name of the task, for the card
    usage: Sequence[str]  # lines of Python for the card

    def objective(self, terms: Sequence[Term]) -> Objective:
        """Of a run with these terms."""

    def check_config(self, name: str, config: Any) -> None:
        """Can the pretrained student `name` have this task's head?"""

    def check_student(self, model: nn.Module) -> None:
        """Can this student learn from the store?"""

    def check_rows(self, model: nn.Module, longest: int) -> None:
        """Can it read rows of so many tokens?"""

    def learnable(self, rows: Any, objective: Objective) -> Any:
        """Those of a store's rows that the objective can learn from."""

    def retokenized(self, rows: Any, tokenizer: Any, text_column: str | None) -> Any:
        """The rows in the tokens of a student whose tokenizer is not the store's."""

    def card_notes(self, config: Any) -> list[str]:
        """Sentences for the card."""


def task_of(store: Any) -> Task:
    """Raises ConfigError for a store of a task that is not there."""
    if store.task not in TASKS:
        raise ConfigError(f"{store.path} is for task {store.task}; predistill trains {', '.join(TASKS)}")
    entry = TASKS[store.task]
    return getattr(importlib.import_module(f".{entry.module}", __name__), entry.name)(store)


def check_known(store: Any, settings: Any) -> None:
    """Settings of some tasks are refused for the others. Raises ConfigError."""
    known = TASKS[store.task].settings
    foreign = {name for entry in TASKS.values() for name in entry.settings} - set(known)
    for one in fields(settings):
        if one.name in foreign and getattr(settings, one.name) != one.default:
            flag = "--" + one.name.replace("_", "-")
            raise ConfigError(f"{flag} is nothing that {store.task} knows; leave it away")


def make_objective(
    terms: Sequence[Term], outer: Callable[[Sequence[Term]], Objective], columns: Mapping[str, Any], seed: int
) -> Objective:
    """`outer`'s objective of the task, and around it the terms about what is inside, where there are any.

    columns: what is known of the store's columns, by name: FieldSpec or None. seed: of projections.
    """
    inner = [term for term in terms if term.name in INNER]
    if not inner:
        return outer(terms)
    from ..inside.objective import InnerObjective

    return InnerObjective(outer([term for term in terms if term.name not in INNER]), inner, columns, seed=seed)


def default_objective(
    terms: Callable[[float], Sequence[Term]], datasets: Iterable[Any], model: nn.Module, seed: int = 0
) -> Objective:
    """Of a trainer that was given none: by the store of its rows, else by its model.

    terms: the terms of a run, given the temperature where none was asked for. seed: of projections.
    """
    flat = [one for dataset in datasets for one in (dataset.values() if isinstance(dataset, Mapping) else [dataset])]
    for rows in flat:
        if is_store_rows(rows):
            task = task_of(rows.store)
            return make_objective(terms(task.temperature), task.objective, rows.store.fields, seed)
    names = next((found for one in flat if (found := _columns(one))), [])
    student: Any = model
    student = student.get_base_model() if hasattr(student, "get_base_model") else student  # of PEFT's
    if type(student).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        from ..language.objective import LanguageObjective
        from .causal_lm import CausalLM

        columns = dict.fromkeys(names)
        return make_objective(terms(CausalLM.temperature), lambda own: LanguageObjective(own, columns), columns, seed)
    made = terms(DEFAULT_TEMPERATURE)
    outer = partial(_classification, getattr(student, "config", None), WORD_IDS in names)
    return make_objective(made, outer, dict.fromkeys(names), seed)


def _columns(dataset: Any) -> list[str]:
    """Of a datasets.Dataset, or of the first row of anything that is indexed."""
    if names := getattr(dataset, "column_names", None):
        return list(names)
    return list(dataset[0]) if hasattr(dataset, "__getitem__") and len(dataset) else []


def _classification(config: Any, of_words: bool, terms: Sequence[Term]) -> Objective:
    from .text_classification import ClassificationObjective
    from .token_classification import TokenObjective

    if config is None:
        raise ConfigError("neither data nor model tells the kind of head; give the trainer an objective")
    if of_words:
        return TokenObjective(terms, config.num_labels)
    kind = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)
    return ClassificationObjective(terms, kind, config.num_labels)
