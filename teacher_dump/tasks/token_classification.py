"""Token classification: a class for each word of a row of words. Entities, parts of speech, chunks.

B rows, S tokens (pieces of words, and special tokens), C classes, N words of a batch that have a token.

A word's tag stands at its first token, and -100 at all others; `word_ids` tells which word a token is of, -1 where it
is of none. So a word has logits, those of its first token, whether or not it has a tag.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...store import ConfigError, DataError, FieldSpec, content_hash
from ...store.head import logits_of
from ...store.schema import INPUT_IDS, LABELS, LOGITS, MISSING_LABEL, NO_WORD, TOKEN_TYPES, TOKENS, WORD_IDS
from ..config import AUTO, NO_COLUMN, DumpConfig
from ..data import SourceData, check_columns
from ..logits.classes import single_summaries
from ..rows.label_names import agree, teacher_names
from ..rows.labels import SINGLE, Labels, class_names
from ..rows.texts import check_rows, chunks, flat, within
from ..teachers.teacher import Teacher
from . import Samples

TAG_COLUMNS = ("ner_tags", "pos_tags", "chunk_tags", "tags", "labels")  # of which the first one there is taken
WORDS = pa.list_(pa.string())


class Encoded(NamedTuple):
    """n rows of words in tokens. lengths: int64 [n]; ids, types, words: flat; cut: bool [n]."""

    lengths: np.ndarray
    ids: np.ndarray
    types: np.ndarray
    words: np.ndarray
    cut: np.ndarray


class TokenClassification:
    """C classes for each word."""

    model_class = "AutoModelForTokenClassification"

    def __init__(self, config: DumpConfig, teacher: Teacher, source: SourceData):
        self.teacher, self.tokenizer, self.num_labels = teacher, teacher.tokenizer, teacher.num_labels
        self.words, self.label_column = str(config.text_column), _label_column(config, source)
        _check(config, self.tokenizer)
        explicit = [self.label_column] if self.label_column and config.label_column != AUTO else []
        check_columns(source, [self.words, *explicit])
        self.columns = [self.words, *([self.label_column] if self.label_column else [])]
        feature = next((f[self.label_column] for f in source.features.values() if self.label_column in f), None)
        known = teacher_names(config.label_names, teacher.config.id2label, self.num_labels)
        self.label_names, order, self.notices = agree(class_names(feature), known, self.num_labels, config.label_order)
        self.notices += _notices(config, self.tokenizer, self.label_column, source)
        self.labels = Labels(self.label_column or LABELS, SINGLE, self.num_labels, self.label_names, order)
        self.max_length = teacher.max_length(config.max_length)
        self.types = TOKEN_TYPES in self.tokenizer.model_input_names and TOKEN_TYPES in teacher.inputs
        self.fields = self._make_fields(config)
        self.settings = {
            "text_column": self.words, "label_column": self.label_column, "label_order": config.label_order,
            "max_length": self.max_length, "fields": list(config.fields), "dtype": config.dtype,
        }  # fmt: skip

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        column = rows.column(self.words).combine_chunks()
        check_words(split, start, column, self.words)
        if self.label_column not in rows.column_names:
            return
        tags = rows.column(self.label_column).combine_chunks()
        if pa.types.is_null(tags.type):
            return
        self.labels.entries(tags, split, start)
        sizes = [np.asarray(pc.fill_null(pc.list_value_length(one), 0)) for one in (column, tags)]
        bad = np.asarray(tags.is_valid()) & (sizes[0] != sizes[1])
        row = int(bad.argmax())
        wrong = f"column {self.label_column!r} has {sizes[1][row]} tags for {sizes[0][row]} words; one each expected"
        check_rows(split, start, bad, wrong, "mend it, or make it null where the row has no tags")

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table) -> Samples:
        made = [self._tokenize(chunk) for chunk in chunks(rows.select([self.words]))]
        found = Encoded(*(np.concatenate(column) for column in zip(*made, strict=True)))
        if (found.lengths == 0).any():
            row = source_index[(found.lengths == 0).argmax()]
            raise DataError(f"split {split}, row {row}: the tokenizer makes no tokens of it; fill it or drop the row")
        words = rows.column(self.words).combine_chunks().cast(WORDS)
        row_of, first = np.repeat(np.arange(len(rows)), found.lengths), first_tokens(found.words, found.lengths)
        tags = self._tags(split, rows, words)
        place = (_starts(words)[row_of] + found.words)[first]
        labels = np.full(len(found.ids), MISSING_LABEL, np.int32)
        labels[first] = tags[place]
        values = {INPUT_IDS: found.ids, LABELS: labels, WORD_IDS: found.words, TOKENS: words}
        if self.types:
            values[TOKEN_TYPES] = found.types
        notes = {"truncated": int(found.cut.sum()), "words_without_tokens": _lost(found, first, sizes_of(words))}
        digests = np.frombuffer(b"".join(map(content_hash, words.to_pylist())), np.uint8).reshape(len(rows), 16)
        return Samples({"S": found.lengths}, values, digests, source_index, notes)

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return samples.inputs(rows, self.teacher.pad_id, self.tokenizer.pad_token_type_id)

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        """Any tagger will do."""

    def forward(self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray) -> dict[str, Any]:
        return {"logits": logits_of(model(**inputs))}

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        """Beside the logits [B, S, C] means over the row's words, NaN where there are none; and a prediction for each
        word, -100 for one that has no token."""
        logits, words = captured["logits"], samples.padded(WORD_IDS, rows, NO_WORD)
        first = (words != NO_WORD) & (words != np.pad(words, ((0, 0), (1, 0)), constant_values=NO_WORD)[:, :-1])
        row_of, labels = first.nonzero()[0], samples.padded(LABELS, rows, MISSING_LABEL)[first]
        with np.errstate(invalid="ignore", over="ignore"):  # not finite: refused when the logits are stored
            found = single_summaries(logits[first], labels)
        predictions = [np.full(size, MISSING_LABEL, np.int64) for size in sizes_of(samples.values[TOKENS])[rows]]
        for row, word, prediction in zip(row_of, words[first], found.pop("teacher_prediction"), strict=True):
            predictions[row][word] = prediction
        means = {name: _means(values, row_of, len(rows)) for name, values in found.items()}
        return {LOGITS: logits, "teacher_prediction": predictions, **means}

    def _make_fields(self, config: DumpConfig) -> list[FieldSpec]:
        inputs = [FieldSpec(INPUT_IDS, ("S",), "int32", role="input", pad=self.teacher.pad_id)]
        if self.types:
            inputs.append(FieldSpec(TOKEN_TYPES, ("S",), "int8", role="input", pad=self.tokenizer.pad_token_type_id))
        return [
            *inputs,
            FieldSpec(WORD_IDS, ("S",), "int32", role="input", pad=NO_WORD),
            FieldSpec(LABELS, ("S",), "int32", role="label", pad=MISSING_LABEL),
            FieldSpec(LOGITS, ("S", self.num_labels), "float16" if config.dtype == "int8" else config.dtype),
            FieldSpec("teacher_prediction", ("*",), "int64", role="summary"),
            *(FieldSpec(f"teacher_{one}", (), "float32", role="summary") for one in ("confidence", "entropy", "loss")),
            FieldSpec(TOKENS, (), str(WORDS), codec="arrow", role="carried"),
        ]

    def _tokenize(self, rows: pa.Table) -> Encoded:
        words = rows.column(self.words).to_pylist()
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length,
                                 return_attention_mask=False, return_token_type_ids=self.types)  # fmt: skip
        lengths, ids = flat(encoded[INPUT_IDS])
        _, types = flat(encoded[TOKEN_TYPES] if self.types else [], np.int8)
        whose = [NO_WORD if word is None else word for one in encoded.encodings for word in one.word_ids]
        cut = np.array([bool(one.overflowing) for one in encoded.encodings])
        return Encoded(lengths, ids, types, np.array(whose, np.int32), cut)

    def _tags(self, split: str, rows: pa.Table, words: pa.ListArray) -> np.ndarray:
        """int64: the class of each word of all rows, -100 where it has none."""
        sizes = sizes_of(words)
        made = np.full(sizes.sum(), MISSING_LABEL, np.int64)
        if self.label_column in rows.column_names:
            tags = rows.column(self.label_column).combine_chunks()
            if not pa.types.is_null(tags.type):
                made[np.repeat(np.asarray(tags.is_valid()), sizes)] = self.labels.entries(tags, split)
        return made


def check_words(split: str, start: int, column: pa.Array, name: str) -> None:
    """Raises DataError where a column holds no lists of words, or a row of it none. start: the first row's number."""
    inner = getattr(column.type, "value_type", None)
    if inner is None or not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise DataError(
            f"split {split}, column {name!r}: a list of words in each row expected; got {column.type}: choose another "
            "--text-column"
        )
    check_rows(split, start, column.is_null(), f"column {name!r} is null; words expected")
    sizes = np.asarray(pc.list_value_length(column))
    check_rows(split, start, sizes == 0, f"column {name!r} is empty; words expected")
    holes = np.bincount(np.repeat(np.arange(len(column)), sizes)[np.asarray(column.flatten().is_null())])
    check_rows(split, start, holes, f"column {name!r} has a word that is null; text expected")


def first_tokens(words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool [sum of lengths]: is this token the first of its word? words: the word of each token, flat."""
    before = np.concatenate([[NO_WORD], words[:-1]])
    return (words != NO_WORD) & ((within(lengths) == 0) | (words != before))


def sizes_of(words: pa.ListArray) -> np.ndarray:
    """int64 [n]: words of each row."""
    return np.diff(np.asarray(words.offsets)).astype(np.int64)


def _starts(words: pa.ListArray) -> np.ndarray:
    sizes = sizes_of(words)
    return sizes.cumsum() - sizes


def _lost(found: Encoded, first: np.ndarray, sizes: np.ndarray) -> int:
    """Words of which the tokenizer makes nothing; those that were cut away are not among them."""
    row_of = np.repeat(np.arange(len(sizes)), found.lengths)
    reached = np.zeros(len(sizes), np.int64)
    np.maximum.at(reached, row_of, found.words + 1)
    return int(np.where(found.cut, reached, sizes).sum() - first.sum())


def _means(values: np.ndarray, row_of: np.ndarray, rows: int) -> np.ndarray:
    """float64 [rows]: over the values of each row that are numbers, NaN where there are none."""
    known = ~np.isnan(values)
    count = np.bincount(row_of[known], minlength=rows)
    total = np.bincount(row_of[known], weights=values[known], minlength=rows)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _label_column(config: DumpConfig, source: SourceData) -> str | None:
    if config.label_column not in (AUTO, NO_COLUMN):
        return config.label_column
    there = _there(source)
    return next((name for name in TAG_COLUMNS if name in there and config.label_column == AUTO), None)


def _there(source: SourceData) -> set[str]:
    return {name for rows in source.splits.values() for name in rows.column_names}


def _check(config: DumpConfig, tokenizer: Any) -> None:
    if config.text_pair_column:
        raise ConfigError("--text-pair-column is nothing that token-classification knows; leave it away")
    if not tokenizer.is_fast:
        raise ConfigError(
            f"--teacher {config.teacher}: a tokenizer that tells which word a token is of expected; "
            f"{type(tokenizer).__name__} does not: save the teacher with its fast tokenizer"
        )


def _notices(config: DumpConfig, tokenizer: Any, column: str | None, source: SourceData) -> list[str]:
    """What is chosen for the user, and a tokenizer that was made for running text."""
    found = []
    others = [name for name in TAG_COLUMNS if name in _there(source) and name != column]
    if config.label_column == AUTO and column and others:
        found.append(f"tags are those of column {column}, not of {', '.join(others)}; --label-column chooses")
    apart, text = tokenizer(["one", "two"], is_split_into_words=True), tokenizer("one two")
    if apart[INPUT_IDS] != text[INPUT_IDS]:
        found.append(
            "the teacher's tokenizer makes other tokens of separate words than of text: unless the teacher was trained "
            "so, save its tokenizer with add_prefix_space=True"
        )
    return found
