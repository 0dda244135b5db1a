"""SQuAD: articles into questions, answers looked at, long contexts into windows that overlap.

n questions, w windows of them, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from ...store.errors import DataError
from ...store.schema import MISSING_LABEL, OUTSIDE
from .texts import flat

ID, QUESTION, CONTEXT, ANSWERS = "id", "question", "context", "answers"
TEXT, START = "text", "answer_start"
ANSWERS_TYPE = pa.struct([(TEXT, pa.list_(pa.string())), (START, pa.list_(pa.int64()))])
_FEATURES = {
    ID: datasets.Value("string"), "title": datasets.Value("string"), QUESTION: datasets.Value("string"),
    CONTEXT: datasets.Value("string"),
    ANSWERS: {TEXT: datasets.List(datasets.Value("string")), START: datasets.List(datasets.Value("int64"))},
}  # fmt: skip

Answers = list[tuple[str, int]]  # text, first character; empty: the question has none


# ---- articles into questions ----


def are_articles(rows: datasets.Dataset) -> bool:
    """Are these SQuAD's own JSON, articles of paragraphs, rather than questions?"""
    inside = {"data": "paragraphs", "paragraphs": "qas"}
    return any(_holds(rows.features.get(name), inner) for name, inner in inside.items())


def _holds(feature: Any, name: str) -> bool:
    """A list of objects that have `name`; where the objects are not alike, `datasets` says no more than JSON."""
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Json) or (isinstance(inner, dict) and name in inner)


def questions(rows: datasets.Dataset) -> datasets.Dataset:
    """One row a question, in order: id, title, question, context, answers as the Hub's `squad` has them, null where the
    question is not labelled. Raises DataError naming the article."""
    made = rows.map(
        _batch, batched=True, batch_size=1, remove_columns=rows.column_names, features=datasets.Features(_FEATURES)
    )
    if not len(made):
        raise DataError("a question in a paragraph of an article expected; there is none")
    return made


def _batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for at in range(len(next(iter(batch.values())))):
        row = {name: values[at] for name, values in batch.items()}
        for number, article in enumerate(row.get("data") or [row]):
            for found in _of_article(article, f"article {number} ({_short(article, 'title')})"):
                for name, values in made.items():
                    values.append(found[name])
    return made


def _of_article(article: Any, where: str) -> Iterator[dict[str, Any]]:
    for number, paragraph in enumerate(_get(article, "paragraphs", where)):
        place = f"{where}, paragraph {number}"
        context = _get(paragraph, CONTEXT, place)
        for qa in _get(paragraph, "qas", place):
            name = str(_get(qa, ID, f"{place}, a question"))
            asked = _get(qa, QUESTION, f"{place}, id {name}")
            told = {"title": article.get("title"), CONTEXT: context, ANSWERS: _answers_of(qa, name)}
            yield {ID: name, QUESTION: asked, **told}


def _get(found: Any, name: str, where: str) -> Any:
    if not isinstance(found, dict) or found.get(name) is None:
        raise DataError(f"{where}: {name!r} expected, as SQuAD has it; it is not there: mend the file")
    return found[name]


def _short(article: Any, name: str) -> str:
    return str(article.get(name) if isinstance(article, dict) else article)[:40]


def _answers_of(qa: Mapping[str, Any], name: str) -> dict[str, list[Any]] | None:
    if qa.get("is_impossible"):
        return {TEXT: [], START: []}
    found = answers_of(qa.get(ANSWERS), f"id {name}")
    return None if found is None else {TEXT: [text for text, _ in found], START: [start for _, start in found]}


# ---- answers ----


def answers_of(value: Any, where: str) -> Answers | None:
    """The answers of a question: lists by name, as the Hub has them, or a list of objects, as SQuAD's JSON; None where
    it is null, which is not labelled. Raises DataError."""
    if value is None:
        return None
    if isinstance(value, dict):
        texts, starts = value.get(TEXT), value.get(START)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{where}: answers with as many texts as starts expected; got {str(value)[:100]}")
        found = list(zip(texts, starts, strict=True))
    else:
        found = [(one.get(TEXT), one.get(START)) if isinstance(one, dict) else (one, None) for one in value]
    for text, start in found:
        if not isinstance(text, str) or type(start) is not int:
            raise DataError(f"{where}: an answer of a text and its first character expected; got {text!r}, {start!r}")
    return found


def check_answers(answers: Answers, context: str, where: str) -> None:
    """Raises DataError where an answer is not in the context where it says."""
    for text, start in answers:
        there = context[start : start + len(text)] if start >= 0 else ""
        if not text or there != text:
            hint = context.find(text) if text else -1
            found = f"it stands at {hint}" if hint >= 0 else f"{there!r} stands there"
            raise DataError(
                f"{where}: answer {text!r} expected at character {start} of the context; {found}: mend the answer or "
                "drop the row"
            )


# ---- windows ----


class Windows(NamedTuple):
    """lengths: int64 [w]; ids: int32 [tokens]; types: int8 [tokens], none where the teacher takes none.

    row: int64 [w], which question each is of; view: int32 [w], which of its windows, 0 being the first.
    offsets: int32 [tokens, 2], characters of the context, one past the last; OUTSIDE at all other tokens.
    """

    row: np.ndarray
    view: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray

    @property
    def spans(self) -> list[np.ndarray]:
        """The offsets of each window, int32 [S, 2]."""
        return np.split(self.offsets, self.lengths.cumsum()[:-1])


def windows(
    tokenizer: Any, asked: Sequence[str], contexts: Sequence[str], max_length: int, doc_stride: int, types: bool
) -> Windows:
    """Each question with each stretch of its context that fits; neighbours share `doc_stride` tokens of the context."""
    encoded = tokenizer(
        list(asked), list(contexts), truncation="only_second", max_length=max_length, stride=doc_stride,
        return_overflowing_tokens=True, return_attention_mask=False, return_token_type_ids=types,
    )  # fmt: skip
    row = np.asarray(encoded["overflow_to_sample_mapping"], np.int64)
    first = np.concatenate([[True], row[1:] != row[:-1]])
    view = np.arange(len(row)) - np.maximum.accumulate(np.where(first, np.arange(len(row)), 0))
    lengths, ids = flat(encoded["input_ids"])
    made = [_offsets(one) for one in encoded.encodings]
    _, kinds = flat(encoded["token_type_ids"] if types else [], np.int8)
    return Windows(row, view.astype(np.int32), lengths, ids, kinds, np.concatenate(made))


def _offsets(encoding: Any) -> np.ndarray:
    spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    inside = np.fromiter((one == 1 for one in encoding.sequence_ids), bool, len(spans))
    return np.where(inside[:, None], spans, OUTSIDE)


def answer_tokens(span: np.ndarray, answers: Answers | None) -> tuple[int, int]:
    """First and last token of the answer in a window; 0, 0 where it is not in it, or there is none; -100, -100 where
    the question is not labelled. Of several answers the first counts, as is usual.

    span: int32 [S, 2], offsets of the window. An answer that begins or ends within a token takes all of it.
    """
    if answers is None:
        return MISSING_LABEL, MISSING_LABEL
    context = np.flatnonzero(span[:, 0] != OUTSIDE)
    if not answers or not len(context):
        return 0, 0
    text, start = answers[0]
    begins, ends = span[context].T
    if begins[0] > start or ends[-1] < start + len(text):
        return 0, 0
    first = begins[np.searchsorted(begins, start, side="right") - 1]  # of tokens of one character, the first
    return int(context[np.searchsorted(begins, first)]), int(context[np.searchsorted(ends, start + len(text))])
