"""TinyBERT's Algorithm 1 (arXiv:1909.10351), after its candidates are known: which words are replaced, and by which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...store.identity import content_hash
from .words import Passage, in_case_of

Choices = Sequence[Sequence[str]]  # of each word of a passage, its candidates


@dataclass(frozen=True)
class View:
    """A row rewritten. view: from 1, the how manyth attempt. values: a text or a list of words for each passage;
    offsets: where what was at each passage's offsets is now."""

    row: int
    view: int
    values: list[Any]
    offsets: list[list[int]]


def views(
    row: int, passages: Sequence[Passage], choices: Sequence[Choices], factor: int, probability: float, seed: int
) -> Iterator[View]:
    """At most `factor` views of a row, each unlike the row and all before it, as in the authors' code.

    What is drawn hangs on seed, row and view alone: neither on other rows nor on `factor`.
    """
    draws = np.random.Generator(np.random.PCG64([seed, row]))
    sizes = [len(passage.words) for passage in passages]
    seen = {_content([list(one.tokens) if one.tokens is not None else one.text for one in passages])}
    if not any(any(map(len, words)) for words in choices):
        return
    for view in range(1, factor + 1):
        chances, which = draws.random((2, sum(sizes)))
        picks, begin = [], 0
        for passage, words, size in zip(passages, choices, sizes, strict=True):
            end = begin + size
            picks.append(_picked(passage, words, chances[begin:end] < probability, which[begin:end]))
            begin = end
        values = [passage.rewritten(pick) for passage, pick in zip(passages, picks, strict=True)]
        if (content := _content(values)) not in seen:
            seen.add(content)
            yield View(row, view, values, [one.moved(pick) for one, pick in zip(passages, picks, strict=True)])


def _picked(passage: Passage, choices: Choices, replaced: np.ndarray, which: np.ndarray) -> list[str | None]:
    """One a word. replaced: bool [words]; which: float64 [words] in [0, 1), a place among the word's candidates."""
    picks: list[str | None] = [None] * len(choices)
    for at in np.flatnonzero(replaced).tolist():
        if candidates := choices[at]:
            start, end = passage.words[at]
            picks[at] = in_case_of(passage.text[start:end], candidates[int(which[at] * len(candidates))])
    return picks


def _content(values: Sequence[str | list[str]]) -> bytes:
    return content_hash(part for value in values for part in ([value] if isinstance(value, str) else [*value, None]))
