"""A class for each word of a row: the teacher's logits [S, C], read at the first token of every word, and its tag.

A word has logits whether or not it has a tag, so that rows without tags teach too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...store.errors import ConfigError
from ...store.reader import TeacherRows
from ...store.schema import ATTENTION_MASK, LABELS, LOGITS, MISSING_LABEL, WORD_IDS
from ...store.words import first_tokens
from ..losses.catalogue import SINGLE_LABEL
from ..losses.terms import Term
from ..metrics import tag_metrics_for
from ..objective import Batch, Objective
from ..settings import DEFAULT_TEMPERATURE
from ..tokens import check_positions
from ..words.rows import CHUNK, WordRows, word_rows
from .text_classification import ClassificationObjective, label_settings, refuse_other_head


class TokenClassification:
    """Students that tag words, as tasks/__init__.py asks for them."""

    model_class = "AutoModelForTokenClassification"
    temperature = DEFAULT_TEMPERATURE
    columns = (LOGITS,)
    averaged = {LOGITS: LABELS}
    pipeline = "token-classification"
    usage = (
        'tag = pipeline("token-classification", model="path/to/this/folder", aggregation_strategy="first")',
        'tag("…")',
    )

    def __init__(self, store: Any) -> None:
        self.store = store
        self.settings = {name: value for name, value in label_settings(store).items() if name != "problem_type"}
        self.compute_metrics = tag_metrics_for(store.label_names)

    def objective(self, terms: Sequence[Term]) -> TokenObjective:
        return TokenObjective(terms, self.settings["num_labels"])

    def check_config(self, name: str, config: Any) -> None:
        """A head that was trained for another number of tags is refused."""
        refuse_other_head(name, config, "ForTokenClassification", self.settings["num_labels"])

    def check_student(self, model: nn.Module) -> None:
        """Any tagger will do."""

    def check_rows(self, model: nn.Module, longest: int) -> None:
        check_positions(model, longest)

    def learnable(self, rows: TeacherRows, objective: Objective) -> TeacherRows:
        """To train on tags only: the rows that have one."""
        if objective.fields:
            return rows
        tagged, bare = [np.zeros(0, bool)], rows.with_fields([])
        for start in range(0, len(rows), CHUNK):
            tagged.append((bare[start : start + CHUNK][LABELS] != MISSING_LABEL).any(1))
        kept = np.concatenate(tagged)
        return rows.kept(kept)

    def retokenized(self, rows: TeacherRows, tokenizer: Any, text_column: str | None) -> WordRows:
        if text_column is not None:
            raise ConfigError(f"--text-column {text_column}: words are read from the store's tokens; leave it away")
        return word_rows(rows, tokenizer)

    def card_notes(self, config: Any) -> list[str]:
        return ["Tags: " + ", ".join(f"`{label}`" for label in config.id2label.values()) + "."]


class TokenObjective(ClassificationObjective):
    """What a batch of student logits [B, S, C] costs, over the first tokens of words."""

    def __init__(self, terms: Sequence[Term], num_labels: int) -> None:
        super().__init__(terms, SINGLE_LABEL, num_labels)

    @property
    def fields(self) -> list[str]:
        return [*super().fields, WORD_IDS] if super().fields else []

    @property
    def evaluation_fields(self) -> list[str]:
        return [LOGITS, WORD_IDS]

    def spoken_of(self, batch: Batch) -> torch.Tensor:
        if WORD_IDS not in batch:
            raise ConfigError(f"{WORD_IDS} expected beside {LOGITS}, to tell which tokens begin a word; there are none")
        return first_tokens(batch[WORD_IDS]) & batch[ATTENTION_MASK].bool()
