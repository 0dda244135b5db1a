"""What a masked language model would say in a word's place. B rows, S tokens, V vocabulary, W words in it.

A row is the text around one word, with that word masked. Rows run in batches of any size, and batches round otherwise:
where the last candidate taken and the first left out are within MARGIN, the row runs again by itself, unpadded, and
that decides. So candidates hang on text and word alone, as long as rounding stays below half of MARGIN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...store.errors import ConfigError
from ..capture import token_batches
from ..teachers.teacher import Teacher
from .words import is_word

MARGIN = 2e-4  # in logits; rounding of float32 logits differs by some 1e-5 between batches
_SPARE = 8  # likeliest words looked at beyond those wanted, for those that are the word itself
_MOST_ROWS = 512  # rows to a batch: its logits [B, V] are 500 MB where V is 250,000
_BEFORE = "a "  # a word in the middle of a text, for tokenizers that write a space into its first piece


@dataclass(frozen=True)
class Masked:
    """One word to be guessed: piece `at` of a text's pieces. ids: int64 [S of the text]; word: what stands there."""

    ids: np.ndarray
    at: int
    word: str


class MaskedLM:
    """A masked language model with its weights. Raises ConfigError where it is none, or its tokenizer is slow."""

    def __init__(self, teacher: Teacher, count: int, max_length: int, tokens_per_batch: int | None):
        self._teacher, self._count = teacher, count
        self._backend: Any = getattr(teacher.tokenizer, "backend_tokenizer", None)
        self._mask_id = teacher.tokenizer.mask_token_id
        if self._backend is None or self._mask_id is None:
            lacks = "a fast tokenizer" if self._backend is None else "a mask token"
            raise ConfigError(f"--masked-lm {teacher.where} has not {lacks}; give another model")
        self._backend.no_truncation()
        self._backend.no_padding()
        alone = self._backend.encode(teacher.tokenizer.mask_token).ids
        self._first, self._last = alone[: alone.index(self._mask_id)], alone[alone.index(self._mask_id) + 1 :]
        self.max_length = min(max_length, teacher.max_length(None))
        self._room = self.max_length - len(self._first) - len(self._last)
        self._tokens_per_batch = tokens_per_batch or (4096 if teacher.device.type == "cpu" else 32768)
        self.words, ids = self._whole_words()
        if self._room < 1 or len(self.words) < 2:
            raise ConfigError(f"--masked-lm {teacher.where}: a vocabulary with words expected; it has {self.words[:2]}")
        self._model: Any = teacher.load()
        self._ids = torch.tensor(ids, device=teacher.device)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings of the tokenizers library, without special tokens: `.ids`, `.offsets` in characters."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def vectors(self) -> np.ndarray:
        """float32 [W, D]: the input embeddings of `words`."""
        return self._embedding(self._ids)

    def vector(self, word: str) -> np.ndarray:
        """float32 [D]: the mean of the input embeddings of a word's pieces."""
        pieces = self._pieces(self._backend.encode(_BEFORE + word, add_special_tokens=False))
        return self._embedding(torch.tensor(pieces, device=self._ids.device)).mean(axis=0)

    def candidates(self, rows: Sequence[Masked]) -> list[tuple[str, ...]]:
        """Of each row, the `count` likeliest words but for the one that stands there, in the vocabulary's order."""
        found: list[tuple[str, ...]] = [()] * len(rows)
        lengths = np.array([min(len(row.ids), self._room) for row in rows]) + self.max_length - self._room
        clipped = np.maximum(lengths, self._tokens_per_batch // _MOST_ROWS)
        for batch in token_batches(clipped, self._tokens_per_batch) if rows else ():
            batch_rows = [rows[at] for at in batch]
            for at, row, (scores, words) in zip(batch, batch_rows, self._best(batch_rows), strict=True):
                taken = self._taken(row.word, scores, words, MARGIN)
                if taken is None:
                    taken = self._taken(row.word, *self._best([row])[0], 0)
                assert taken is not None
                found[at] = taken
        return found

    def _taken(self, word: str, scores: np.ndarray, words: np.ndarray, margin: float) -> tuple[str, ...] | None:
        """None where the last one taken is within `margin` of the first left out. scores: descending, of words."""
        own = word.casefold()
        others = [rank for rank, at in enumerate(words) if self.words[at].casefold() != own]
        if len(others) > self._count and scores[others[self._count - 1]] - scores[others[self._count]] < margin:
            return None
        return tuple(self.words[at] for at in sorted(words[others[: self._count]]))

    def _best(self, rows: Sequence[Masked]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row, logits of its likeliest words, descending, and their numbers in `words`."""
        windows = [self._window(row) for row in rows]
        width = max(len(ids) for ids, _ in windows)
        inputs = np.full((2, len(rows), width), 0, np.int64)
        inputs[0] = self._teacher.pad_id
        for at, (ids, _) in enumerate(windows):
            inputs[:, at, : len(ids)] = ids, np.ones(len(ids))
        ids, mask = torch.from_numpy(inputs).to(self._ids.device)
        places = torch.tensor([place for _, place in windows], device=self._ids.device)
        scores = self._logits(ids, mask, places)[:, self._ids]
        best = scores.topk(min(self._count + _SPARE, len(self.words)))
        return list(zip(best.values.cpu().numpy(), best.indices.cpu().numpy(), strict=True))

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """float32 [B, V] at each row's place. The head sees one position a row, so that no [B, S, V] is made."""
        rows = torch.arange(len(ids), device=ids.device)

        def at_places(module: Any, args: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][rows, places][:, None]
            return output

        base = self._model.base_model
        hook = base.register_forward_hook(at_places) if base is not self._model else None
        try:
            with torch.inference_mode():
                logits = self._model(input_ids=ids, attention_mask=mask).logits.float()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ConfigError(
                f"{ids.device} is out of memory at a batch of {len(ids)} rows of {ids.shape[1]} tokens: run the same "
                f"command with --tokens-per-batch {max(ids.numel() // 2, 1)}"
            ) from error
        finally:
            if hook is not None:
                hook.remove()
        return logits[:, 0] if logits.shape[1] == 1 else logits[rows, places]

    def _window(self, row: Masked) -> tuple[np.ndarray, int]:
        """(ids [at most max_length] with the mask among them, its place): as much before the word as after it."""
        start = max(0, min(row.at - self._room // 2, len(row.ids) - self._room))
        ids = np.concatenate([self._first, row.ids[start : start + self._room], self._last]).astype(np.int64)
        place = len(self._first) + row.at - start
        ids[place] = self._mask_id
        return ids, place

    def _whole_words(self) -> tuple[list[str], list[int]]:
        """Entries of the vocabulary that are a word by themselves, and their ids: what encodes to that one piece."""
        known = min(len(self._teacher.tokenizer), self._teacher.vocabulary)
        named = [(self._backend.decode([at]).strip(), at) for at in range(known)]
        named = [(word, at) for word, at in named if is_word(word)]
        encoded = self.encode([_BEFORE + word for word, _ in named])
        whole = [pair for pair, made in zip(named, encoded, strict=True) if self._pieces(made) == [pair[1]]]
        return [word for word, _ in whole], [at for _, at in whole]

    def _pieces(self, encoding: Any) -> list[int]:
        """Ids of what follows _BEFORE."""
        ends = [end for _, end in encoding.offsets]
        return [at for at, end in zip(encoding.ids, ends, strict=True) if end > len(_BEFORE)]

    def _embedding(self, ids: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return self._model.get_input_embeddings()(ids).float().cpu().numpy()
