"""The next token at every position: the teacher's distribution of it, and the token that came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...store.errors import ConfigError, StoreMismatch
from ...store.schema import INPUT_IDS, LOGITS, LOGSUMEXP, POSITION_IDS
from ..language.losses import packed
from ..language.objective import LanguageObjective
from ..losses.terms import Term
from ..objective import Objective, logits_of
from ..tokens import check_positions, position_limit, tokenizer_difference

_SAME = 1e-3  # of the largest logit: what rounding may do between two forwards in float32


class CausalLM:
    """Students that continue a text, as tasks/__init__.py asks for them."""

    model_class = "AutoModelForCausalLM"
    temperature = 1.0
    settings: dict[str, Any] = {}
    compute_metrics = None
    pipeline = "text-generation"
    usage = ('write = pipeline("text-generation", model="path/to/this/folder")', 'write("…")')

    def __init__(self, store: Any) -> None:
        self.store = store
        self.averaged = {LOGITS: ""} if LOGITS in store.fields else {}
        said = [name for name, spec in store.fields.items() if spec.role == "teacher"]
        self.columns = [name for name in said if not name.startswith(f"{LOGSUMEXP}_at_")]  # missed only where wanted

    def objective(self, terms: Sequence[Term]) -> LanguageObjective:
        return LanguageObjective(terms, self.store.fields)

    def check_config(self, name: str, config: Any) -> None:
        """Every causal model has this head."""

    def check_student(self, model: nn.Module) -> None:
        """Raises ConfigError for a student that sees what comes next, or other documents of its row, or is broken."""
        if bool(_logits(model, {INPUT_IDS: FIRST}).isnan().any()):
            raise ConfigError(
                f"{type(model).__name__} gives logits that are NaN before it is trained: look at its weights, or give "
                "another student"
            )
        if not causal(model):
            raise ConfigError(
                f"{type(model).__name__} sees tokens that come later, so it cannot learn to tell the next one: give a "
                "causal model (a BERT-like config needs is_decoder: true)"
            )
        if POSITION_IDS in self.store.fields and not keeps_documents_apart(model):
            raise ConfigError(
                f"{self.store.path} holds several documents a row, which {type(model).__name__} does not tell apart by "
                "position_ids: give another student, or dump without --packing"
            )

    def check_rows(self, model: nn.Module, longest: int) -> None:
        """Also where positions are computed (rotary), no row is longer than the student's config says."""
        config = getattr(model, "config", None)
        declared = getattr(config, "max_position_embeddings", None)
        check_positions(model, longest, position_limit(model) or declared)

    def learnable(self, rows: Any, objective: Objective) -> Any:
        return rows

    def retokenized(self, rows: Any, tokenizer: Any, text_column: str | None) -> Any:
        raise StoreMismatch(
            f"{tokenizer_difference(rows.store, tokenizer)}; a language model learns the teacher's own tokens: give a "
            "student with the store's tokenizer"
        )

    def card_notes(self, config: Any) -> list[str]:
        return []


FIRST, SECOND = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])  # two texts, int64 [1, 3]


def causal(model: nn.Module) -> bool:
    """Does what comes later leave the logits of a text as they are?"""
    both = torch.cat([FIRST, SECOND], 1)
    return _same(_logits(model, {INPUT_IDS: both})[:, :3], _logits(model, {INPUT_IDS: FIRST}))


def keeps_documents_apart(model: nn.Module) -> bool:
    """Are the logits of a text the same behind another one, in a row that position_ids divide?"""
    row = {INPUT_IDS: torch.cat([FIRST, SECOND], 1), POSITION_IDS: torch.arange(3).repeat(1, 2)}
    try:
        together = _logits(model, packed(row))
    except TypeError:  # it takes no position_ids
        return False
    return _same(together[:, 3:], _logits(model, {INPUT_IDS: SECOND}))


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return logits_of(model.eval()(**inputs)).float()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= _SAME * right.abs().max())
