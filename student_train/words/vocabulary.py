"""Words and letters as numbers, for students that read words: a vocabulary, its file, and vectors for its words."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...store.errors import ConfigError, DataError
from ...store.schema import ATTENTION_MASK, INPUT_IDS

CHAR_IDS = "char_ids"
VOCABULARY = "word_tokenizer.json"
PAD, UNKNOWN, SPECIAL = 0, 1, 2  # ids of words, and of letters, begin after these
MOST_WORDS = 50_000


class Encoded(NamedTuple):
    """n rows in tokens. lengths: int64 [n]; inputs: what a model is given, flat [sum of lengths, ...]; words: int
    [sum of lengths], the word of each token, -1 for none."""

    lengths: np.ndarray
    inputs: dict[str, np.ndarray]
    words: np.ndarray


class WordTokenizer:
    """One token a word: its id, lower-cased, and those of its letters as they are.

    words, characters: known ones, in the order of their ids. max_characters: of a longer word the first ones are read.
    """

    model_input_names = (INPUT_IDS, ATTENTION_MASK, CHAR_IDS)
    pad_token_id = PAD

    def __init__(self, words: Sequence[str], characters: Sequence[str], max_characters: int = 20) -> None:
        self.words, self.characters, self.max_characters = list(words), list(characters), max_characters
        self.word_ids = {word: at for at, word in enumerate(self.words, SPECIAL)}
        self._characters = {one: at for at, one in enumerate(self.characters, SPECIAL)}
        self._dtype = np.min_scalar_type(len(self.characters) + SPECIAL)
        self._spelled: dict[str, np.ndarray] = {}

    @classmethod
    def learned(cls, rows: Iterable[Sequence[str]], max_characters: int = 20) -> WordTokenizer:
        """The words of these rows, the most frequent first, MOST_WORDS at most, and their letters."""
        counts = Counter(word for row in rows for word in row)
        words: Counter[str] = Counter()
        letters: Counter[str] = Counter()
        for word, count in counts.items():
            words[word.lower()] += count
            for letter in word:
                letters[letter] += count
        return cls(_by_count(words)[:MOST_WORDS], _by_count(letters), max_characters)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WordTokenizer:
        """Raises ConfigError where the folder holds none."""
        path = Path(folder) / VOCABULARY
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(found["words"], found["characters"], found["max_characters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: the words and characters of a tagger expected; {error}") from None

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        content = {"words": self.words, "characters": self.characters, "max_characters": self.max_characters}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / VOCABULARY).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.words) + SPECIAL

    @property
    def num_characters(self) -> int:
        return len(self.characters) + SPECIAL

    def encode(self, rows: Sequence[Sequence[str]]) -> Encoded:
        """char_ids: [sum of lengths, max_characters]."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = [word for row in rows for word in row]
        ids = np.fromiter((self.word_ids.get(word.lower(), UNKNOWN) for word in flat), np.int32, len(flat))
        letters = np.zeros((len(flat), self.max_characters), self._dtype)
        for at, word in enumerate(flat):
            letters[at] = self._spell(word)
        words = np.concatenate([np.arange(size) for size in lengths]) if len(rows) else np.zeros(0, np.int64)
        return Encoded(lengths, {INPUT_IDS: ids, CHAR_IDS: letters}, words)

    def __call__(self, rows: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        """Rows of words, padded: input_ids and attention_mask int64 [B, W], char_ids int64 [B, W, max_characters]."""
        lengths, inputs, _ = self.encode(rows)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        made = {ATTENTION_MASK: torch.from_numpy(mask.astype(np.int64))}
        for name, values in inputs.items():
            padded = np.zeros((*mask.shape, *values.shape[1:]), np.int64)
            padded[mask] = values
            made[name] = torch.from_numpy(padded)
        return made

    def _spell(self, word: str) -> np.ndarray:
        """[max_characters]; a word without letters has one that is unknown."""
        found = self._spelled.get(word)
        if found is None:
            ids = [self._characters.get(one, UNKNOWN) for one in word[: self.max_characters]] or [UNKNOWN]
            found = np.zeros(self.max_characters, self._dtype)
            found[: len(ids)] = ids
            if len(self._spelled) < MOST_WORDS:
                self._spelled[word] = found
        return found


def read_vectors(path: str | Path, ids: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [n], vectors float32 [n, D]) of those words that a text file has vectors for, in word2vec's format (a
    first line with their number and size) or GloVe's (none); .gz too. A vector of the word as it is goes before one of
    its capitals. Raises ConfigError, DataError."""
    found: dict[int, tuple[bool, np.ndarray]] = {}
    size = 0
    for number, line in _lines(path):
        parts = line.rstrip(" \r\n").split(" ")
        if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
            size = int(parts[1])
            continue
        size = size or len(parts) - 1
        word, numbers = " ".join(parts[:-size]), parts[-size:]
        try:
            vector = np.array(numbers, np.float32)
        except ValueError:
            vector = np.zeros(0, np.float32)
        if len(vector) != size or size < 1 or not np.isfinite(vector).all():
            raise DataError(f"--student-vectors {path}, line {number}: a word and {size} numbers expected")
        at, plain = ids.get(word.lower()), word == word.lower()
        if at is not None and (at not in found or (plain and not found[at][0])):
            found[at] = (plain, vector)
    if not found:
        raise DataError(f"--student-vectors {path}: vectors of words of the train split expected; there is not one")
    return np.array(list(found), np.int64), np.stack([vector for _, vector in found.values()])


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    opened: Any = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(Path(path).expanduser(), "rt", encoding="utf-8", newline="\n") as file:
            yield from enumerate(file, 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--student-vectors {path}: a text file of word vectors expected; {error}") from None


def _by_count(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda one: (-counts[one], one))
