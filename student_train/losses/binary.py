"""The divergences of logits.py for multi-label heads, where each class is a Bernoulli of its own.

p = sigmoid(z_teacher / T): the two-class softmax of (z / T, 0). So each function here is its namesake over
those pairs, logits [..., C] -> [...], T^2 applied. The mean over classes is taken, as torch's
BCEWithLogitsLoss (and so transformers) does for the labels: alpha weighs like with like, whatever C is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import logits
from .logits import Temperature


def binary_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 mean over classes of KL(Bernoulli p || Bernoulli q): [..., C], [..., C] -> [...]."""
    student, teacher, temperature = _pairs(student_logits, teacher_logits, temperature)
    return logits.kl_divergence(student, teacher, temperature=temperature).mean(-1)


def binary_reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 mean over classes of KL(Bernoulli q || Bernoulli p): [..., C], [..., C] -> [...]."""
    student, teacher, temperature = _pairs(student_logits, teacher_logits, temperature)
    return logits.reverse_kl_divergence(student, teacher, temperature=temperature).mean(-1)


def binary_generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 mean over classes of the generalised JSD of Bernoullis, beta as in generalized_jsd -> [...]."""
    student, teacher, temperature = _pairs(student_logits, teacher_logits, temperature)
    return logits.generalized_jsd(student, teacher, temperature=temperature, beta=beta).mean(-1)


def binary_total_variation(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """T^2 mean over classes of |p - q|: [..., C], [..., C] -> [...]."""
    student, teacher, temperature = _pairs(student_logits, teacher_logits, temperature)
    return logits.total_variation(student, teacher, temperature=temperature).mean(-1)


def binary_soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """-T^2 mean over classes of p log q + (1 - p) log(1 - q): [..., C], [..., C] -> [...]."""
    student, teacher, temperature = _pairs(student_logits, teacher_logits, temperature)
    return logits.soft_cross_entropy(student, teacher, temperature=temperature).mean(-1)


def _pairs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor, Temperature]:
    """[..., C] -> [..., C, 2] of (z, 0), and a temperature a row spread over its classes."""
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    return _with_zero(student_logits), _with_zero(teacher_logits), temperature


def _with_zero(z: Tensor) -> Tensor:
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # autocast on a CPU refuses to stack float16
    return torch.stack([z, torch.zeros_like(z)], -1)
