"""Cross entropy to labels, and to what the teacher would have labelled; squared error for regression.

`problem_type` is transformers': "single_label_classification", "multi_label_classification" or "regression".
Each function gives (loss [...], valid bool [...]): loss is 0 where valid is False, and its gradient too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalogue import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL

_MISSING_LABEL = -100


def label_loss(logits: Tensor, labels: Tensor, problem_type: str = SINGLE_LABEL) -> tuple[Tensor, Tensor]:
    """The labels' part, row by row: logits [..., C] -> (loss [...], valid bool [...]).

    single label: labels int64 [...], -100 = missing.
    multi-label: float [..., C], NaN = entry missing; mean binary cross entropy over the row's known entries.
    regression: float [...] where C is 1, or [..., C], NaN = missing; mean squared error over known entries.
    Raises ValueError for another problem type.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == SINGLE_LABEL:
        return _single(logits, labels.long(), labels != _MISSING_LABEL)
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, not {problem_type!r}")
    labels = labels.to(logits.dtype).reshape(logits.shape)
    return _by_entry(logits, labels, ~torch.isnan(labels), problem_type)


def pseudo_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    problem_type: str = SINGLE_LABEL,
    *,
    threshold: float = 0.0,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """label_loss to the teacher's own prediction: both logits [..., C] -> (loss [...], valid bool [...]).

    A prediction counts where the teacher's confidence, max p at temperature 1 (per class max(p, 1 - p) in a
    multi-label head), is at least threshold, and where `labels` (as for label_loss) has none: given labels
    are left to the labels term. NLP Architect's pseudo-labelling of unlabelled rows.
    """
    student = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    teacher = teacher_logits.detach().to(student.dtype)
    if problem_type == SINGLE_LABEL:
        confidence, prediction = teacher.softmax(-1).max(-1)
        counts = confidence >= threshold
        if labels is not None:
            counts = counts & (labels == _MISSING_LABEL)
        return _single(student, prediction, counts)
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, not {problem_type!r}")
    counts = torch.ones_like(teacher, dtype=torch.bool)
    if labels is not None:
        counts = labels.reshape(teacher.shape).isnan()
    if problem_type == MULTI_LABEL:
        counts = counts & (teacher.abs().sigmoid() >= threshold)
        teacher = (teacher > 0).to(student.dtype)
    return _by_entry(student, teacher, counts, problem_type)


def _single(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats; logits [..., C], target int64 [...], valid bool [...]."""
    index = torch.where(valid, target, 0).unsqueeze(-1)
    loss = -torch.log_softmax(logits, -1).gather(-1, index).squeeze(-1)
    return torch.where(valid, loss, 0.0), valid


def _by_entry(logits: Tensor, target: Tensor, known: Tensor, problem_type: str) -> tuple[Tensor, Tensor]:
    """Mean over each row's known entries; logits, target, known all [..., C]."""
    target = torch.where(known, target, 0.0)
    if problem_type == REGRESSION:
        loss = (logits - target).square()
    else:
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    count = known.sum(-1)
    return torch.where(known, loss, 0.0).sum(-1) / count.clamp(min=1), count > 0
