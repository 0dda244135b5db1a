"""Divergences between two distributions given as log-probabilities: q the student's, p the teacher's.

log_q, log_p: [..., C] -> [...], without any factor. What logits.py takes over all classes, sparse.py takes over the
kept ones and the rest. The teacher's log-probabilities are constants; -inf is allowed on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

IMPOSSIBLE_LOGPROB = -100.0  # nats; torch's own floor in BCELoss


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q)."""
    return expected_log_ratio(log_p, log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p), where p = 0 counted as 100 nats below 1."""
    return expected_log_ratio(log_q, log_p.masked_fill(torch.isneginf(log_p), IMPOSSIBLE_LOGPROB))


def jsd(log_q: Tensor, log_p: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta 0 is KL(p || q), 1 is KL(q || p).

    Raises ValueError for a beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), not {beta}")
    if beta in (0.0, 1.0):
        return reverse_kl(log_q, log_p) if beta else kl(log_q, log_p)
    neither = torch.isneginf(log_q) & torch.isneginf(log_p)
    log_q, log_p = (each.masked_fill(neither, IMPOSSIBLE_LOGPROB) for each in (log_q, log_p))
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    return beta * expected_log_ratio(log_p, log_m) + (1.0 - beta) * expected_log_ratio(log_q, log_m)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum |p - q| / 2."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def soft_cross_entropy(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-sum p log q. KL's gradient; its value keeps the teacher's entropy."""
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_q, 0.0)).sum(-1)


def expected_log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b): [..., C] -> [...]. Where a is 0 the term is 0, and so is its gradient."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {  # by the names of terms.LOGIT_LOSSES; options are keywords
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "soft_cross_entropy": soft_cross_entropy,
}
