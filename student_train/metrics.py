"""What each task reports, with torchmetrics, and how often the student agrees with its teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torchmetrics import functional as metrics
from torchmetrics.functional import classification

from ..store.schema import MISSING_LABEL
from .losses.catalogue import MULTI_LABEL, REGRESSION, SINGLE_LABEL

Scores = dict[str, float]
_ENTITY_TAG = re.compile(r"O|[BIESLU](-.+)?")


def compute_metrics_for(problem_type: str) -> Callable[[Any], Scores]:
    """`compute_metrics` of a Trainer for one kind of head; rows without a label are left out."""
    score = {SINGLE_LABEL: single_label, MULTI_LABEL: multi_label, REGRESSION: regression}[problem_type]

    def compute_metrics(prediction: Any) -> Scores:
        found, labels = prediction.predictions, prediction.label_ids
        logits = found[0] if isinstance(found, tuple) else found
        return score(torch.as_tensor(np.asarray(logits)).float(), torch.as_tensor(np.asarray(labels)))

    return compute_metrics


def tag_metrics_for(names: Sequence[str] | None) -> Callable[[Any], Scores]:
    """`compute_metrics` of a Trainer for taggers: of entities, where the tags `names` are about entities."""

    def compute_metrics(prediction: Any) -> Scores:
        found, labels = prediction.predictions, prediction.label_ids
        logits = found[0] if isinstance(found, tuple) else found
        return tag_scores(torch.as_tensor(np.asarray(logits)).float(), torch.as_tensor(np.asarray(labels)), names)

    return compute_metrics


def tag_scores(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str] | None) -> Scores:
    """logits [N, S, C], labels int [N, S], -100 for none: accuracy over words; beside it F1 of tags, averaged over
    those that occur, or precision, recall and F1 of whole entities, as seqeval (and conlleval) counts them."""
    known = labels != MISSING_LABEL
    if names is None or not all(_ENTITY_TAG.fullmatch(name) for name in names) or not known.any():
        return single_label(logits.flatten(0, 1), labels.flatten())
    predicted = logits.argmax(-1)
    rows = [
        [[names[at] for at in row[there].tolist()] for row, there in zip(tags, known, strict=True)]
        for tags in (labels, predicted)
    ]
    accuracy = float((predicted == labels)[known].float().mean())
    return {"accuracy": accuracy, **entity_scores(rows[0], rows[1], names)}


def entity_scores(truth: list[list[str]], predicted: list[list[str]], names: Sequence[str]) -> Scores:
    """Precision, recall and F1 over all entities. Tags of B, I, O, E and S as seqeval's default reads them; of B, I, L,
    U and O, which that does not know, in its strict mode."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import BILOU

    strict = any(name[0] in "LU" for name in names)
    more: dict[str, Any] = {"mode": "strict", "scheme": BILOU} if strict else {}
    return {
        name: float(score(truth, predicted, zero_division=0, **more))
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score))
    }


def single_label(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """logits [N, C], labels int [N], -100 for none: accuracy, and F1 averaged over the classes that occur."""
    known = labels != MISSING_LABEL
    if not known.any():
        return {}
    logits, labels, classes = logits[known], labels[known], logits.shape[-1]
    return {
        "accuracy": float(classification.multiclass_accuracy(logits, labels, classes, average="micro")),
        "macro_f1": float(classification.multiclass_f1_score(logits, labels, classes, average="macro")),
    }


def multi_label(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """logits [N, C], labels 0 or 1 [N, C], NaN for unknown: F1 over all entries, and averaged over classes."""
    known = ~labels.isnan()
    if not known.any():
        return {}
    target = torch.where(known, labels, -1).long()
    score = partial(
        classification.multilabel_f1_score, torch.sigmoid(logits), target, logits.shape[-1], ignore_index=-1
    )
    return {
        "accuracy": float(((logits > 0) == (target == 1))[known].float().mean()),
        "micro_f1": float(score(average="micro")),
        "macro_f1": float(score(average="macro")),
    }


def regression(logits: torch.Tensor, labels: torch.Tensor) -> Scores:
    """logits [N] or [N, 1], labels [N], NaN for none: mean squared error, and correlations where they exist."""
    known = ~labels.isnan()
    if not known.any():
        return {}
    predicted, labels = logits.reshape(-1)[known], labels[known].float()
    scores = {"mse": float(metrics.mean_squared_error(predicted, labels))}
    if len(labels) > 1 and predicted.std() > 0 and labels.std() > 0:
        scores["pearson"] = float(metrics.pearson_corrcoef(predicted, labels))
        scores["spearman"] = float(metrics.spearman_corrcoef(predicted, labels))
    return scores


def agreement(logits: torch.Tensor, teacher_logits: torch.Tensor, problem_type: str) -> torch.Tensor:
    """float [B]: 1 where both predict the same class; for several labels, the part of the row's classes."""
    if problem_type == MULTI_LABEL:
        return ((logits > 0) == (teacher_logits > 0)).float().mean(-1)
    return (logits.argmax(-1) == teacher_logits.argmax(-1)).float()
