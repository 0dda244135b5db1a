"""For each word of a text, the words that may stand in its place: from the masked language model, or the nearest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .masked_lm import Masked, MaskedLM
from .neighbours import Neighbours
from .rewrite import Choices
from .words import Passage, Span

_REMEMBERED = 100_000  # words; some 20 MB of candidates


class Candidates:
    """Candidates of (text, word), each found once while it is remembered.

    A word that is one piece of the model's tokenizer is masked, others are looked up (arXiv:1909.10351, Algorithm 1).
    """

    def __init__(self, model: MaskedLM, neighbours: Neighbours):
        self._model, self._neighbours = model, neighbours
        self._known: OrderedDict[str, dict[Span, Sequence[str]]] = OrderedDict()
        self._size = 0

    def of(self, passages: Sequence[Passage]) -> list[Choices]:
        """One list a passage, one entry a word."""
        texts = {passage.text: dict(self._known.get(passage.text, {})) for passage in passages}
        missing: dict[str, list[Span]] = {}
        for passage in passages:
            new = [word for word in passage.words if word not in texts[passage.text]]
            if new:
                missing[passage.text] = sorted({*missing.get(passage.text, ()), *new})
        self._find(missing, texts)
        self._remember(texts)
        return [[texts[passage.text][word] for word in passage.words] for passage in passages]

    def _find(self, missing: dict[str, list[Span]], texts: dict[str, dict[Span, Sequence[str]]]) -> None:
        masked: list[Masked] = []
        places: list[tuple[str, Span]] = []
        for (text, words), encoding in zip(missing.items(), self._model.encode(list(missing)), strict=True):
            pieces, ids = single_pieces(text, encoding), np.array(encoding.ids)
            for start, end in words:
                at = pieces.get((start, end))
                if at is None:
                    texts[text][start, end] = self._neighbours.of(text[start:end])
                else:
                    masked.append(Masked(ids, at, text[start:end]))
                    places.append((text, (start, end)))
        for (text, word), found in zip(places, self._model.candidates(masked), strict=True):
            texts[text][word] = found

    def _remember(self, texts: dict[str, dict[Span, Sequence[str]]]) -> None:
        for text, words in texts.items():
            self._size += len(words) - len(self._known.pop(text, ()))
            self._known[text] = words
        while self._size > _REMEMBERED:
            self._size -= len(self._known.popitem(last=False)[1])


def single_pieces(text: str, encoding: Any) -> dict[Span, int]:
    """Spans that are one piece, and which; a span of several pieces (the bytes of one letter) is left out."""
    found: dict[Span, int] = {}
    several = set()
    for at, (start, end) in enumerate(encoding.offsets):
        while start < end and text[start].isspace():
            start += 1
        if (start, end) in found:
            several.add((start, end))
        found[start, end] = at
    return {span: at for span, at in found.items() if span not in several}
