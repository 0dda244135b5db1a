"""A Term meets its function: the one place where names become tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import binary, logits
from .catalogue import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .labels import label_loss, pseudo_label_loss
from .terms import Term

# f(student_logits [..., C], teacher_logits [..., C], *, temperature, **options) -> [...]
LOGIT_FUNCTIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    SINGLE_LABEL: {
        "kl": logits.kl_divergence,
        "reverse_kl": logits.reverse_kl_divergence,
        "jsd": logits.generalized_jsd,
        "total_variation": logits.total_variation,
        "soft_cross_entropy": logits.soft_cross_entropy,
        "mse": logits.mse,
        "dkd": logits.dkd,
        "nlp_architect_mse": logits.nlp_architect_mse,
    },
    MULTI_LABEL: {
        "kl": binary.binary_kl_divergence,
        "reverse_kl": binary.binary_reverse_kl_divergence,
        "jsd": binary.binary_generalized_jsd,
        "total_variation": binary.binary_total_variation,
        "soft_cross_entropy": binary.binary_soft_cross_entropy,
        "mse": logits.mse,
    },
    REGRESSION: {"kl": logits.mse, "mse": logits.mse},
}


def row_loss(
    term: Term,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    problem_type: str = SINGLE_LABEL,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One term, row by row, without its weight: (loss [...], valid bool [...]), loss 0 where not valid.

    student_logits, teacher_logits [..., C]; labels as label_loss takes them, None = no row has one.
    `temperature` is the run's, used where the term has none of its own. Raises ValueError where the term
    needs teacher_logits and none came; `terms.check_term` has refused beforehand what the head cannot learn.
    """
    if term.name == "labels":
        if labels is None:
            return _no_rows(student_logits)
        return label_loss(student_logits, labels, problem_type)
    if teacher_logits is None:
        raise ValueError(f"the {term.name} term needs teacher_logits [..., C] in the batch; none came")
    if term.name == "pseudo_labels":
        return pseudo_label_loss(student_logits, teacher_logits, problem_type, labels=labels, **term.options)
    loss = _logit_loss(term, student_logits, teacher_logits, labels, problem_type, temperature)
    return loss, torch.ones_like(loss, dtype=torch.bool)


def _logit_loss(
    term: Term,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    problem_type: str,
    temperature: float,
) -> Tensor:
    options = {name: value for name, value in term.options.items() if name != "tail"}  # all classes are here
    if options.pop("standardize", False):
        student_logits = logits.standardize_logits(student_logits)
        teacher_logits = logits.standardize_logits(teacher_logits)
    if term.loss == "dkd":
        options["labels"] = labels
    options["temperature"] = temperature if term.temperature is None else term.temperature
    return LOGIT_FUNCTIONS[problem_type][term.loss](student_logits, teacher_logits, **options)


def _no_rows(student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros that still hang on the student's graph, so that backward finds every parameter."""
    rows = student_logits[..., 0].to(torch.promote_types(student_logits.dtype, torch.float32))
    return rows * 0.0, torch.zeros_like(rows, dtype=torch.bool)
