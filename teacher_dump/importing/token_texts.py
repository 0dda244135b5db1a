"""Which token a text is: servers that tell tokens by their texts, or bytes, do not tell their ids."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...store.errors import ConfigError
from .numbers import Unfit

_SEVERAL = -1  # a text that more than one token has, as bytes of which none is a character by itself


class TokenTexts:
    """Ids by what their tokens say."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def id_of(self, text: str, raw: Any = None) -> int | None:
        """By its bytes where they are told and tokens are bytes; by its text; by the vocabulary's own spelling. None
        where there is none, or several."""
        if raw is not None and self._byte_level and isinstance(raw, list) and all(one in range(256) for one in raw):
            spelled = "".join(_alphabet()[one] for one in raw)
            if (found := self._vocabulary.get(spelled)) is not None:
                return found
        found = self._texts.get(text)
        if found is None:
            found = self._vocabulary.get(text)
        return None if found is None or found == _SEVERAL else found

    def is_ambiguous(self, text: Any) -> bool:
        return self._texts.get(text) == _SEVERAL

    def text(self, text: str) -> np.ndarray:
        """int64: tokens of a prompt."""
        return np.array(self.tokenizer(text, verbose=False)["input_ids"], np.int64)

    def conversation(self, messages: Any) -> np.ndarray:
        """int64: tokens of messages and of what an answer begins with. Raises ConfigError, Unfit."""
        if not self.tokenizer.chat_template:
            raise ConfigError("--tokenizer: one with a chat template expected, to write messages; it has none")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise Unfit(f"messages: the tokenizer's chat template refuses them ({reason})") from error
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    @functools.cached_property
    def _texts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        ids = sorted(self._vocabulary.values())
        for token, text in zip(ids, self.tokenizer.batch_decode([[one] for one in ids]), strict=True):
            found[text] = _SEVERAL if text in found else token
        return found

    @functools.cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", None))


@functools.cache
def _alphabet() -> list[str]:
    """The character that GPT-2's byte-level vocabularies write each byte as: printable ones as themselves, the others
    as those from 256 on, in order (openai/gpt-2, encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(one) if one in printable else chr(next(others)) for one in range(256)]
