"""Divergences from a teacher of whose distribution only some entries were kept: the largest, or samples.

The kept ids and all the others together are K + 1 classes, and each loss here is the dense divergence (divergences.py)
over those, between teacher p and student q, whose softmax is over its whole vocabulary. `tail`, an option of the term,
says what the last class is:

    bucket       the teacher's mass that was not kept, against the student's there
    renormalize  nothing: the teacher's kept probabilities are made to sum to 1
    ignore       left out: the sum runs over the kept ids only, their probabilities as they are

N token positions, V vocabulary, K kept entries a position, T temperature. DistillKit calls the first
`symmetric_uniform`; its `zero` renormalizes and then leaves out, which for kl is the same as `renormalize`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .catalogue import TAILS
from .divergences import DIVERGENCES
from .terms import Term, check_truncated

_NO_LOGPROB = -1e4  # nats; an entry at or below it is padding
_NO_LOGIT = -3e4  # the same of a logit relative to the largest; stores pad with -65504
_NEWTON_STEPS = 12


class SparseTargets(NamedTuple):
    """The teacher at N positions, at one temperature.

    indices: int64 [N, K], different ids at each position. logprobs: float [N, K], log p of each; at or below -1e4 there
    is no entry, whatever its index. tail_logprob: float [N], log of the mass that was not kept; -inf: none.
    """

    indices: Tensor
    logprobs: Tensor
    tail_logprob: Tensor


class Classes(NamedTuple):
    """SparseTargets for a student of V ids.

    indices: int64 [N, K], below V; where there is no entry, one of the position's other ids. kept: bool [N, K], is
    there an entry? logprobs: [N, K + 1], -inf where there is none, and last the rest of the mass.
    """

    indices: Tensor
    kept: Tensor
    logprobs: Tensor


def sparse_loss(term: Term, student_logits: Tensor, targets: SparseTargets, *, temperature: float = 1.0) -> Tensor:
    """T^2 times the term's divergence at N positions, without its weight: [N, V] -> [N], float32 or wider.

    `temperature` is the run's, used where the term has none; the targets must be at the same. Raises ConfigError for a
    loss that needs every logit.
    """
    check_truncated(term)
    temperature = temperature if term.temperature is None else term.temperature
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32)) / temperature
    found = teacher_classes(targets, logits.shape[-1])
    return class_loss(term, class_logits(logits, found), found.logprobs, temperature)


def class_logits(logits: Tensor, found: Classes) -> Tensor:
    """[N, V] -> [N, K + 1]: the kept ids' logits, and the log-sum-exp of all others."""
    own = logits.gather(-1, found.indices).masked_fill(~found.kept, -math.inf)
    none = found.kept.sum(-1, keepdim=True) >= logits.shape[-1]  # a log-sum-exp of nothing has no gradient
    rest = hide_kept(logits.clone(), found).masked_fill(none, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([own, rest.masked_fill(none, -math.inf)], -1)


def teacher_classes(targets: SparseTargets, vocabulary: int) -> Classes:
    """For a student of `vocabulary` ids; the mass of ids beyond it is with the rest, of which there is none where every
    id is kept."""
    indices, logprobs, tail = targets
    there = logprobs > _NO_LOGPROB
    kept = there & (indices < vocabulary)
    beyond = logprobs.masked_fill(kept | ~there, -math.inf)
    rest = torch.cat([beyond, tail.unsqueeze(-1).to(logprobs)], -1).logsumexp(-1, keepdim=True)
    rest = rest.masked_fill(kept.sum(-1, keepdim=True) >= vocabulary, -math.inf)
    logprobs = torch.cat([logprobs.masked_fill(~kept, -math.inf), rest], -1).detach()
    if not indices.shape[-1]:
        return Classes(indices, kept, logprobs)
    first = kept.to(torch.int8).argmax(-1, keepdim=True)
    indices = torch.where(kept, indices, indices.gather(-1, first))
    return Classes(indices.masked_fill(~kept.any(-1, keepdim=True), 0), kept, logprobs)


def hide_kept(logits: Tensor, found: Classes) -> Tensor:
    """Logits [N, V], in place: -inf at the kept ids."""
    if not found.indices.shape[-1]:
        return logits
    zero = logits[:, 0].clone()
    logits.scatter_(-1, found.indices, -math.inf)
    logits[:, 0] = torch.where(found.kept.any(-1), logits[:, 0], zero)  # where nothing is kept, indices are 0
    return logits


def class_loss(term: Term, logits: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """T^2 times the term's divergence, from the student's logits / T of the K + 1 classes and the teacher's log p.

    Both [N, K + 1] -> [N]. The last class's logit is the log-sum-exp of all that it holds.
    """
    log_q, log_p = torch.log_softmax(logits, -1), logprobs.to(logits.dtype)
    options = {name: value for name, value in term.options.items() if name not in ("tail", "standardize")}
    tail = term.options.get("tail", TAILS[0])
    if tail == "ignore":
        log_q, log_p = log_q[..., :-1], log_p[..., :-1]
    elif tail == "renormalize":
        mass = log_p[..., :-1].logsumexp(-1, keepdim=True)
        log_p = torch.where(torch.isneginf(log_p), log_p, log_p - mass)
        log_p = torch.cat([log_p[..., :-1], torch.full_like(mass, -math.inf)], -1)
    return temperature**2 * DIVERGENCES[term.loss](log_q, log_p, **options)


def top_k_targets(
    logits: Tensor,
    logsumexp: Tensor,
    indices: Tensor,
    *,
    temperature: float = 1.0,
    logsumexp_at: Tensor | None = None,
    vocabulary: int,
) -> SparseTargets:
    """The largest logits [N, K] of `vocabulary`, relative to the largest, as targets at `temperature`.

    indices: int [N, K], different ids; where a logit is below -3e4 there is none. logsumexp: [N], of all logits,
    relative to the largest too; logsumexp_at: [N], the same of logits / temperature. Without it, at temperatures other
    than 1, the mass that was not kept is estimated: see power_law_rest.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, logsumexp = logits.detach().to(dtype), logsumexp.detach().to(dtype)
    logits = logits.masked_fill(logits <= _NO_LOGIT, -math.inf)
    tempered, others = logits / temperature, torch.isfinite(logits).sum(-1) < vocabulary
    if temperature == 1:
        logsumexp_at = logsumexp
    elif logsumexp_at is None:
        rest = power_law_rest(logits, logsumexp, temperature, vocabulary).unsqueeze(-1)
        logprobs = torch.cat([tempered, rest], -1).log_softmax(-1)
        return SparseTargets(indices.long(), logprobs[:, :-1], logprobs[:, -1])
    logprobs = tempered - logsumexp_at.detach().to(dtype).unsqueeze(-1)
    left = (1.0 - logprobs.exp().sum(-1)).clamp(min=torch.finfo(dtype).eps)  # what rounding leaves known of it
    return SparseTargets(indices.long(), logprobs, left.log().masked_fill(~others, -math.inf))


def sample_targets(indices: Tensor, counts: Tensor, draws: int, ratios: Tensor | None = None) -> SparseTargets:
    """Different ids [N, K] that were drawn, how often each of `draws` [N, K], 0 where there is none, as targets.

    ratios: float [N, K], p over the probability by which it was drawn, where that was not p. Weights need not sum to 1.
    For losses linear in p, kl and soft_cross_entropy, whose gradient they leave unbiased (Random Sampling Knowledge
    Distillation, Anshumann et al. 2025, arXiv:2503.16870).
    """
    weights = counts.to(torch.float32) / draws
    if ratios is not None:
        weights = weights * ratios.to(torch.float32)
    return SparseTargets(indices.long(), weights.log(), weights.new_full(weights.shape[:1], -math.inf))


def power_law_rest(logits: Tensor, logsumexp: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """Log of the sum of exp(z / T) over the ids that were not kept, from their sum at T = 1: [N, K], [N] -> [N].

    logits, logsumexp: as top_k_targets takes them, -inf where there is none. The probability of the id of rank j, above
    K, is taken to be that of rank K times (j / K)^-a (Zipf's law), a such that they sum to what was not kept. On a
    trained language model (4000 ids, 4.2 nats) the K + 1 classes were so 0.0005 to 0.004 nats from the exact, for
    K of 8 to 128 and T of 1.5 to 4; with all others equally likely 0.002 to 0.023, as one lump of mass^(1/T) 0.4 to 3.
    """
    there = torch.isfinite(logits)
    kept = there.sum(-1).clamp(min=1).to(logits.dtype)
    smallest = torch.where(there, logits, 0.0).amin(-1)
    low, high = ((kept + 0.5) / kept).log(), ((vocabulary + 0.5) / kept).log()  # ranks over K, halfway between two
    others = (vocabulary - kept).clamp(min=1.0)
    left = logsumexp.exp() - logits.exp().sum(-1)
    known = (left.clamp(min=torch.finfo(left.dtype).eps).log() - smallest).clamp(max=others.log()) - kept.log()
    slope = torch.ones_like(known)  # 1 - a; log_sum is convex in it and known <= log_sum(1): Newton's steps never pass
    for _ in range(_NEWTON_STEPS):
        log_sum, derivative = _log_sum(slope, low, high)
        slope = slope - (log_sum - known) / derivative
    rest = smallest / temperature + kept.log() + _log_sum(1.0 - (1.0 - slope) / temperature, low, high)[0]
    return torch.where(kept < vocabulary, rest, -math.inf)


def _log_sum(slope: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the integral of exp(slope x) from low to high, and its derivative by slope: log(2h sinh(y) / y) + slope c,
    where h is half the width, c the centre and y = slope h; the derivative is c + h (coth y - 1 / y)."""
    half, centre = (high - low) / 2, (high + low) / 2
    size = (slope * half).abs()
    small = size < 0.05  # where the series is good to 1e-9
    y = torch.where(small, 1.0, size)
    log_sinh = torch.where(small, size.square() / 6, y + (-torch.expm1(-2 * y) / (2 * y)).log())
    langevin = torch.where(small, size / 3 - size**3 / 45, 1 / y.tanh() - 1 / y) * slope.sign()
    return slope * centre + (2 * half).log() + log_sinh, centre + half * langevin
