"""Hidden states, token by token: how far is the student's [B, S, D] from the teacher's?

Every function takes a `mask`, bool [B, S], True at tokens that count. Where it is False the value is 0, no gradient
passes, and neither NaN nor infinity there matters; None means that every token counts. The student's width must be
the teacher's: a projection comes before. Half-precision tensors are computed in float32, float64 stays float64, and
the teacher is a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over D of (h_student - h_teacher)^2: [..., D], [..., D] -> [...]. TinyBERT (arXiv:1909.10351)."""
    student, teacher = _same_shape(student, teacher)
    gap = student - teacher
    return (gap if mask is None else kept(gap, mask)).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cos(h_student, h_teacher): [..., D], [..., D] -> [...]. DistilBERT (arXiv:1910.01108).

    1, and a bounded gradient, where one of them is 0.
    """
    student, teacher = _same_shape(student, teacher)
    if mask is not None:
        student, teacher = kept(student, mask), kept(teacher, mask)
    loss = 1.0 - (unit(student) * unit(teacher)).sum(-1)
    return loss if mask is None else torch.where(mask.bool(), loss, 0.0)


def pkd(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of the first tokens' unit vectors, summed over D: [B, S, D] or [B, D], twice -> [B].

    Patient distillation (Sun et al. 2019, arXiv:1908.09355). The first token is the first that counts, so rows may
    be padded on either side.
    """
    student, teacher = _same_shape(student, teacher)
    if student.dim() > 2:
        student, teacher = first_token(student, mask), first_token(teacher, mask)
    return (unit(student) - unit(teacher)).square().sum(-1)


def first_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The first token that counts: [B, S, D] -> [B, D]; 0 in a row without any."""
    hidden = widened(hidden)
    if mask is None:
        return hidden[:, 0]
    rows = torch.arange(len(hidden), device=hidden.device)
    return kept(hidden[rows, mask.int().argmax(-1)], mask.bool().any(-1))


def mean_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens that count: [B, S, D] -> [B, D]; 0 in a row without any."""
    hidden = widened(hidden)
    if mask is None:
        return hidden.mean(1)
    return kept(hidden, mask).sum(1) / mask.sum(-1, keepdim=True).clamp(min=1)


def widened(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 at least; the teacher without gradient."""
    dtype = torch.promote_types(widened(student).dtype, teacher.dtype)
    return student.to(dtype), teacher.detach().to(dtype)


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """values [..., D] with 0 where mask [...] is False."""
    return torch.where(mask.bool().unsqueeze(-1), values, 0.0)


def unit(vectors: Tensor, norm: float = 2.0, epsilon: float = 0.0) -> Tensor:
    """v / (|v| + epsilon) over the last axis; 0 stays 0, with a gradient of size 1 instead of infinity."""
    length = torch.linalg.vector_norm(vectors, ord=norm, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length + epsilon, 1.0)


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """left [..., I, D], right [..., J, D] -> [..., I, J], in their own dtype even where autocast would use halves."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.mT


def _same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher hidden states must have one shape [B, S, D], not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; project the student to the teacher's width"
        )
    return aligned(student, teacher)
