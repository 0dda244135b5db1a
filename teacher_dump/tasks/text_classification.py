"""Text classification: one text or a pair; single-label, multi-label and regression heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ...store import ConfigError, DataError, FieldSpec, content_hash
from ...store.head import logits_of
from ...store.schema import INPUT_IDS, LABELS, LOGITS, TOKEN_TYPES
from ..config import AUTO, NO_COLUMN, DumpConfig
from ..data import SourceData, check_columns
from ..label_names import agree, teacher_names
from ..labels import MULTI, REGRESSION, SINGLE, Labels, class_names, is_list
from ..teacher import Teacher
from ..texts import check_text, chunks, flat
from . import Samples

_REAL_SUMMARIES = ("confidence", "entropy", "loss")


class TextClassification:
    """C classes (or one real number) for each text."""

    model_class = "AutoModelForSequenceClassification"

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.teacher, self.tokenizer, self.num_labels = teacher, teacher.tokenizer, teacher.num_labels
        self.texts = [name for name in (config.text_column, config.text_pair_column) if name]
        self.label_column = _label_column(config, source)
        explicit = [self.label_column] if self.label_column and config.label_column != AUTO else []
        check_columns(source, [*self.texts, *explicit])
        self.columns = [*self.texts, *([self.label_column] if self.label_column else [])]
        feature = next((f[self.label_column] for f in source.features.values() if self.label_column in f), None)
        self.problem_type = _problem_type(config, teacher, feature)
        self.notices: list[str] = []
        self.labels = self._make_labels(config, feature)
        self.max_length = teacher.max_length(config.max_length)
        self.types = TOKEN_TYPES in self.tokenizer.model_input_names and TOKEN_TYPES in teacher.inputs
        self.fields = self._make_fields(config)
        self.settings = {
            "text_column": config.text_column, "text_pair_column": config.text_pair_column,
            "label_column": self.label_column, "label_order": config.label_order, "problem_type": self.problem_type,
            "max_length": self.max_length, "fields": list(config.fields), "dtype": config.dtype,
        }  # fmt: skip

    @property
    def label_names(self) -> list[str] | None:
        return self.labels.names

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        for name in self.texts:
            check_text(split, start, rows, name)
        if self.label_column in rows.column_names:
            self.labels.check(rows.column(self.label_column), split, start)

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        made = [self._tokenize(chunk) for chunk in chunks(rows.select(self.texts))]
        lengths, ids, types, hashes, truncated = (list(column) for column in zip(*made, strict=True))
        count = np.concatenate(lengths)
        if (count == 0).any():
            row = source_index[(count == 0).argmax()]
            raise DataError(f"split {split}, row {row}: the tokenizer makes no tokens of it; fill it or drop the row")
        known = self.label_column in rows.column_names
        labels = self.labels.convert(rows.column(self.label_column), split) if known else self.labels.missing(len(rows))
        values = {INPUT_IDS: np.concatenate(ids), LABELS: labels}
        if self.types:
            values[TOKEN_TYPES] = np.concatenate(types)
        digests = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(rows), 16)
        return Samples({"S": count}, values, digests, source_index, {"truncated": sum(truncated)})

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return samples.inputs(rows, self.teacher.pad_id, self.tokenizer.pad_token_type_id)

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any classifier will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray) -> dict[str, Any]:
        return {"logits": logits_of(model(**inputs))}

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        logits, labels = captured["logits"], samples.values[LABELS][rows]
        with np.errstate(invalid="ignore", over="ignore"):  # not finite: refused when the logits are stored
            return {LOGITS: logits, **_SUMMARIES[self.problem_type](logits, labels)}

    def _make_labels(self, config: DumpConfig, feature: Any) -> Labels:
        column = self.label_column or LABELS
        if self.problem_type == REGRESSION:
            return Labels(column, REGRESSION, 1, None)
        known = teacher_names(config.label_names, self.teacher.config.id2label, self.num_labels)
        names, order, self.notices = agree(class_names(feature), known, self.num_labels, config.label_order)
        return Labels(column, self.problem_type, self.num_labels, names, order)

    def _make_fields(self, config: DumpConfig) -> list[FieldSpec]:
        inputs = [FieldSpec(INPUT_IDS, ("S",), "int32", role="input", pad=self.teacher.pad_id)]
        if self.types:
            inputs.append(FieldSpec(TOKEN_TYPES, ("S",), "int8", role="input", pad=self.tokenizer.pad_token_type_id))
        label_shape, label_dtype, shape, dtype = {
            SINGLE: ((), "int64", (), "int64"),
            MULTI: ((self.num_labels,), "float32", ("*",), "int64"),
            REGRESSION: ((), "float32", (), "float32"),
        }[self.problem_type]
        return [
            *inputs,
            FieldSpec(LABELS, label_shape, label_dtype, role="label"),
            FieldSpec(LOGITS, (self.num_labels,), "float16" if config.dtype == "int8" else config.dtype),
            FieldSpec("teacher_prediction", shape, dtype, role="summary"),
            *(FieldSpec(f"teacher_{name}", (), "float32", role="summary") for name in _REAL_SUMMARIES),
        ]

    def _tokenize(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes, int]:
        """(lengths int64 [n], ids int32 flat, token types int8 flat, 16 bytes a row, rows that were cut)."""
        texts = [rows.column(name).to_pylist() for name in self.texts]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False,
                                 return_token_type_ids=self.types)  # fmt: skip
        lengths, ids = flat(encoded[INPUT_IDS])
        _, types = flat(encoded[TOKEN_TYPES] if self.types else [], np.int8)
        whole = encoded.encodings
        cut = sum(bool(one.overflowing) for one in whole) if whole else int((lengths == self.max_length).sum())
        return lengths, ids, types, b"".join(map(content_hash, zip(*texts, strict=True))), cut


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
