"""Attention maps [B, H, S, S] (query, key): how far is the student's from the teacher's?

`visible`, bool [B, 1, S, S], says which keys a query sees: not padding, not later tokens of a causal model, not
another document. Pairs that are not visible have the value 0 and no gradient, whatever is in them. A query that sees
nothing is padding: 0.

heads: how heads meet.
    "auto"      each with its own number where the counts agree, else "mean"
    "mean"      both averaged over heads first; what a teacher stored as its mean over heads needs
    "sum"       both summed over heads first (TextBrewer's *_sum); mse only
    "repeat"    each with its own number where the counts agree, else the teacher's mean for every student head
    [(0, 0), (1, 3)]   these (student head, teacher head)
Half-precision tensors are computed in float32, float64 stays float64, and the teacher is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import divergences
from .hidden import aligned

Heads = str | Sequence[tuple[int, int]]
HEADS = ("auto", "mean", "sum", "repeat")

_SMALLEST = torch.finfo(torch.float32).tiny  # 1.2e-38: a student's probability below counts as that, -87 nats


def mse(student: Tensor, teacher: Tensor, visible: Tensor, *, heads: Heads = "auto") -> Tensor:
    """Mean over heads of (A_student - A_teacher)^2: [B, Hs, S, S], [B, Ht, S, S] -> [B, S, S].

    For probabilities (TinyBERT as most code has it) and for scores before softmax (its paper, arXiv:1909.10351).
    """
    student, teacher = paired_heads(student, teacher, heads)
    return torch.where(visible, student - teacher, 0.0).square().mean(1)


def kl(student: Tensor, teacher: Tensor, visible: Tensor, *, heads: Heads = "auto") -> Tensor:
    """Mean over heads of KL(A_teacher || A_student) over visible keys: probabilities [B, Hs, S, S], [B, Ht, S, S] ->
    [B, S]. MobileBERT (arXiv:2004.02984), MiniLM (arXiv:2002.10957)."""
    student, teacher = paired_heads(student, teacher, _distributions(heads))
    q = torch.where(visible, student, 1.0).clamp(min=_SMALLEST)
    p = torch.where(visible, teacher, 0.0)
    return (p * (p.clamp(min=_SMALLEST).log() - q.log())).sum(-1).mean(1)


def soft_cross_entropy(student: Tensor, teacher: Tensor, visible: Tensor, *, heads: Heads = "auto") -> Tensor:
    """Mean over heads of -sum softmax(Z_teacher) log softmax(Z_student), both over visible keys: scores
    [B, Hs, S, S], [B, Ht, S, S] -> [B, S].

    TextBrewer's att_ce and, with heads="mean", att_ce_mean. KL's gradient; its value keeps the teacher's entropy.
    """
    student, teacher = paired_heads(student, teacher, _distributions(heads))
    log_q, log_p = log_softmax_over(student, visible), log_softmax_over(teacher, visible)
    return divergences.soft_cross_entropy(log_q, log_p).mean(1)


def log_softmax_over(scores: Tensor, visible: Tensor) -> Tensor:
    """Log-probabilities over the visible keys, -inf at all others: scores [B, H, S, S] -> [B, H, S, S]."""
    hidden = ~visible
    lowest = torch.finfo(scores.dtype).min  # not -inf: a query that sees nothing would have NaN and its gradient
    return scores.masked_fill(hidden, lowest).log_softmax(-1).masked_fill(hidden, -torch.inf)


def paired_heads(student: Tensor, teacher: Tensor, heads: Heads = "auto") -> tuple[Tensor, Tensor]:
    """[B, Hs, S, S], [B, Ht, S, S] -> [B, H, S, S], [B, H or 1, S, S]: each head beside the one it is compared with.

    Raises ValueError for maps of other tokens, an unknown word, and a head that is not there.
    """
    if student.dim() != 4 or teacher.dim() != 4 or student[:, 0].shape != teacher[:, 0].shape:
        raise ValueError(
            f"student and teacher attention must be [B, H, S, S] of the same tokens, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    student, teacher = aligned(student, teacher)
    if not isinstance(heads, str):
        return _mapped_heads(student, teacher, heads)
    if heads not in HEADS:
        raise ValueError(f"heads must be one of {', '.join(HEADS)}, or pairs of heads, not {heads!r}")
    if heads in ("auto", "repeat") and student.shape == teacher.shape:
        return student, teacher
    if heads == "repeat":
        return student, teacher.mean(1, keepdim=True)
    if heads == "sum":
        return student.sum(1, keepdim=True), teacher.sum(1, keepdim=True)
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def _mapped_heads(student: Tensor, teacher: Tensor, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    sides = (("student", student, [pair[0] for pair in pairs]), ("teacher", teacher, [pair[1] for pair in pairs]))
    for name, maps, numbers in sides:
        wrong = [number for number in numbers if not 0 <= number < maps.shape[1]]
        if wrong or not numbers:
            came = f"head {wrong[0]}" if wrong else "no pair"
            raise ValueError(f"the {name} has heads 0 to {maps.shape[1] - 1}, but the head map has {came}")
    return student[:, sides[0][2]], teacher[:, sides[1][2]]


def _distributions(heads: Heads) -> Heads:
    if heads == "sum":
        raise ValueError('heads="sum" is for mse: a sum over heads is no distribution; use "mean"')
    return heads
