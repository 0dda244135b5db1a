"""Stores of a run: an ensemble, or read one after another as one; the split to evaluate on; the rows of a split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..store.errors import ConfigError, StoreMismatch
from ..store.identity import canonical, short
from ..store.reader import TeacherStore
from .dataset import ConcatRows, longest, readable
from .ensembles.join import Ensemble, joined
from .objective import Objective
from .settings import TrainConfig
from .students import Student
from .tasks import task_of

_SHARED = ("vocabulary", "draws")  # parameters of columns that a batch can have one of


def open_stores(paths: Sequence[str]) -> list[TeacherStore]:
    """Of an ensemble store each of its teachers. Raises StoreMismatch where they are of several tasks."""
    given = [str(path).rstrip("/") for path in paths]
    if twice := [path for path in given if given.count(path) > 1]:
        raise ConfigError(f"the store {twice[0]} is given twice")
    stores = [member for path in paths for member in TeacherStore.open(path).members]
    for other in stores[1:]:
        _check_agree(stores[0], other, [("task", stores[0].task, other.task)])
    return stores


def together(config: TrainConfig, stores: Sequence[TeacherStore], evaluated: str | None) -> Ensemble | None:
    """The stores as an ensemble; None where there is one, or they are read one after another.

    Raises StoreMismatch where they can be neither, ConfigError for settings of an ensemble where there is none.
    """
    config.check_ensemble(len(stores), next((str(one.path) for one in stores if one.member), None))
    ensemble = joined(config, stores, [split for split in (config.train_split, evaluated) if split])
    if ensemble is None:
        check_alike(stores)
    return ensemble


def check_alike(stores: Sequence[TeacherStore]) -> None:
    """Raises StoreMismatch where several stores cannot be read one after another."""
    first = stores[0]
    for other in stores[1:]:
        _check_agree(first, other, [
            ("tokenizer", *(one.identity.get("tokenizer", {}).get("sha256") for one in (first, other))),
            ("image processing", first.settings.get("processing"), other.settings.get("processing")),
            ("label names", first.label_names, other.label_names),
            *((f"column {name}", _kept(first, name), _kept(other, name)) for name in _compared(first, other)),
        ])  # fmt: skip


def _check_agree(first: TeacherStore, other: TeacherStore, compared: Iterable[tuple[str, Any, Any]]) -> None:
    for what, ours, theirs in compared:
        if canonical(ours) != canonical(theirs):
            raise StoreMismatch(
                f"{what} differs: {first.place} has {short(ours)}, {other.place} has {short(theirs)}; "
                "only stores that agree are trained on together"
            )


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
    where: str | None = None, ensemble: Ensemble | None = None,
) -> Any:  # fmt: skip
    """Rows of one split of all stores, in the student's tokens; to train on, those that the loss can learn from.

    Of an ensemble `where` and the student's tokens are the leading store's.
    """
    training, task = split == config.train_split, task_of(stores[0])
    parts = []
    wanted = objective.fields if training else objective.evaluation_fields
    for store in stores[:1] if ensemble else stores:
        if lacking := [name for name in wanted if name in stores[0].fields and name not in store.fields]:
            raise StoreMismatch(
                f"the loss reads {lacking[0]}, which {stores[0].place} has and {store.place} has not; only stores that "
                "agree are trained on together"
            )
        rows = store.select(split=split, where=where, fields=[]).with_fields(wanted)
        if training:
            rows = task.learnable(rows, objective)
        if not len(rows):
            reason = f"--where {where!r} keeps" if where else "there are"
            raise ConfigError(f"{store.place}: {reason} no rows of split {split} that the loss can learn from")
        retokenize = student.retokenize
        parts.append(readable(task.retokenized(rows, student.tokenizer, config.text_column) if retokenize else rows))
    task.check_rows(student.model, max(longest(part) for part in parts))
    if ensemble:
        return ensemble.around(parts[0], rows, student, split, wanted)
    if len(parts) == 1:
        return parts[0]
    return ConcatRows(parts, {name: spec.pad for name, spec in stores[0].fields.items()})
