"""What a classifier says of a row, whatever the row is: labels, logits and what is summed up of them.

B rows, C classes (1 of regression).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ...store import ConfigError, FieldSpec
from ...store.schema import LABELS, LOGITS
from ..config import AUTO, NO_COLUMN, DumpConfig
from ..data import SourceData, check_columns
from ..rows.label_names import agree, teacher_names
from ..rows.labels import MULTI, REGRESSION, SINGLE, Labels, class_names, is_list
from ..teachers.teacher import Teacher

REAL_SUMMARIES = ("confidence", "entropy", "loss")


class Classes:
    """The label column of a dataset, in the classes of a teacher. Raises ConfigError where they cannot be brought
    together, DataError where the column that is asked for is not there.

    column: where labels are, or None. names: of the classes. notices: lines worth telling.
    """

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.num_labels, self.column = teacher.num_labels, _label_column(config, source)
        if self.column and config.label_column != AUTO:
            check_columns(source, [self.column])
        feature = next((f[self.column] for f in source.features.values() if self.column in f), None)
        self.problem_type = _problem_type(config, teacher, feature)
        self.notices: list[str] = []
        self.labels = self._make_labels(config, teacher, feature)
        self.settings = {
            "label_column": self.column, "label_order": config.label_order, "problem_type": self.problem_type,
        }  # fmt: skip

    @property
    def names(self) -> list[str] | None:
        return self.labels.names

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        if self.column in rows.column_names:
            self.labels.check(rows.column(self.column), split, start)

    def of(self, rows: pa.Table, split: str) -> np.ndarray:
        """Labels of these rows, missing ones where the split has no such column."""
        known, self.labels.settled = self.column in rows.column_names, True
        return self.labels.convert(rows.column(self.column), split) if known else self.labels.missing(len(rows))

    def fields(self, dtype: str) -> list[FieldSpec]:
        """Labels, logits and summaries."""
        label_shape, label_dtype, shape, kind = {
            SINGLE: ((), "int64", (), "int64"),
            MULTI: ((self.num_labels,), "float32", ("*",), "int64"),
            REGRESSION: ((), "float32", (), "float32"),
        }[self.problem_type]
        return [
            FieldSpec(LABELS, label_shape, label_dtype, role="label"),
            FieldSpec(LOGITS, (self.num_labels,), "float16" if dtype == "int8" else dtype),
            FieldSpec("teacher_prediction", shape, kind, role="summary"),
            *(FieldSpec(f"teacher_{name}", (), "float32", role="summary") for name in REAL_SUMMARIES),
        ]

    def outputs(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Columns of a batch: logits float32 [B, C], labels as `of` gives them."""
        with np.errstate(invalid="ignore", over="ignore"):  # not finite: refused when the logits are stored
            return {LOGITS: logits, **_SUMMARIES[self.problem_type](logits, labels)}

    def _make_labels(self, config: DumpConfig, teacher: Teacher, feature: Any) -> Labels:
        column = self.column or LABELS
        if self.problem_type == REGRESSION:
            return Labels(column, REGRESSION, 1, None)
        known = teacher_names(config.label_names, teacher.config.id2label, self.num_labels)
        names, order, self.notices = agree(class_names(feature), known, self.num_labels, config.label_order)
        return Labels(column, self.problem_type, self.num_labels, names, order)


def _label_column(config: DumpConfig, source: SourceData) -> str | None:
    if config.label_column not in (AUTO, NO_COLUMN):
        return config.label_column
    there = {name for rows in source.splits.values() for name in rows.column_names}
    return next((name for name in ("label", "labels") if name in there and config.label_column == AUTO), None)


def _problem_type(config: DumpConfig, teacher: Teacher, feature: Any) -> str:
    said = config.problem_type if config.problem_type != AUTO else teacher.config.problem_type
    guess = REGRESSION if teacher.num_labels == 1 else MULTI if is_list(feature) else SINGLE
    kind = said or guess
    if (kind == REGRESSION) != (teacher.num_labels == 1) and kind != MULTI:
        raise ConfigError(
            f"the teacher gives {teacher.num_labels} numbers a row, which does not suit {kind}: regression takes one, "
            "single_label_classification two or more; see --problem-type"
        )
    return kind


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def single_summaries(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """logits [B, C], labels int64 [B]. Entropy and loss in nats."""
    logprobs = _log_softmax(logits)
    probs = np.exp(logprobs)
    at = np.where(labels < 0, 0, labels)[:, None]
    loss = -np.take_along_axis(logprobs, at, axis=1)[:, 0]
    return {
        "teacher_prediction": logits.argmax(axis=1),
        "teacher_confidence": probs.max(axis=1),
        "teacher_entropy": -(probs * np.where(probs > 0, logprobs, 0)).sum(axis=1),
        "teacher_loss": np.where(labels < 0, np.nan, loss),
    }


def _multi(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Each class a yes or no: logits [B, C], labels float32 [B, C]; the loss is the mean over known entries."""
    yes, no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)  # log p, log (1 - p)
    probs, known = np.exp(yes), ~np.isnan(labels)
    each = np.where(known, -(np.nan_to_num(labels) * yes + (1 - np.nan_to_num(labels)) * no), 0)
    count = known.sum(axis=1)
    return {
        "teacher_prediction": [np.flatnonzero(row > 0) for row in logits],
        "teacher_confidence": np.maximum(probs, 1 - probs).mean(axis=1),
        "teacher_entropy": -(probs * yes + np.exp(no) * no).sum(axis=1),
        "teacher_loss": np.where(count > 0, each.sum(axis=1) / np.maximum(count, 1), np.nan),
    }


def _regression(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """logits [B, 1], labels float32 [B]: squared error, and no confidence or entropy."""
    undefined = np.full(len(logits), np.nan, np.float32)
    return {
        "teacher_prediction": logits[:, 0],
        "teacher_confidence": undefined,
        "teacher_entropy": undefined,
        "teacher_loss": (logits[:, 0] - labels) ** 2,
    }


_SUMMARIES = {SINGLE: single_summaries, MULTI: _multi, REGRESSION: _regression}
