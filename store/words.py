"""Rows of words: which tokens stand for a word. Both phases go by the first token of each."""

from __future__ import annotations

from typing import Any

from .schema import NO_WORD


def first_tokens(words: Any) -> Any:
    """bool [B, S], of numpy or torch as `words` is: is this token the first of its word?

    words: [B, S], the word that each token is of, -1 where it is of none.
    """
    first = words != NO_WORD
    first[:, 1:] &= words[:, 1:] != words[:, :-1]
    return first
