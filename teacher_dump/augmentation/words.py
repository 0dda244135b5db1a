"""Words of a text, by place; and the text again with other words there. Pure functions of strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...store.errors import DataError

Span = tuple[int, int]  # characters, the second excluded
Picks = Sequence[str | None]  # one a word: what stands in its place, or None where it stays

LETTERS = "A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ"  # Latin, Greek, Cyrillic: scripts of words between spaces, vowels being letters
_JOINED = r"\w'’@#&/\\\u0300-\u036f"  # what makes n't, @name, #tag and a/b no words of their own
_WORD = re.compile(rf"(?<![{_JOINED}])(?<!\w[.:])[{LETTERS}]+(?![{_JOINED}])(?![.:][\w/])")
_LETTERS_ONLY = re.compile(rf"[{LETTERS}]+")


@dataclass(frozen=True)
class Passage:
    """A text, and the words in it that may be replaced.

    words: spans in order, none overlapping. tokens: where the text is a list of words, those words, and `numbers`,
    which of them each span is. offsets: places in the text that must be known afterwards, none inside a span.
    """

    text: str
    words: Sequence[Span]
    offsets: Sequence[int] = ()
    tokens: Sequence[str] | None = None
    numbers: Sequence[int] = ()

    def rewritten(self, picks: Picks) -> str | list[str]:
        """The text with other words in it; a list of words where it was one."""
        if self.tokens is None:
            return spliced(self.text, self.words, picks)
        made = list(self.tokens)
        for number, pick in zip(self.numbers, picks, strict=True):
            made[number] = made[number] if pick is None else pick
        return made

    def moved(self, picks: Picks) -> list[int]:
        """Where `offsets` are in the rewritten text."""
        shifts = [0 if pick is None else len(pick) - (end - start)
                  for (start, end), pick in zip(self.words, picks, strict=True)]  # fmt: skip
        return [
            offset + sum(shift for (_, end), shift in zip(self.words, shifts, strict=True) if end <= offset)
            for offset in self.offsets
        ]


def is_word(text: str) -> bool:
    """Letters and nothing else."""
    return _LETTERS_ONLY.fullmatch(text) is not None


def text_passage(text: str, kept: Sequence[Span] = ()) -> Passage:
    """A text's words, but for those that touch a kept span; the starts of kept spans are the offsets."""
    words = [found.span() for found in _WORD.finditer(text)]
    if kept:
        words = [(a, b) for a, b in words if not any(a < end and start < b for start, end in kept)]
    return Passage(text, words, [start for start, _ in kept])


def tokens_passage(tokens: Sequence[str]) -> Passage:
    """A list of words as a text with spaces between; those that are letters and nothing else may be replaced."""
    numbers, words, start = [], [], 0
    for number, token in enumerate(tokens):
        if is_word(token):
            numbers.append(number)
            words.append((start, start + len(token)))
        start += len(token) + 1
    return Passage(" ".join(tokens), words, (), tokens, numbers)


def answer_span(name: str, context: str, text: object, start: object) -> Span:
    """Where an answer is. Raises DataError, with the question's name, where its text is not at its start."""
    if not isinstance(text, str) or not text or type(start) is not int:
        raise DataError(f"question {name}: an answer's text and answer_start expected; got {text!r} and {start!r}")
    if start < 0 or context[start : start + len(text)] != text:
        there = context[max(start, 0) : max(start, 0) + len(text)]
        raise DataError(
            f"question {name}: its answer {text!r} is not at answer_start {start} of its context, where {there!r} is: "
            "mend it or drop the question"
        )
    return start, start + len(text)


def spliced(text: str, words: Sequence[Span], picks: Picks) -> str:
    parts, last = [], 0
    for (start, end), pick in zip(words, picks, strict=True):
        if pick is not None:
            parts += [text[last:start], pick]
            last = end
    return "".join([*parts, text[last:]])


def in_case_of(word: str, other: str) -> str:
    """`other` in capitals as `word` is: Film -> Movie, FILM -> MOVIE. What has capitals of its own keeps them."""
    if other != other.lower() or word == word.lower():
        return other
    if len(word) > 1 and word == word.upper():
        return other.upper()
    return other[:1].upper() + other[1:] if word[0] != word[0].lower() else other
