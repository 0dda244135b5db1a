"""A row as others have it, checked, and as a store has it.

S tokens, E entries of all of them, P tokens that have entries. What stands at token s speaks of the token after it.

A log-probability is a logit whose log-sum-exp is 0: relative to the position's largest, as stores keep logits, the
log-sum-exp is that one's log-probability with the other sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...store.schema import MISSING_LABEL
from .config import LOGITS, LOGPROBS, NEXT, OWN, PROBABILITIES
from .numbers import Nested, Unfit

NO_ENTRY = -9000.0  # log-probabilities below stand for none: -9999 with OpenAI, -1e9 with Axolotl, -inf with vLLM
_MOST_ENTRIES = 2**16 - 1  # of a position; counts are stored in two bytes
_LOWEST = -65504.0  # the least of float16: no probability at all


class Said(NamedTuple):
    """tokens, labels, counts: int64 [S], the number of entries at each; ids: int64 [E]; values: float64 [E].

    chosen: float64 [S], log-probabilities of the next token where they are told apart from the entries, else NaN.
    """

    tokens: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    chosen: np.ndarray | None = None


class Kept(NamedTuple):
    """tokens, labels: int32 [S]; positions, counts: int32 [P]; ids: int32 [E]; logits: float32 [E], relative to their
    position's largest and falling; logsumexp: float32 [P], relative to it too. loss is NaN where it cannot be known."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    logsumexp: np.ndarray
    confidence: float
    loss: float


@dataclass(frozen=True)
class Rules:
    """values: one of config.VALUES. k: entries of a position that are kept, the largest; None: all. most_mass: what the
    probabilities of a position may sum to, by their rounding."""

    values: str
    vocabulary: int | None = None
    k: int | None = None
    most_mass: float = 1.05


def check_tokens(tokens: np.ndarray, vocabulary: int | None) -> None:
    """Raises Unfit where there are fewer than two, or one that the vocabulary does not have."""
    if len(tokens) < 2:
        raise Unfit(f"two tokens at least expected, one and the one that it predicts; got {len(tokens)}")
    _check_ids(tokens, vocabulary, "token")


def check_labels(labels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The labels. Raises Unfit where they are not the tokens themselves, or -100."""
    if len(labels) != len(tokens):
        raise Unfit(f"{len(tokens)} labels expected, one a token; got {len(labels)}")
    bad = (labels != MISSING_LABEL) & (labels != tokens)
    if bad.any():
        at = int(bad.argmax())
        raise Unfit(
            f"label {at} is {labels[at]}, and token {at} is {tokens[at]}: the token itself, or -100, expected (labels "
            "that are shifted to the next token are not taken)"
        )
    return labels


def aligned(counts: np.ndarray, size: int, alignment: str) -> tuple[np.ndarray, int]:
    """Counts of S positions, each of the token after it, and how many entries before them belong to no position.

    counts: int64, of as many positions as the row has tokens, or of one less: the last of "next" and the first of "own"
    speak of no token of the row. Raises Unfit for another number.
    """
    if len(counts) not in (size, size - 1):
        raise Unfit(f"{size} tokens, so entries of {size} or {size - 1} positions expected; got {len(counts)}")
    short = len(counts) < size
    if alignment == NEXT:
        return (np.append(counts, 0) if short else counts), 0
    assert alignment == OWN
    dropped = 0 if short else int(counts[0])
    return np.append(counts if short else counts[1:], 0), dropped


def entries(ids: Nested, values: Nested) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts, ids int64 [E], values float64 [E]). Raises Unfit where a position has more of one than of the other."""
    if len(ids.counts) != len(values.counts):
        raise Unfit(f"ids and values of as many positions expected; got {len(ids.counts)} and {len(values.counts)}")
    bad = ids.counts != values.counts
    if bad.any():
        at = int(bad.argmax())
        raise Unfit(f"position {at} has {ids.counts[at]} ids and {values.counts[at]} values; as many expected")
    if ids.flat.dtype != np.int64 and len(ids.flat):
        if not (ids.flat == np.floor(ids.flat)).all():
            raise Unfit("ids are whole numbers; got others")
        return ids.counts, ids.flat.astype(np.int64), values.flat.astype(np.float64)
    return ids.counts, ids.flat.astype(np.int64), values.flat.astype(np.float64)


def kept(said: Said, rules: Rules) -> Kept:
    """Entries by falling value, those that stand for none left out. Raises Unfit for what no teacher can have said."""
    where, ids, values = _entries(said, rules)
    counts = np.bincount(where, minlength=len(said.tokens))
    positions = np.flatnonzero(counts)
    counts = counts[positions]
    if counts.max(initial=0) > _MOST_ENTRIES:
        raise Unfit(f"at most {_MOST_ENTRIES} entries a position expected; got {counts.max()}")
    following = np.append(said.labels[1:], MISSING_LABEL)[positions]
    if not (following != MISSING_LABEL).any():
        raise Unfit("a labelled token that the teacher speaks of expected; there is none")
    largest = values[counts.cumsum() - counts]
    relative = values - np.repeat(largest, counts)
    place = np.repeat(np.arange(len(positions)), counts)
    total = np.bincount(place, weights=np.exp(relative), minlength=len(positions))
    if rules.values == LOGITS:
        logsumexp = np.log(total)
    else:
        _check_mass(total * np.exp(largest), positions, rules)
        logsumexp = -largest
    logprobs = _logprobs(said, positions, ids, values, place, following) if rules.values != LOGITS else None
    return Kept(
        said.tokens.astype(np.int32), said.labels.astype(np.int32), positions.astype(np.int32),
        counts.astype(np.int32), ids.astype(np.int32), relative.clip(min=_LOWEST).astype(np.float32),
        logsumexp.astype(np.float32), *_summaries(largest, logprobs, following, said.labels),
    )  # fmt: skip


def _entries(said: Said, rules: Rules) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, id, value) of each entry, in the order that they are stored in."""
    where, ids, values = np.repeat(np.arange(len(said.counts)), said.counts), said.ids, said.values
    if rules.values == PROBABILITIES:
        if not ((values >= 0) & (values <= rules.most_mass)).all():
            raise Unfit(f"probabilities from 0 to 1 expected; got {values[~((values >= 0) & (values <= 1))][0]:g}")
        with np.errstate(divide="ignore"):
            values = np.log(values)
    if np.isnan(values).any() or (values == np.inf).any():
        at = int((np.isnan(values) | (values == np.inf)).argmax())
        raise Unfit(f"position {where[at]}: numbers expected; got {values[at]}")
    real = values > NO_ENTRY
    where, ids, values = where[real], ids[real], values[real]
    _check_ids(ids, rules.vocabulary, "id", where)
    _check_different(where, ids)
    if ((values[1:] >= values[:-1]) & (where[1:] == where[:-1])).any():  # not falling yet: 8 times the work
        order = np.lexsort((ids, -values, where))
        where, ids, values = where[order], ids[order], values[order]
    if rules.k is not None:
        near = np.arange(len(where)) - np.searchsorted(where, where) < rules.k
        where, ids, values = where[near], ids[near], values[near]
    return where, ids, values


def _check_ids(ids: np.ndarray, vocabulary: int | None, what: str, where: np.ndarray | None = None) -> None:
    most = 2**31 if vocabulary is None else vocabulary
    bad = (ids < 0) | (ids >= most)
    if bad.any():
        at = int(bad.argmax())
        place = at if where is None else where[at]
        size = f"the vocabulary has {vocabulary} (--vocabulary gives another)"
        known = "none below 0" if ids[at] < 0 else size if vocabulary else f"none from {most}"
        raise Unfit(f"{what} {ids[at]} at position {place}, where {known}")


def _check_different(where: np.ndarray, ids: np.ndarray) -> None:
    """Raises Unfit where a position has an id twice. ids: from 0 to below 2**31."""
    together = np.sort((where << 31) | ids)
    same = together[1:] == together[:-1]
    if same.any():
        found = int(together[int(same.argmax())])
        raise Unfit(f"position {found >> 31} has id {found & (2**31 - 1)} twice; different ids expected")


def _check_mass(mass: np.ndarray, positions: np.ndarray, rules: Rules) -> None:
    if (mass > rules.most_mass).any():
        at = int((mass > rules.most_mass).argmax())
        advice = " (if these are logits: --values logits)" if rules.values == LOGPROBS else ""
        raise Unfit(
            f"position {positions[at]}: probabilities that sum to at most 1 expected; got {mass[at]:.4g}{advice}"
        )


def _logprobs(
    said: Said, positions: np.ndarray, ids: np.ndarray, values: np.ndarray, place: np.ndarray, following: np.ndarray
) -> np.ndarray:
    """float64 [P]: of the token that comes next, NaN where it is not told."""
    found = np.full(len(positions), np.nan) if said.chosen is None else said.chosen[positions]
    own = ids == following[place]
    found[place[own]] = values[own]
    return found


def _summaries(
    largest: np.ndarray, logprobs: np.ndarray | None, following: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """(the mean largest probability, the mean loss), over tokens whose next one is labelled; NaN where unknown."""
    if logprobs is None:
        return float("nan"), float("nan")
    known = following != MISSING_LABEL
    wanted = int((labels[1:] != MISSING_LABEL).sum())
    loss = float(-logprobs[known].mean()) if known.sum() == wanted else float("nan")
    return float(np.exp(largest[known]).mean()), loss
