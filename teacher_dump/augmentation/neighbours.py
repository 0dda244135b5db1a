"""Words with the nearest vectors, for words that a masked language model knows only in pieces. D width, W words."""

from __future__ import annotations

import array
import gzip
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...store.errors import DataError
from .words import is_word

MOST_WORDS = 200_000  # of a file of vectors, which begins with the commonest
_REMEMBERED = 100_000  # words
_SPARE = 8  # nearest words looked at beyond those wanted, for those that are the word itself


class Neighbours:
    """The `count` words of a table whose vectors have the largest cosine with a word's own.

    words: W of them; table: float32 [W, D]; vector: a word's float32 [D], or None where it has none.
    """

    def __init__(self, words: Sequence[str], table: np.ndarray, vector: Callable[[str], np.ndarray | None], count: int):
        self._words, self._vector, self._count = words, vector, count
        self._table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        self.of = lru_cache(_REMEMBERED)(self._of)

    def _of(self, word: str) -> tuple[str, ...]:
        """Candidates of one word, in the table's order; none where the word has no vector.

        One word at a time, so that the same product is rounded the same way whatever is asked beside it.
        """
        vector = self._vector(word)
        if vector is None:
            return ()
        scores = self._table @ vector
        wanted = min(self._count + _SPARE, len(scores))
        nearest = np.sort(np.argpartition(-scores, wanted - 1)[:wanted])
        nearest = nearest[np.argsort(-scores[nearest], kind="stable")]
        others = [int(at) for at in nearest if self._words[at].casefold() != word.casefold()]
        return tuple(self._words[at] for at in sorted(others[: self._count]))


def file_neighbours(path: Path, count: int) -> Neighbours:
    """Of a file of vectors, where a word that is not in it may be there in small letters. Raises DataError."""
    words, table = read_vectors(path)
    at = {word: number for number, word in enumerate(words)}

    def vector(word: str) -> np.ndarray | None:
        number = at.get(word, at.get(word.lower()))
        return None if number is None else table[number]

    return Neighbours(words, table, vector, count)


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """(W words, float32 [W, D]) of a text file: a word and D numbers a line, perhaps after a line `W D` (word2vec).

    Of entries that are not letters only, none; of the others the first MOST_WORDS. Raises DataError naming the line.
    """
    words: dict[str, None] = {}
    values, width = array.array("f"), 0
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip().split(b" ")
            if number == 1 and len(fields) == 2:
                continue
            width = width or len(fields) - 1
            if not width or len(fields) <= width:
                raise _bad_line(path, number, width, f"{len(fields) - 1} came")
            word = b" ".join(fields[:-width]).decode("utf-8", "replace")
            if not is_word(word) or word in words:
                continue
            try:
                values.extend(map(float, fields[1:]))
            except ValueError as error:
                raise _bad_line(path, number, width, str(error)) from error
            words[word] = None
            if len(words) == MOST_WORDS:
                break
    table = np.frombuffer(values, np.float32).reshape(len(words), -1) if words else np.zeros((0, 1), np.float32)
    if not words or not np.isfinite(table).all():
        raise DataError(f"--embeddings {path}: a word and its finite numbers a line expected; there are none")
    return list(words), table


def _bad_line(path: Path, number: int, width: int, what: str) -> DataError:
    expected = f"{width} numbers" if width else "its numbers"
    return DataError(f"--embeddings {path}, line {number}: a word and {expected} expected; {what}")
