"""Losses of a student at some token positions: its head and the loss together, chunk by chunk, where that can be.

The student runs up to its head, in whatever wrapper trains it; of its hidden states [B, S, D] the N that are needed
go through losses/fused.py. Where the head cannot be had alone (LoRA on it, sharded weights, a model that only gives
logits) the student makes its logits [B, S, V], and the same numbers come out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import nn

from ...store.head import Head, head_module, hidden_before_head, split_head
from ...store.schema import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from ..losses.fused import FusedLoss, TokenTerm, fused_linear_loss
from ..losses.labels import label_loss
from ..losses.rows import row_loss
from ..losses.sparse import SparseTargets, sparse_loss
from ..objective import Batch, logits_of
from ..sharded import is_cut, is_main_process

logger = logging.getLogger(__name__)
PROBE_TOKENS = 8  # of the row that tells whether the head can be had alone

TermsOf = Callable[[int], Sequence[TokenTerm]]  # size of the student's vocabulary -> terms


class StudentTokens:
    """Runs students, and remembers of the last one whether its head can be had alone."""

    def __init__(self) -> None:
        self._known: tuple[nn.Module, Head | None] | None = None

    def losses(
        self, model: nn.Module, inputs: Batch, at: torch.Tensor, terms_of: TermsOf, *, predictions: bool = False
    ) -> tuple[Any, FusedLoss]:
        """What `model` returned for `inputs` [B, S], and its losses at the positions `at`, int64 [N]: b * S + s."""
        inputs, tokens = packed(inputs), inputs[INPUT_IDS].shape[1]
        student = extract_model_from_parallel(model, keep_torch_compile=False)
        head = self._head(model, student, inputs)
        if head is None:
            outputs = model(**inputs)
            logits = _chosen(logits_of(outputs), tokens, at)
            return outputs, whole_logits_loss(logits, terms_of(logits.shape[-1]), predictions=predictions)
        with hidden_before_head(student) as before:
            outputs = model(**inputs)
        hidden = _as_autocast(_chosen(before.hidden, tokens, at))
        return outputs, fused_linear_loss(
            hidden, head.weight, terms_of(len(head.weight)), bias=head.bias, scale=head.scale, softcap=head.softcap,
            predictions=predictions,
        )  # fmt: skip

    def _head(self, model: nn.Module, student: nn.Module, inputs: Batch) -> Head | None:
        if self._known is None or self._known[0] is not student or replaced(self._known[1], student):
            whole = is_whole(model, student)
            head = split_head(student, {INPUT_IDS: inputs[INPUT_IDS][:1, :PROBE_TOKENS]}) if whole else None
            if head is None and is_main_process():
                logger.warning(
                    "the head of %s cannot be had alone: its logits of all tokens of a batch are made at once, which "
                    "takes memory", type(student).__name__,
                )  # fmt: skip
            self._known = student, head
        return self._known[1]


def is_whole(model: nn.Module, student: nn.Module) -> bool:
    """Are the student's weights here, in one place and unsharded, and can its forward be hooked?"""
    if is_compiled_module(model) or is_cut(model) or is_cut(student):
        return False
    return len({weight.device for weight in student.parameters()}) == 1


def replaced(head: Head | None, student: nn.Module) -> bool:
    """Has the student other output embeddings than when its head was looked at (resized, say)?"""
    return head is not None and getattr(head_module(student), "weight", None) is not head.weight


def packed(inputs: Batch) -> dict[str, Any]:
    """Several documents a row are told apart by position_ids, which models heed without attention_mask and cache."""
    if POSITION_IDS not in inputs:
        return dict(inputs)
    logging.getLogger("transformers.modeling_utils").addFilter(_other_than_mask)  # which warns of the missing mask
    return {**{name: value for name, value in inputs.items() if name != ATTENTION_MASK}, "use_cache": False}


def _other_than_mask(record: logging.LogRecord) -> bool:
    return "passing in an `attention_mask`" not in record.getMessage()


def whole_logits_loss(logits: torch.Tensor, terms: Sequence[TokenTerm], *, predictions: bool = False) -> FusedLoss:
    """What fused_linear_loss gives, from logits [N, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss, sums = logits.sum() * 0, []
    for term, coefficient, mask, target in terms:
        if isinstance(target, SparseTargets):
            each = sparse_loss(term, logits, target)
        elif term.name == "labels":
            each, _ = label_loss(logits, target)
        else:
            each, _ = row_loss(term, logits, target)
        total = (each if mask is None else torch.where(mask, each, 0)).sum()
        loss = loss + coefficient * total
        sums.append(total.detach())
    return FusedLoss(loss, torch.stack(sums), logits.argmax(-1) if predictions else None)


def _chosen(values: torch.Tensor, tokens: int, at: torch.Tensor) -> torch.Tensor:
    """[B, S or more, D] -> [N, D]; prompt tuning puts virtual tokens before the row's own."""
    return values[:, -tokens:].flatten(0, 1).index_select(0, at)


def _as_autocast(hidden: torch.Tensor) -> torch.Tensor:
    """The dtype that autocast would run the head in: norms before it give float32."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden
