"""Feature maps of convolutions [B, C, H, W], and token features [B, S, D] as maps of D channels over S positions.

One value a row [B]. mask: bool [B, S], for token features; None means that every position counts. Maps of different
sizes are brought to the smaller one by average pooling, as RepDistiller does. Half-precision tensors are computed in
float32, float64 stays float64, and the teacher is a constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .hidden import aligned, inner_products, kept, unit, widened

_LEAST_VARIANCE = 1e-5  # of the published formula


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, p: float = 2.0) -> Tensor:
    """Mean over positions of (u_student - u_teacher)^2, u the unit-length map of mean over channels of |f|^p.

    Attention transfer (Zagoruyko and Komodakis 2017, arXiv:1612.03928). [B, Cs, …], [B, Ct, …] -> [B].
    """
    student, teacher, count = _channels(student, teacher, mask)
    maps = [unit(values.abs().pow(p).mean(1)) for values in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(-1) / count


def nst(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean k(t, t) + mean k(s, s) - 2 mean k(s, t) over channels, k the square of unit channel maps' inner product.

    Neuron selectivity transfer (Huang and Wang 2017, arXiv:1707.01219). [B, Cs, …], [B, Ct, …] -> [B].
    """
    student, teacher, _ = _channels(student, teacher, mask)
    student, teacher = unit(student), unit(teacher)
    within, across = _kernel(teacher, teacher) + _kernel(student, student), _kernel(student, teacher)
    return within - 2.0 * across


def fsp(student0: Tensor, student1: Tensor, teacher0: Tensor, teacher1: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over channels (i, j) of (G_student - G_teacher)^2, G the mean over positions of f0_i f1_j: -> [B].

    Flow of the solution procedure, between two layers (Yim et al., CVPR 2017); of token features, TextBrewer's fsp.
    Raises ValueError where student and teacher differ in channels.
    """
    student, teacher = _flow(student0, student1, mask), _flow(teacher0.detach(), teacher1.detach(), mask)
    if student.shape != teacher.shape:
        raise ValueError(
            f"fsp needs the teacher's channels {tuple(teacher.shape[1:])} in both layers, not "
            f"{tuple(student.shape[1:])}; project the student to the teacher's width"
        )
    return (student - teacher).square().mean((1, 2))


def vid(student: Tensor, teacher: Tensor, log_scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ((f_student - f_teacher)^2 / v + log v) / 2, v = softplus(log_scale) + 1e-5 per channel: -> [B].

    Variational information distillation (Ahn et al. 2019, arXiv:1904.05835). student: after the regressor, with the
    teacher's channels C. log_scale: [C], trained along.
    """
    student, teacher, count = _channels(student, teacher, mask)
    if student.shape != teacher.shape:
        raise ValueError(f"vid needs the teacher's {teacher.shape[1]} channels, not {student.shape[1]}")
    variance = (F.softplus(log_scale) + _LEAST_VARIANCE).to(student.dtype)
    spread = (student - teacher).square().sum(-1) / variance  # [B, C]
    return ((spread / count.unsqueeze(-1) + variance.log()) / 2.0).mean(-1)


def _channels(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both as [B, C, positions], 0 at positions that do not count, and how many do: [B], at least 1."""
    student, teacher = aligned(student, teacher)
    if student.dim() == 4:
        student, teacher = (each.flatten(2) for each in _pooled(student, teacher))
    elif mask is not None:
        student, teacher = kept(student, mask).mT, kept(teacher, mask).mT
        return student, teacher, mask.sum(-1).clamp(min=1)
    else:
        student, teacher = student.mT, teacher.mT
    return student, teacher, torch.full_like(student[:, 0, 0], student.shape[-1])


def _pooled(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, C, H, W] brought to the smaller H and W."""
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    one, other = (each if each.shape[2:] == size else F.adaptive_avg_pool2d(each, size) for each in (one, other))
    return one, other


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """Mean over channel pairs: [B, C, positions], [B, C', positions] -> [B]."""
    return inner_products(one, other).square().mean((1, 2))


def _flow(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C0, C1]"""
    first, second = widened(first), widened(second)
    if first.dim() == 4:
        first, second = (each.flatten(2) for each in _pooled(first, second))
        return inner_products(first, second) / first.shape[-1]
    if mask is None:
        return inner_products(first.mT, second.mT) / first.shape[1]
    first, second = kept(first, mask), kept(second, mask)
    return inner_products(first.mT, second.mT) / mask.sum(-1).clamp(min=1)[:, None, None]
