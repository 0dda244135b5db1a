"""Columns of lists: for each token the kept ids, and their values.

    columns                                            of whom
    input_ids, token_ids, top_values, attention_mask   arcee-ai/LLama-405B-Logits, the raw form that DistillKit reads
                                                       (its compression/compressor.py, decompress_to_sparse): logits,
                                                       those at token s of the token after it
    input_ids, labels, target_token_ids,               what Axolotl's KD strategies write (integrations/kd/
      target_logprobs, target_mask                     chat_template.py): entries stand at the token that they speak of,
                                                       padded on the left; log-probabilities made to sum to 1
    named on the command line                          anybody's

S tokens, K entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...store.schema import ATTENTION_MASK
from .numbers import Nested, Unfit, nested_numbers, whole_numbers
from .rows import Rules, Said, aligned, check_labels, check_tokens, entries

TARGET_MASK = "target_mask"
PROMPT_IDS = "prompt_token_ids"


class TopKColumns(NamedTuple):
    """Reads rows of these columns; mask: one of 0 and 1 an entry, or a token, beside them."""

    tokens: str
    ids: str
    values: str
    labels: str
    alignment: str
    rules: Rules
    mask: str | None = None

    @property
    def columns(self) -> list[str]:
        named = [self.tokens, self.ids, self.values, self.labels, ATTENTION_MASK]
        return [*named, self.mask] if self.mask else named

    def read(self, row: dict[str, Any]) -> Said:
        """Raises Unfit."""
        for name in (self.tokens, self.ids, self.values):
            if row.get(name) is None:
                raise Unfit(f"column {name!r} expected; it is null")
        tokens = whole_numbers(row[self.tokens], self.tokens)
        check_tokens(tokens, self.rules.vocabulary)
        counts, ids, values = entries(*(nested_numbers(row[name], name) for name in (self.ids, self.values)))
        if self.mask and row.get(self.mask) is not None:
            values = np.where(_mask(row[self.mask], counts, self.mask), values, -np.inf)
        counts, dropped = aligned(counts, len(tokens), self.alignment)
        used = slice(dropped, dropped + int(counts.sum()))
        said = Said(tokens, labels_of(row, self.labels, tokens), counts, ids[used], values[used])
        return without_padding(said, row.get(ATTENTION_MASK))


def labels_of(row: dict[str, Any], name: str, tokens: np.ndarray) -> np.ndarray:
    """The row's labels; all its tokens, where it has no such column."""
    if row.get(name) is None:
        return tokens
    return check_labels(whole_numbers(row[name], name), tokens)


def without_padding(said: Said, mask: Any) -> Said:
    """Without the tokens at either end that an attention mask has 0 for. Raises Unfit where it has a hole."""
    if mask is None:
        return said
    real = whole_numbers(mask, ATTENTION_MASK) != 0
    if len(real) != len(said.tokens):
        raise Unfit(f"{ATTENTION_MASK} of {len(said.tokens)} tokens expected; got {len(real)}")
    if real.all():
        return said
    places = np.flatnonzero(real)
    if len(places) < 2 or places[-1] - places[0] + 1 != len(places):
        raise Unfit(f"{ATTENTION_MASK}: padding at the ends, and two tokens between, expected")
    first, last = int(places[0]), int(places[-1]) + 1
    before = int(said.counts[:first].sum())
    own = slice(before, before + int(said.counts[first:last].sum()))
    chosen = None if said.chosen is None else said.chosen[first:last]
    return Said(
        said.tokens[first:last], said.labels[first:last], said.counts[first:last], said.ids[own], said.values[own],
        chosen,
    )  # fmt: skip


def _mask(value: Any, counts: np.ndarray, name: str) -> np.ndarray:
    """bool [E]: which entries are real, by a mask of entries or of positions."""
    try:
        found = nested_numbers(value, name)
    except Unfit:
        found = Nested(np.repeat(_of_positions(value, counts, name), counts), counts)
    if len(found.counts) != len(counts) or (found.counts != counts).any():
        raise Unfit(f"{name}: a mark for each entry expected; it has others")
    return found.flat != 0


def _of_positions(value: Any, counts: np.ndarray, name: str) -> np.ndarray:
    marks = whole_numbers(value, name)
    if len(marks) != len(counts):
        raise Unfit(f"{name}: {len(counts)} marks expected, one a position; got {len(marks)}")
    return marks
