"""Divergences between a student's and a teacher's class distributions.

p = softmax(z_teacher / T), q = softmax(z_student / T). Every function takes logits [..., C], gives one value
a row [...], and has T^2 applied, which keeps the gradient's size about the same at any temperature (Hinton et
al. 2015, arXiv:1503.02531). `temperature` is a number, or a tensor [...] with one for each row. Shapes must
agree, else ValueError.

A teacher logit of -inf marks a class that cannot be: it has p = 0, is left out of means over classes, and
costs the student 100 nats (torch's own floor in BCELoss) in the reverse KL, which would be infinite.

The formulas themselves are in divergences.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import divergences
from .divergences import expected_log_ratio

Temperature = float | Tensor

_STANDARDIZE_EPSILON = 1e-7  # of the published formula, added to the standard deviation
_MISSING_LABEL = -100


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 KL(p || q): [..., C], [..., C] -> [...]. Hinton et al. 2015."""
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * divergences.kl(log_q, log_p)


def reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 KL(q || p): [..., C], [..., C] -> [...]. MiniLLM (arXiv:2306.08543)."""
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * divergences.reverse_kl(log_q, log_p)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q: [..., C], [..., C] -> [...].

    GKD (arXiv:2306.13649) in TRL's convention: beta 0 is KL(p || q) and beta 1 is KL(q || p), although the
    formula itself goes to 0 at both ends. Raises ValueError for a beta outside [0, 1].
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * divergences.jsd(log_q, log_p, beta=beta)


def total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 sum |p - q| / 2: [..., C], [..., C] -> [...]. DistillKit's tvd."""
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * divergences.total_variation(log_q, log_p)


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """-T^2 sum p log q: [..., C], [..., C] -> [...]. KL's gradient; its value keeps the teacher's entropy."""
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * divergences.soft_cross_entropy(log_q, log_p)


def mse(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Mean over classes of (z_student - z_teacher)^2: [..., C], [..., C] -> [...].

    T^2 times the square of logits / T: the temperature cancels and is taken only to be called as the others.
    """
    student, teacher = _aligned(student_logits, teacher_logits)
    possible = torch.isfinite(teacher)
    gap = torch.where(possible, student - torch.where(possible, teacher, 0.0), 0.0)
    return gap.square().sum(-1) / possible.sum(-1).clamp(min=1)


def nlp_architect_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 mean over classes of (log q - p)^2: [..., C], [..., C] -> [...].

    What NLP Architect's `mse` computes: log-probabilities against probabilities, so its minimum is not at
    q = p. Here to reproduce; `mse` compares logits.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _squared(temperature, log_q) * (log_q - log_p.exp()).square().mean(-1)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: Temperature = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T^2 (alpha KL(target or not) + beta KL(among the other classes)): [..., C], [..., C] -> [...].

    Decoupled distillation (Zhao et al. 2022, arXiv:2203.08679). labels: int64 [...], the target class; where
    -100, and without labels, the teacher's prediction is the target. Both parts are taken in log space
    with the target truly excluded: the original subtracts 1000 from its logit and takes the log of summed
    probabilities, NaN in float32 once the target stands about 100 T apart. Equal to it elsewhere.
    """
    student, teacher = _tempered(student_logits, teacher_logits, temperature)
    target = _one_hot_target(teacher, labels)
    binary_q, others_q = _split_target(student, target)
    binary_p, others_p = _split_target(teacher, target)
    target_part = expected_log_ratio(binary_p, binary_q)
    others_part = expected_log_ratio(others_p, others_q)
    return _squared(temperature, student) * (alpha * target_part + beta * others_part)


def standardize_logits(logits: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + standard deviation, unbiased) over classes: [..., C] -> [..., C].

    Logit standardization (Sun et al. 2024, arXiv:2403.01427), to be put before any loss. Non-finite entries
    stay as they are and do not count; equal logits become 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finite = torch.isfinite(logits)
    count = finite.sum(-1, keepdim=True)
    kept = torch.where(finite, logits, 0.0)
    centred = torch.where(finite, kept - kept.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    spread = variance > 0
    deviation = torch.where(spread, torch.where(spread, variance, 1.0).sqrt(), 0.0)  # sqrt has no slope at 0
    return torch.where(finite, centred / (_STANDARDIZE_EPSILON + deviation), logits)


def _aligned(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 at least; the teacher without gradient."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits must have one shape [..., C], not {tuple(student_logits.shape)} "
            f"and {tuple(teacher_logits.shape)}"
        )
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)


def _log_distributions(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    """log q, log p: each [..., C]."""
    student, teacher = _tempered(student_logits, teacher_logits, temperature)
    return torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)


def _tempered(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    """z_student / T, z_teacher / T: each [..., C]."""
    student, teacher = _aligned(student_logits, teacher_logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(student.dtype).unsqueeze(-1)
    elif not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return student / temperature, teacher / temperature


def _squared(temperature: Temperature, like: Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return temperature.detach().to(like.dtype).square()
    return temperature**2


def _one_hot_target(teacher: Tensor, labels: Tensor | None) -> Tensor:
    """bool [..., C], True at the label, or at the teacher's prediction where there is none."""
    target = teacher.argmax(-1)
    if labels is not None:
        target = torch.where(labels == _MISSING_LABEL, target, labels)
    return torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)


def _split_target(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others) [..., 2], and of each class among those others [..., C].

    Each comes from logits, not from the other: with the target 500 nats ahead, differences of the others'
    log-probabilities would be good to 3e-5 only.
    """
    others = z.masked_fill(target, -math.inf)
    none_left = torch.isneginf(others).all(-1, keepdim=True)  # one class only, or only the target possible
    among = torch.log_softmax(others.masked_fill(none_left, 0.0), -1).masked_fill(none_left, -math.inf)
    logprobs = torch.log_softmax(z, -1)
    rest = logprobs.masked_fill(target, -math.inf).masked_fill(none_left, 0.0).logsumexp(-1, keepdim=True)
    own = torch.where(target, logprobs, 0.0).sum(-1, keepdim=True)
    return torch.cat([own, rest.masked_fill(none_left, -math.inf)], -1), among
