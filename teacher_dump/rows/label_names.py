"""Do dataset and teacher mean the same by class 0? Names tell, and so does a teacher that is always wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...store.errors import ConfigError

_GENERIC = re.compile(r"label[_ ]?\d+|\d+", re.IGNORECASE)
_ENOUGH = 30  # labelled rows before agreement says anything


def teacher_names(given: Sequence[str], id2label: Mapping[Any, str], num_labels: int) -> list[str] | None:
    """The teacher's class names in its own order; None where its config only numbers them."""
    if given:
        if len(given) != num_labels:
            raise ConfigError(f"--label-names: the teacher has {num_labels} classes; got {len(given)} names")
        return list(given)
    names = [str(id2label.get(at, id2label.get(str(at), at))) for at in range(num_labels)]
    return None if all(_GENERIC.fullmatch(name) for name in names) else names


def agree(dataset: Sequence[str] | None, teacher: Sequence[str] | None, num_labels: int,
          label_order: str) -> tuple[list[str] | None, list[int] | None, list[str]]:  # fmt: skip
    """(names in the teacher's order, dataset id -> teacher id where they differ, notices).

    Raises ConfigError where both have the same names in another order and nobody said which to trust.
    """
    if not dataset or not teacher:
        names = list(teacher or dataset or []) or None
        if names and len(names) != num_labels:
            left_out = f"the dataset names {len(names)} classes and the teacher has {num_labels}: names are left out"
            return None, None, [left_out]
        return names, None, []
    left, right = _folded(dataset), _folded(teacher)
    if not set(left) <= set(right):
        same = left[: len(right)] == right
        differ = f"the dataset's classes are {_show(dataset)}, the teacher's {_show(teacher)}"
        return list(teacher), None, [] if same else [f"{differ}: class 0 of one is taken to be class 0 of the other"]
    order = [right.index(name) for name in left]
    if order == list(range(len(order))):
        return list(teacher), None, []
    if label_order == "by-name":
        return list(teacher), order, [f"labels are converted from the order {_show(dataset)} to the teacher's"]
    if label_order == "by-id":
        return (list(dataset) if len(dataset) == num_labels else None), None, []
    first = next(at for at, to in enumerate(order) if at != to)
    raise ConfigError(
        f"class {first} is {dataset[first]!r} in the dataset and {teacher[first]!r} in the teacher's id2label: give "
        "--label-order by-name to convert the dataset's labels to the teacher's order, or by-id if the teacher's "
        "config is what is wrong"
    )


def disagreement(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> str | None:
    """A line where swapping classes would make a teacher that is mostly wrong mostly right. int64 [n] both."""
    labels, predictions = labels[labels >= 0], predictions[labels >= 0]
    if len(labels) < _ENOUGH or num_labels < 2:
        return None
    counts = np.zeros((num_labels, num_labels), np.int64)
    np.add.at(counts, (predictions, labels), 1)
    agreed, best = np.trace(counts) / len(labels), counts.max(axis=1).sum() / len(labels)
    swapped, seen = counts.argmax(axis=1), counts.sum(axis=1) > 0
    if best < 0.7 or agreed > best / 2 or len(set(swapped[seen])) < seen.sum() or seen.sum() < 2:
        return None
    pairs = ", ".join(f"{at} is {to}" for at, to in enumerate(swapped) if seen[at] and at != to)
    return (
        f"on {len(labels)} rows the teacher agrees with {agreed:.0%} of the labels, and would with {best:.0%} if its "
        f"class {pairs} of the dataset: are the dataset's classes in the teacher's order?"
    )


def _folded(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _show(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
