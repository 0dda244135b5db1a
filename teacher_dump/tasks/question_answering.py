"""Extractive question answering: where in a context the answer to a question begins and ends.

B rows, S tokens. A source row is a question; a stored row is a window of its context, `view` says which. Position 0,
the CLS token, stands for: no answer here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ...store import ConfigError, DataError, FieldSpec, content_hash
from ...store.schema import (
    END_LOGITS,
    END_POSITIONS,
    INPUT_IDS,
    MISSING_LABEL,
    OFFSETS,
    OUTSIDE,
    START_LOGITS,
    START_POSITIONS,
    TOKEN_TYPES,
)
from ..config import AUTO, NO_COLUMN, DumpConfig
from ..data import SourceData, check_columns
from ..rows.documents import check_fast
from ..rows.squad import (
    ANSWERS,
    ANSWERS_TYPE,
    CONTEXT,
    ID,
    QUESTION,
    START,
    TEXT,
    Answers,
    Windows,
    answer_tokens,
    answers_of,
    check_answers,
    windows,
)
from ..rows.texts import check_text, chunks
from ..teachers.teacher import Teacher
from . import Samples

_USUAL_LENGTH, _USUAL_STRIDE = 384, 128  # tokens, of BERT's own readers
_ENDS = (START_LOGITS, END_LOGITS)
_CARRIED = {ID: pa.string(), QUESTION: pa.string(), CONTEXT: pa.string(), ANSWERS: ANSWERS_TYPE}


class QuestionAnswering:
    """Two logits a token: the answer begins here, the answer ends here."""

    model_class = "AutoModelForQuestionAnswering"
    label_names = None

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.teacher, self.tokenizer = teacher, teacher.tokenizer
        check_fast(self.tokenizer, "questions")
        self.question, self.context = str(config.text_column), config.text_pair_column or CONTEXT
        self.answers = _answer_column(config, source)
        explicit = [self.answers] if self.answers and config.label_column != AUTO else []
        check_columns(source, [self.question, self.context, *explicit])
        self.id = ID if all(ID in rows.column_names for rows in source.splits.values()) else None
        self.columns = [name for name in (self.id, self.question, self.context, self.answers) if name]
        self.notices = [] if self.answers else ["no column of answers: questions are kept without labels"]
        self.max_length, self.doc_stride = _lengths(config, teacher)
        self.types = TOKEN_TYPES in self.tokenizer.model_input_names and TOKEN_TYPES in teacher.inputs
        self.fields = self._make_fields(config)
        self.settings = {
            "text_column": self.question, "text_pair_column": self.context, "label_column": self.answers,
            "max_length": self.max_length, "doc_stride": self.doc_stride, "fields": list(config.fields),
            "dtype": config.dtype,
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        for name in (self.question, self.context):
            check_text(split, start, rows, name, empty=name != self.question)
        for chunk in chunks(rows.select([name for name in self.columns if name in rows.column_names])):
            numbers = np.arange(start, start + len(chunk))
            found = self._answers(split, numbers, chunk)
            contexts = chunk.column(self.context).to_pylist()
            names = self._ids(numbers, chunk)
            for at, (answers, context) in enumerate(zip(found, contexts, strict=True)):
                check_answers(answers or [], context, _where(split, numbers[at], names[at]))
            self._check_room(split, numbers, names, chunk.column(self.question).to_pylist())
            start += len(chunk)

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        made, done = [], 0
        for chunk in chunks(rows.select([name for name in self.columns if name in rows.column_names])):
            made.append(self._windows(split, source_index[done : done + len(chunk)], chunk))
            done += len(chunk)
        return _joined(made)

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return samples.inputs(rows, self.teacher.pad_id, self.tokenizer.pad_token_type_id)

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any reader will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray) -> dict[str, Any]:
        found = model(**inputs)
        return {START_LOGITS: found.start_logits, END_LOGITS: found.end_logits}

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        positions = np.stack([samples.values[name][rows] for name in (START_POSITIONS, END_POSITIONS)], 1)
        logits = np.stack([captured[name].astype(np.float32) for name in _ENDS], 1)
        mask = samples.mask(rows)[:, None].astype(bool)
        with np.errstate(invalid="ignore", over="ignore"):  # not finite: refused when the logits are stored
            found = summaries(np.where(mask, logits, -np.inf), positions)
        return {**{name: captured[name] for name in _ENDS}, **found}

    def _make_fields(self, config: DumpConfig) -> list[FieldSpec]:
        kept = "float16" if config.dtype == "int8" else config.dtype
        inputs = [FieldSpec(INPUT_IDS, ("S",), "int32", role="input", pad=self.teacher.pad_id)]
        if self.types:
            inputs.append(FieldSpec(TOKEN_TYPES, ("S",), "int8", role="input", pad=self.tokenizer.pad_token_type_id))
        return [
            *inputs,
            FieldSpec(OFFSETS, ("S", 2), "int32", role="input", pad=OUTSIDE),
            *(FieldSpec(name, (), "int64", role="label") for name in (START_POSITIONS, END_POSITIONS)),
            *(FieldSpec(name, ("S",), kept) for name in _ENDS),
            FieldSpec("teacher_prediction", (2,), "int64", role="summary"),
            *(FieldSpec(f"teacher_{one}", (), "float32", role="summary") for one in ("confidence", "entropy", "loss")),
            *(FieldSpec(name, (), str(kind), codec="arrow", role="carried") for name, kind in _CARRIED.items()),
        ]

    def _windows(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        asked, contexts = (rows.column(name).to_pylist() for name in (self.question, self.context))
        stripped = [one.strip() for one in asked]
        found = windows(self.tokenizer, stripped, contexts, self.max_length, self.doc_stride, self.types)
        self._check_first(found)
        answers = self._answers(split, source_index, rows)
        spans = found.spans
        at = [answer_tokens(span, answers[row]) for span, row in zip(spans, found.row.tolist(), strict=True)]
        starts, ends = np.array(at, np.int64).T
        values: dict[str, Any] = {
            INPUT_IDS: found.ids, OFFSETS: found.offsets, START_POSITIONS: starts, END_POSITIONS: ends,
            **_carried(found, self._ids(source_index, rows), asked, contexts, answers),
        }  # fmt: skip
        if self.types:
            values[TOKEN_TYPES] = found.types
        digests = np.frombuffer(b"".join(_hashes(found.row, spans, asked, contexts)), np.uint8).reshape(-1, 16)
        return Samples({"S": found.lengths}, values, digests, source_index[found.row], view=found.view)

    def _answers(self, split: str, numbers: np.ndarray, rows: pa.Table) -> list[Answers | None]:
        """Of each row; None where it is not labelled. Raises DataError."""
        if self.answers not in rows.column_names:
            return [None] * len(rows)
        names = self._ids(numbers, rows)
        values = rows.column(self.answers).to_pylist()
        return [answers_of(value, _where(split, numbers[at], names[at])) for at, value in enumerate(values)]

    def _ids(self, numbers: np.ndarray, rows: pa.Table) -> list[str]:
        """The questions' own ids, else their numbers."""
        return [str(one) for one in (rows.column(self.id).to_pylist() if self.id else numbers.tolist())]

    def _check_room(self, split: str, numbers: np.ndarray, names: list[str], asked: list[str]) -> None:
        """Raises DataError where a question leaves no room for the context; a token is at least one byte, so most are
        known to leave some without being made into tokens."""
        least = self.doc_stride + 1  # tokens of the context
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - least
        for at, question in enumerate(asked):
            if len(question.encode()) <= room:
                continue
            size = len(self.tokenizer(question.strip(), add_special_tokens=False, verbose=False)[INPUT_IDS])
            if size > room:
                raise DataError(
                    f"{_where(split, numbers[at], names[at])}: a question of at most {room} tokens expected, so that "
                    f"{least} of the context fit beside it; it has {size}: shorten it, or give another --max-length or "
                    "--doc-stride"
                )

    def _check_first(self, found: Windows) -> None:
        """Raises ConfigError where CLS, which stands for no answer, is not the first token."""
        first = found.ids[found.lengths.cumsum() - found.lengths]
        own = self.tokenizer.cls_token_id
        if own is not None and (first != own).any():
            raise ConfigError(
                f"a teacher whose inputs begin with {self.tokenizer.cls_token!r} expected, which stands for no answer; "
                f"they begin with {self.tokenizer.convert_ids_to_tokens(int(first[0]))!r}: give another teacher"
            )


def summaries(logits: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """logits float32 [B, 2, Smax], -inf in padding; positions int64 [B, 2]. Means over start and end, in nats; the loss
    is NaN where there is no label."""
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    probs, known = np.exp(logprobs), (positions != MISSING_LABEL).all(-1)
    own = np.take_along_axis(logprobs, positions.clip(min=0)[..., None], -1)[..., 0]
    return {
        "teacher_prediction": logits.argmax(-1),
        "teacher_confidence": probs.max(-1).mean(-1),
        "teacher_entropy": -(probs * np.where(probs > 0, logprobs, 0)).sum(-1).mean(-1),
        "teacher_loss": np.where(known, -own.mean(-1), np.nan),
    }


def _carried(
    found: Windows, names: list[str], asked: list[str], contexts: list[str], answers: list[Answers | None]
) -> dict[str, pa.Array]:
    """Of each window; context and answers with the first one of a question alone, where long ones would weigh most."""
    told = [None if one is None else {TEXT: [text for text, _ in one], START: [at for _, at in one]} for one in answers]
    columns: dict[str, list[Any]] = {ID: names, QUESTION: asked, CONTEXT: contexts, ANSWERS: told}
    made = {}
    for name, values in columns.items():
        once = name in (CONTEXT, ANSWERS)
        kept = [
            None if once and view else values[row] for row, view in zip(found.row.tolist(), found.view, strict=True)
        ]
        made[name] = pa.array(kept, _CARRIED[name])
    return made


def _hashes(row: np.ndarray, spans: list[np.ndarray], asked: list[str], contexts: list[str]) -> list[bytes]:
    """Of each window: the question, and the stretch of the context that it reads."""
    made = []
    for at, span in zip(row.tolist(), spans, strict=True):
        inside = span[span[:, 0] != OUTSIDE]
        stretch = contexts[at][inside[0, 0] : inside[-1, 1]] if len(inside) else ""
        made.append(content_hash((asked[at], stretch)))
    return made


def _joined(parts: list[Samples]) -> Samples:
    """Rows of several chunks, one after another."""
    if len(parts) == 1:
        return parts[0]
    values = {
        name: pa.concat_arrays([one.values[name] for one in parts]) if name in _CARRIED
        else np.concatenate([one.values[name] for one in parts])
        for name in parts[0].values
    }  # fmt: skip
    hashes, source, view, lengths = (
        np.concatenate([getattr(one, name) if name != "S" else one.lengths[name] for one in parts])
        for name in ("content_hash", "source_index", "view", "S")
    )
    return Samples({"S": lengths}, values, hashes, source, view=view)


def _where(split: str, number: int, name: str) -> str:
    return f"split {split}, row {number} (id {name})"


def _answer_column(config: DumpConfig, source: SourceData) -> str | None:
    if config.label_column not in (AUTO, NO_COLUMN):
        return config.label_column
    there = {name for rows in source.splits.values() for name in rows.column_names}
    return ANSWERS if ANSWERS in there and config.label_column == AUTO else None


def _lengths(config: DumpConfig, teacher: Teacher) -> tuple[int, int]:
    """Tokens of a window, and of the context those that it shares with the next. Raises ConfigError."""
    length = teacher.max_length(config.max_length)
    if config.max_length is None:
        length = min(length, _USUAL_LENGTH)
    stride = min(_USUAL_STRIDE, length // 3) if config.doc_stride is None else config.doc_stride
    room = length - teacher.tokenizer.num_special_tokens_to_add(pair=True) - 2  # a token of a question, one more of it
    if stride > room:
        raise ConfigError(
            f"--doc-stride {stride}: windows of {length} tokens (--max-length) share at most {room}; give less"
        )
    return length, stride
