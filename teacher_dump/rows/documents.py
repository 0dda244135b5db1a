"""Documents for language models: what is written in each, which of it is learned, and its tokens.

n documents; tokens of all of them one after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from ...store import ConfigError, DataError, content_hash
from .texts import check_text, flat, within

TEXT, PROMPT, COMPLETION = "text", "prompt", "completion"
_SPECIAL = 16  # tokens at most that a tokenizer puts before a text

Where = Callable[[int], str]  # names a row by its place among those at hand: "split train, row 12"


class Written(NamedTuple):
    """n documents before they are tokens.

    spans: int64 [m, 3], what is learned: document, first character, one past the last; in order. None: all is learned.
    hashes: 16 bytes a document, of what the row says before any tokenizer or template.
    """

    texts: list[str]
    spans: np.ndarray | None
    hashes: bytes

    def take(self, chosen: np.ndarray) -> Written:
        """Some documents; chosen: int64, ascending."""
        spans = self.spans
        if spans is not None:
            spans = spans[np.isin(spans[:, 0], chosen)]
            spans = np.column_stack([np.searchsorted(chosen, spans[:, 0]), spans[:, 1:]])
        hashes = b"".join(self.hashes[16 * at : 16 * at + 16] for at in chosen)
        return Written([self.texts[at] for at in chosen], spans, hashes)


class Documents(NamedTuple):
    """lengths: int64 [n]; ids: int32 [tokens]; learned: bool [tokens]; cut: bool [n], longer than allowed."""

    lengths: np.ndarray
    ids: np.ndarray
    learned: np.ndarray
    cut: np.ndarray
    hashes: bytes

    @property
    def losses(self) -> np.ndarray:
        """int64 [n]: learned tokens that some token comes before, which is what predicts them."""
        known = self.learned & (within(self.lengths) > 0)
        return np.bincount(np.repeat(np.arange(len(self.lengths)), self.lengths)[known], minlength=len(self.lengths))

    def check(self, where: Where) -> None:
        """Raises DataError naming the first document that teaches nothing."""
        bad = self.losses == 0
        if not bad.any():
            return
        at = int(bad.argmax())
        size = int(self.lengths[at])
        if self.cut[at]:
            raise DataError(
                f"{where(at)}: something to learn expected in its first {size} tokens, of which all are prompt: give a "
                "longer --max-length or drop the row"
            )
        raise DataError(
            f"{where(at)}: a token to learn that another comes before expected; none of its {size} is one: fill it or "
            "drop the row"
        )


class Format(Protocol):
    """How the rows of a dataset are written. templated: does a chat template write the special tokens?"""

    columns: list[str]
    settings: dict[str, Any]
    templated: bool
    learns_all: bool
    notices: list[str]

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        """Raises DataError for values of the wrong type, and for those that are missing."""

    def write(self, rows: pa.Table, where: Where) -> Written: ...


class PlainText:
    """One document a row, all of it learned."""

    templated, learns_all = False, True

    def __init__(self, column: str):
        self.columns, self.settings, self.notices = [column], {"format": TEXT, "text_column": column}, list[str]()

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        check_text(split, start, rows, self.columns[0], empty=False)

    def write(self, rows: pa.Table, where: Where) -> Written:
        texts = rows.column(self.columns[0]).to_pylist()
        return Written(texts, None, b"".join(content_hash((text,)) for text in texts))


class PromptText:
    """A text that is given and one that continues it; the second is learned. (TRL: standard prompt-completion.)"""

    templated = learns_all = False

    def __init__(self, tokenizer: Any):
        check_fast(tokenizer, "prompts and completions")
        self.columns, self.notices = [PROMPT, COMPLETION], list[str]()
        self.settings = {"format": "prompt-completion"}

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        check_text(split, start, rows, PROMPT)
        check_text(split, start, rows, COMPLETION, empty=False)

    def write(self, rows: pa.Table, where: Where) -> Written:
        pairs = list(zip(rows.column(PROMPT).to_pylist(), rows.column(COMPLETION).to_pylist(), strict=True))
        texts = ["".join(pair) for pair in pairs]
        spans = [(at, len(prompt), len(texts[at])) for at, (prompt, _) in enumerate(pairs)]
        return Written(texts, span_array(spans), b"".join(map(content_hash, pairs)))


def named(split: str, rows: np.ndarray) -> Where:
    """rows: int64, the number of each row at hand."""
    return lambda at: f"split {split}, row {rows[at]}"


def span_array(spans: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(spans, np.int64).reshape(-1, 3)


def check_fast(tokenizer: Any, what: str) -> None:
    """Raises ConfigError for a tokenizer that does not tell which characters a token stands for."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{what} need a fast tokenizer, to find what is learned; {type(tokenizer).__name__} is none: save the "
            "teacher with one, or give a column of text"
        )


def tokenize(tokenizer: Any, written: Written, templated: bool, max_length: int | None) -> Documents:
    """Tokens of documents, cut at max_length; None: never.

    Where no template writes them, the tokenizer's own special tokens are added, and its end token after each document
    that lacks one.
    """
    encoded = tokenizer(written.texts, add_special_tokens=not templated, return_attention_mask=False, verbose=False,
                        return_token_type_ids=False, return_offsets_mapping=written.spans is not None)  # fmt: skip
    lengths, ids = flat(encoded["input_ids"])
    learned = np.ones(len(ids), bool)
    if written.spans is not None:
        learned = _inside(written.spans, written.texts, lengths, encoded["offset_mapping"])
    if not templated and tokenizer.eos_token_id is not None:
        lengths, ids, learned = _ended(lengths, ids, learned, tokenizer.eos_token_id)
    cut = np.zeros(len(lengths), bool)
    if max_length is not None and (cut := lengths > max_length).any():
        kept = within(lengths) < max_length
        lengths, ids, learned = lengths.clip(max=max_length), ids[kept], learned[kept]
    return Documents(lengths, ids, learned, cut, written.hashes)


def joined(parts: list[Documents]) -> Documents:
    lengths, ids, learned, cut, hashes = (list(column) for column in zip(*parts, strict=True))
    return Documents(
        np.concatenate(lengths), np.concatenate(ids), np.concatenate(learned), np.concatenate(cut), b"".join(hashes)
    )


def may_lose_all(written: Written, max_length: int) -> np.ndarray:
    """int64: documents of which nothing learned might be left when they are cut. Only tokenising tells; a token is at
    least one byte, so most are known to be safe without."""
    assert written.spans is not None
    _, at = np.unique(written.spans[:, 0], return_index=True)
    first = written.spans[at]
    longest = [len(written.texts[row][:begin].encode()) + _SPECIAL for row, begin, _ in first.tolist()]
    return first[np.array(longest, np.int64) >= max_length, 0]


def _inside(
    spans: np.ndarray, texts: list[str], lengths: np.ndarray, offsets: list[list[tuple[int, int]]]
) -> np.ndarray:
    """bool [tokens]: does a token begin within a span? One that begins before and reaches into it belongs to what came
    before: the model would never be asked for it. Some tokenizers trim spaces off offsets, down to nothing (e, e)."""
    if not len(spans):
        return np.zeros(lengths.sum(), bool)
    numbers = itertools.chain.from_iterable(itertools.chain.from_iterable(offsets))
    bounds = np.fromiter(numbers, np.int64, 2 * int(lengths.sum())).reshape(-1, 2)
    begin = np.where(bounds[:, 0] < bounds[:, 1], bounds[:, 0], bounds[:, 1] - 1)  # -1: a token that no character made
    sizes = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    base = sizes.cumsum() - sizes
    place = np.repeat(base, lengths) + begin
    starts, ends = base[spans[:, 0]] + spans[:, 1], base[spans[:, 0]] + spans[:, 2]
    last = np.searchsorted(starts, place, side="right") - 1
    return (last >= 0) & (place < ends[last])


def _ended(
    lengths: np.ndarray, ids: np.ndarray, learned: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every document with the end token as its last, learned."""
    stops, there = lengths.cumsum(), lengths > 0
    there[there] = ids[stops[there] - 1] == end
    learned[stops[there] - 1] = True
    missing = stops[~there]
    return lengths + ~there, np.insert(ids, missing, end), np.insert(learned, missing, True)
