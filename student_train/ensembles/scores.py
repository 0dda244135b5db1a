"""What an ensemble knows before a student has learnt anything: its own metrics, its members', and learnt weights.

Nothing is run: the stored answers of the teachers are judged as a student's would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ...store.errors import ConfigError
from ...store.schema import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_IDS,
    LABELS,
    MISSING_LABEL,
    START_LOGITS,
    WORD_IDS,
)
from ..collator import DataCollatorForDistillation
from ..losses.catalogue import MULTI_LABEL, SINGLE_LABEL
from ..losses.terms import Term
from ..objective import Objective, Totals
from ..progress import say
from .formulas import learned_weights
from .join import Ensemble
from .rows import EnsembleRows

BATCH = 256  # rows judged at a time
_NAMES = {START_LOGITS: "start_logits", END_LOGITS: "end_logits"}  # as a model calls them


def judged(ensemble: Ensemble, rows: EnsembleRows, settings: Any) -> dict[str, Any]:
    """For metrics.json: `eval_ensemble_accuracy` and `eval_member_accuracy` {store: value}, and so on for each metric
    of the task, of labelled rows of the split to evaluate on (not of tasks that keep no logits); and `ensemble` itself.

    settings: DistillationSettings.
    """
    objective = ensemble.task.objective([Term("logits")])
    objective.settle(settings)
    if objective.judges_rows:
        scores = _of_rows(ensemble, rows.narrowed(objective.evaluation_fields), objective)
    elif ensemble.task.compute_metrics is not None:
        scores = _of_logits(ensemble, rows.answers_only([*ensemble.averaged, LABELS, WORD_IDS]))
    elif objective.judges_answers:
        scores = _of_totals(ensemble, rows.narrowed(objective.evaluation_fields), objective)
    else:
        return ensemble.told()
    found: dict[str, Any] = {f"eval_ensemble_{name}": value for name, value in scores[0].items()}
    places = [store.place for store in ensemble.stores]
    for name in scores[0]:
        each = {where: one[name] for where, one in zip(places, scores[1:], strict=True) if name in one}
        found[f"eval_member_{name}"] = {store.place: each[store.place] for store in ensemble.given}
    return found | ensemble.told()


def _of_logits(ensemble: Ensemble, rows: EnsembleRows) -> list[dict[str, float]]:
    """The task's metrics of the ensemble, then of each teacher."""
    kept: list[list[np.ndarray]] = [[] for _ in range(1 + len(ensemble.stores))]
    labels = []
    [name] = ensemble.averaged
    for batch, answers in _batches(rows):
        if LABELS not in batch:
            return [{}] * len(kept)
        labels.append(np.array(batch[LABELS]))
        for own, said in zip(kept, (batch, *answers), strict=True):
            own.append(np.array(said[name], np.float32))
    assert ensemble.task.compute_metrics is not None
    truth = _padded(labels, MISSING_LABEL)
    return [ensemble.task.compute_metrics(EvalPrediction(_padded(own, 0), truth)) for own in kept]


def _of_rows(ensemble: Ensemble, rows: EnsembleRows, objective: Objective) -> list[dict[str, float]]:
    """What the objective says of rows, of students that answer what the ensemble, and each teacher, said."""
    kept: list[list[np.ndarray]] = [[] for _ in range(1 + len(ensemble.stores))]
    for batch, answers in _batches(rows):
        plain = {name: value for name, value in batch.items() if name not in ensemble.averaged}
        inputs = DataCollatorForDistillation()(plain)
        for own, said in zip(kept, (batch, *answers), strict=True):
            own.append(_evaluated(objective, inputs, {name: said[name] for name in ensemble.averaged}))
    return [objective.row_scores(rows, np.concatenate(own)) for own in kept]


def _of_totals(ensemble: Ensemble, rows: EnsembleRows, objective: Objective) -> list[dict[str, float]]:
    """The objective's metrics, without losses, of students that answer what the ensemble, and each teacher, said."""
    totals = [Totals() for _ in range(1 + len(ensemble.stores))]
    [name] = ensemble.averaged
    for batch, answers in _batches(rows):
        inputs = DataCollatorForDistillation()(batch)
        for own, said in zip(totals, (batch, *answers), strict=True):
            logits = torch.from_numpy(np.array(said[name], np.float32))
            student: Any = lambda logits=logits, **_: logits  # noqa: E731
            found = objective.evaluate(student, {}, inputs, len(logits)).totals
            assert found is not None
            own.add(found.double())
    made = [objective.scores(one.sums) if one.sums is not None else {} for one in totals]
    return [{name: value for name, value in one.items() if not name.startswith(("loss", "teacher_"))} for one in made]


def learn(ensemble: Ensemble, rows: EnsembleRows) -> None:
    """Weights on the labelled rows of a split. Raises ConfigError where none is labelled."""
    logits: list[list[torch.Tensor]] = []
    labels: list[torch.Tensor] = []
    names = [*ensemble.averaged, *ensemble.averaged.values(), WORD_IDS, INPUT_IDS]
    for batch, answers in _batches(rows.answers_only(names)):
        for name, label in ensemble.averaged.items():
            stacked, _ = rows.combination.stacked(name, [one[name] for one in answers], batch.get(ATTENTION_MASK))
            if label not in batch:
                raise ConfigError(f"{ensemble.lead.path} has no {label} to learn --ensemble-weights from")
            told = torch.from_numpy(np.array(batch[label]))
            known = _labelled(told, ensemble.problem_type)
            logits.append(list(stacked[:, known]))
            labels.append(told[known])
    if not sum(map(len, labels)):
        raise ConfigError(
            f"split {ensemble.split} has no labelled row to learn --ensemble-weights from; give --ensemble-split"
        )
    width = max(one.shape[-1] for each in logits for one in each)
    padded = [torch.stack([_wider(one, width) for one in each]) for each in logits if len(each[0])]
    target = torch.cat([one for one in labels if len(one)])
    found = learned_weights(torch.cat(padded, 1), target, ensemble.config.ensemble_average, ensemble.problem_type)
    ensemble.weights = found
    shown = ", ".join(f"{path} {weight:.3f}" for path, weight in ensemble.told()["ensemble"]["weights"].items())
    say(f"weights learnt from {len(target):,} labels of {ensemble.split}: {shown}")


def _batches(rows: EnsembleRows) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(a batch with the ensemble's answers, the answers of each teacher), in order."""
    numbers = [range(start, min(start + BATCH, len(rows))) for start in range(0, len(rows), BATCH)]
    for batch, others in rows.apart(map(np.asarray, numbers)):
        names = [name for name in rows.combination.columns if name in batch]
        each = [rows.answers(name, batch, others) for name in names]
        yield rows.together(batch, others), [dict(zip(names, said, strict=True)) for said in zip(*each, strict=True)]


def _evaluated(objective: Objective, batch: Mapping[str, Any], said: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is kept of a student that answers what a teacher said."""
    answers = {_NAMES[name]: torch.from_numpy(np.array(values)) for name, values in said.items()}
    student: Any = lambda **_: answers  # noqa: E731
    found = objective.evaluate(student, {}, batch, len(next(iter(said.values()))))
    assert found.logits is not None
    return found.logits.numpy()


def _padded(parts: Sequence[np.ndarray], pad: float) -> np.ndarray:
    """Batches one after another, [N, longest, ...]."""
    if parts[0].ndim < 2 or len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    longest = max(part.shape[1] for part in parts)
    rest = [(0, 0)] * (parts[0].ndim - 2)
    return np.concatenate(
        [np.pad(part, [(0, 0), (0, longest - part.shape[1]), *rest], constant_values=pad) for part in parts]
    )


def _labelled(labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """bool, of rows (or tokens): which have a label."""
    if problem_type == SINGLE_LABEL:
        return labels != MISSING_LABEL
    known = ~labels.isnan()
    return known.any(-1) if problem_type == MULTI_LABEL else known


def _wider(logits: torch.Tensor, width: int) -> torch.Tensor:
    """[N, C] with classes that cannot be, up to `width`: rows of QA have as many as they have tokens."""
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]), value=-torch.inf)
