"""Stores that are read one after another as one, the split to evaluate on, and the rows of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..store.errors import ConfigError, StoreMismatch
from ..store.identity import canonical, short
from ..store.reader import TeacherStore
from .dataset import ConcatRows
from .objective import Objective
from .settings import TrainConfig
from .students import Student
from .tasks import task_of

_SHARED = ("vocabulary", "draws")  # parameters of columns that a batch can have one of


def open_stores(paths: Sequence[str]) -> list[TeacherStore]:
    """Raises StoreMismatch where several stores cannot be read one after another."""
    stores = [TeacherStore.open(path) for path in paths]
    first = stores[0]
    for other in stores[1:]:
        for what, ours, theirs in (
            ("task", first.task, other.task),
            (
                "tokenizer",
                first.identity.get("tokenizer", {}).get("sha256"),
                other.identity.get("tokenizer", {}).get("sha256"),
            ),
            ("label names", first.label_names, other.label_names),
            *((f"column {name}", _kept(first, name), _kept(other, name)) for name in _compared(first, other)),
        ):
            if canonical(ours) != canonical(theirs):
                raise StoreMismatch(
                    f"{what} differs: {first.path} has {short(ours)}, {other.path} has {short(theirs)}; "
                    "only stores that agree are trained on together"
                )
    return stores


def _compared(*stores: TeacherStore) -> list[str]:
    """Inputs, labels and the teacher columns that the task reads, of any of these stores of one task."""
    roles = ("input", "label")
    return list(dict.fromkeys(
        name for store in stores for name, spec in store.fields.items()
        if spec.role in roles or name in task_of(store).columns
    ))  # fmt: skip


def _kept(store: TeacherStore, name: str) -> Any:
    """What rows of a column must share to be in one batch; None where there is no such column."""
    if name not in store.fields:
        return None
    spec = store.fields[name]
    return [*spec.shape, *(f"{one}={spec.parameters[one]}" for one in _SHARED if one in spec.parameters)]


def evaluation_split(config: TrainConfig, stores: Sequence[TeacherStore]) -> str | None:
    """The split to evaluate on; None where there is none, or none is wanted."""
    wanted = str(config.training_arguments.get("eval_strategy", "epoch"))
    if wanted in ("no", "IntervalStrategy.NO", "False"):
        return None
    shared = [split for split in stores[0].splits if all(split in store.splits for store in stores)]
    candidates = [config.eval_split] if config.eval_split else ["validation", "test"]
    found = next((split for split in candidates if split in shared), None)
    if found is None and (config.eval_split or "eval_strategy" in config.training_arguments):
        raise ConfigError(
            f"there is no split {' or '.join(candidates)} to evaluate on; the store has {', '.join(shared)}"
        )
    return found


def select(
    config: TrainConfig, stores: Sequence[TeacherStore], student: Student, objective: Objective, split: str,
    where: str | None = None,
) -> Any:  # fmt: skip
    """Rows of one split of all stores, in the student's tokens; to train on, those that the loss can learn from."""
    training, task = split == config.train_split, task_of(stores[0])
    parts = []
    wanted = objective.fields if training else objective.evaluation_fields
    for store in stores:
        if lacking := [name for name in wanted if name in stores[0].fields and name not in store.fields]:
            raise StoreMismatch(
                f"the loss reads {lacking[0]}, which {stores[0].path} has and {store.path} has not; only stores that "
                "agree are trained on together"
            )
        rows = store.select(split=split, where=where, fields=[]).with_fields(wanted)
        if training:
            rows = task.learnable(rows, objective)
        if not len(rows):
            reason = f"--where {where!r} keeps" if where else "there are"
            raise ConfigError(f"{store.path}: {reason} no rows of split {split} that the loss can learn from")
        parts.append(task.retokenized(rows, student.tokenizer, config.text_column) if student.retokenize else rows)
    task.check_rows(student.model, max(int(part.lengths.max()) for part in parts))
    if len(parts) == 1:
        return parts[0]
    return ConcatRows(parts, {name: spec.pad for name, spec in stores[0].fields.items()})
