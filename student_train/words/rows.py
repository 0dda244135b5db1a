"""Rows of a store in the tokens of a student whose tokenizer is not the store's, word by word.

What the store has of a word, at its first token there, comes to stand at the word's first token here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...store.errors import ConfigError, StoreMismatch
from ...store.reader import TeacherRows
from ...store.schema import ATTENTION_MASK, INPUT_IDS, LABELS, LOGITS, MISSING_LABEL, NO_WORD, TOKENS, WORD_IDS
from ...store.words import first_tokens
from ..tokens import INPUTS, RetokenizedRows, tokenizer_difference
from .vocabulary import Encoded, WordTokenizer

CHUNK = 10_000  # rows whose words are Python strings at one time


class WordRows(RetokenizedRows):
    """source: int32, of each token: where in the stored row its word begins; -1 where it begins none, or one that the
    teacher has nothing of."""

    def __init__(self, rows: TeacherRows, encoded: Encoded, source: np.ndarray, pad_token_id: int) -> None:
        self.rows, self.store, self.pad_token_id = rows, rows.store, pad_token_id
        self.lengths, self.tokens, self.source = encoded.lengths, encoded.inputs, source
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.nbytes = rows.nbytes + sum(values.nbytes for values in (source, *self.tokens.values()))

    def _replaced(self, batch: Mapping[str, Any], chosen: np.ndarray) -> dict[str, Any]:
        lengths = self.lengths[chosen]
        places = np.arange(int(lengths.max(initial=0)))
        mask = places < lengths[:, None]
        entries = np.where(mask, self.starts[chosen, None] + places, 0)
        source = np.where(mask, self.source[entries], -1)
        spoken_of, at = source >= 0, (np.arange(len(chosen))[:, None], source.clip(0))
        made: dict[str, Any] = {ATTENTION_MASK: mask.astype(np.int64)}
        for name, values in batch.items():
            if name not in (*INPUTS, *self.tokens):
                made[name] = values[at] if name in _OF_WORDS else values
        for name, missing in _OF_WORDS.items():
            if name in made:
                made[name][~spoken_of] = missing
        for name, values in self.tokens.items():
            kept = values[entries].astype(np.int64)
            kept[~mask] = self._pad(name)
            made[name] = kept
        return made


_OF_WORDS = {WORD_IDS: NO_WORD, LABELS: MISSING_LABEL, LOGITS: 0}  # and what a token has that begins no word


def word_rows(rows: TeacherRows, tokenizer: Any) -> WordRows:
    """Raises StoreMismatch where the student's tokenizer does not tell words, ConfigError where the loss compares what
    is inside the models token by token."""
    for spec in rows.specs:
        if spec.role == "teacher" and "S" in spec.shape and spec.name != LOGITS:
            raise ConfigError(
                f"{spec.name} is compared token by token, and this student has other tokens than the teacher: give a "
                "student with the store's tokenizer, or a loss of logits alone"
            )
    if not isinstance(tokenizer, WordTokenizer) and not tokenizer.is_fast:
        raise StoreMismatch(
            f"{tokenizer_difference(rows.store, tokenizer)}; and it does not tell which word a token is of: give a "
            "student with a fast tokenizer"
        )
    made, sources = [], []
    stored = rows.with_fields([TOKENS, WORD_IDS])
    for start in range(0, len(rows), CHUNK):
        part = stored[start : start + CHUNK]
        encoded = _encode(tokenizer, part[TOKENS], rows.store.settings.get("max_length"))
        made.append(encoded)
        sources.append(_source(encoded, part[WORD_IDS], np.fromiter(map(len, part[TOKENS]), np.int64)))
    inputs = {name: np.concatenate([one.inputs[name] for one in made]) for name in made[0].inputs}
    lengths, words = (np.concatenate(column) for column in ([o.lengths for o in made], [o.words for o in made]))
    whole = Encoded(lengths, inputs, words)
    return WordRows(rows, whole, np.concatenate(sources), getattr(tokenizer, "pad_token_id", None) or 0)


def _encode(tokenizer: Any, rows: list[list[str]], max_length: int | None) -> Encoded:
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.encode(rows)
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    found = tokenizer(
        rows, is_split_into_words=True, truncation=limit < 10**6, max_length=limit if limit < 10**6 else None
    )
    lengths = np.fromiter(map(len, found[INPUT_IDS]), np.int64, len(rows))
    inputs = {
        name: np.fromiter((one for row in values for one in row), np.int32, int(lengths.sum()))
        for name, values in found.items() if name != ATTENTION_MASK
    }  # fmt: skip
    words = [NO_WORD if word is None else word for one in found.encodings for word in one.word_ids]
    return Encoded(lengths, inputs, np.array(words, np.int64))


def _source(encoded: Encoded, stored: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """stored: [n, S], the word of each stored token. sizes: int64 [n], words of each row."""
    begins = sizes.cumsum() - sizes  # of each row among all words
    row, place = first_tokens(stored).nonzero()
    place_of = np.full(sizes.sum(), -1, np.int32)
    place_of[begins[row] + stored[row, place]] = place
    row_of = np.repeat(np.arange(len(sizes)), encoded.lengths)
    before = np.concatenate([[NO_WORD], encoded.words[:-1]])
    first_of_row = np.concatenate([[True], row_of[1:] != row_of[:-1]])
    first = (encoded.words != NO_WORD) & (first_of_row | (encoded.words != before))
    return np.where(first, place_of[(begins[row_of] + encoded.words).clip(0)], -1).astype(np.int32)
