"""Answers from logits of their ends: the best spans of a window, of a question over its windows, and how good they are.

N windows, B of them in a batch, S tokens, K spans of a window. A *candidate* is (score, first character, one past the
last); the score is the sum of the logits of start and end. The first candidate of a window is to give no
answer, and its characters are OUTSIDE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.text import squad

from ..store.errors import StoreCorrupt
from ..store.schema import OUTSIDE

N_BEST = 20  # spans of a window that are looked at
LONGEST = 30  # tokens of an answer


class Question(NamedTuple):
    """answers: texts that are right; none where there is no answer; None where it is not labelled."""

    id: str
    context: str
    answers: list[str] | None


class Answer(NamedTuple):
    """text: "" for none. start: its first character in the context."""

    text: str
    start: int
    score: float


# ---- of a batch of windows ----


def candidates(
    logits: Tensor, offsets: Tensor, mask: Tensor, *, longest: int = LONGEST, n_best: int = N_BEST
) -> Tensor:
    """float32 [B, 1 + n_best, 3], best first after the one of no answer, whose score is that of token 0; -inf where
    there are fewer spans. logits: [B, 2, S] of starts and ends; offsets: int64 [B, S, 2]; mask: [B, S].
    """
    logits = logits.float()
    inside = (offsets[..., 0] != OUTSIDE) & mask.bool()
    scores, first, last = best_spans(logits[:, 0], logits[:, 1], inside, longest=longest, n_best=n_best)
    begin = offsets[..., 0].gather(1, first).float()
    end = offsets[..., 1].gather(1, last).float()
    nothing = torch.full_like(scores[:, :1], OUTSIDE)
    none = torch.stack([logits[:, :, 0].sum(1, keepdim=True), nothing, nothing], -1)
    return torch.cat([none, torch.stack([scores, begin, end], -1)], 1)


def best_spans(
    start: Tensor, end: Tensor, inside: Tensor, *, longest: int = LONGEST, n_best: int = N_BEST
) -> tuple[Tensor, Tensor, Tensor]:
    """The n best of all spans of at most `longest` tokens inside: scores [B, n], and int64 [B, n] their first and last
    token. start, end: [B, S]; inside: bool [B, S].
    """
    width = start.shape[1]
    start, end = (values.masked_fill(~inside, -torch.inf) for values in (start, end))
    ends = torch.nn.functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # [B, S, longest]
    scores, at = (start.unsqueeze(-1) + ends).flatten(1).topk(min(n_best, width * longest))
    missing = n_best - scores.shape[1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    at = torch.nn.functional.pad(at, (0, missing))
    first = at // longest
    return scores, first, (first + at % longest).clamp(max=width - 1)


# ---- of questions ----


def answers(
    found: np.ndarray, question: np.ndarray, contexts: Sequence[str], *, threshold: float | None = None, n_best: int = 1
) -> list[list[Answer]]:
    """The n best different answers to each question over its windows, best first.

    found: candidates, float [N, 1 + K, 3]; question: int64 [N], which of `contexts` each window is of. threshold: no
    answer is given where its score is above the best answer's by more; None: one always is. No answer scores as in the
    window that is surest that there is one.
    """
    order = np.argsort(question, kind="stable")
    bounds = np.searchsorted(question[order], np.arange(len(contexts) + 1))
    made = []
    for at, context in enumerate(contexts):
        mine = found[order[bounds[at] : bounds[at + 1]]]
        spans = mine[:, 1:].reshape(-1, 3)
        spans = spans[np.isfinite(spans[:, 0])]
        best = _different(spans[np.argsort(-spans[:, 0], kind="stable")], context, n_best)
        none = Answer("", OUTSIDE, float(mine[:, 0, 0].min(initial=np.inf)))
        if not best or (threshold is not None and none.score - best[0].score > threshold):
            best = [none, *best]
        elif threshold is not None:
            best = [best[0], *sorted([*best[1:], none], key=lambda one: -one.score)]
        made.append(best[:n_best])
    return made


def _different(spans: np.ndarray, context: str, n_best: int) -> list[Answer]:
    """The first n of other texts; spans: [n, 3], best first."""
    made: dict[str, Answer] = {}
    for score, begin, end in spans.tolist():
        text = context[int(begin) : int(end)]
        start = int(begin) + len(text) - len(text.lstrip())  # some tokenizers count the blank before a word to it
        if text.strip():
            made.setdefault(text.strip(), Answer(text.strip(), start, score))
        if len(made) == n_best:
            break
    return list(made.values())


def scores(predicted: Sequence[str], asked: Sequence[Question]) -> dict[str, float]:
    """exact_match and f1, in percent, by torchmetrics' SQuAD, over the questions that are labelled; where some have no
    answer, also has_answer_f1 and no_answer_accuracy, of both kinds alone. No questions, no scores."""
    known = [(text, one.answers) for text, one in zip(predicted, asked, strict=True) if one.answers is not None]
    if not known:
        return {}
    found = _squad(known)
    answered = [pair for pair in known if pair[1]]
    if len(answered) == len(known):
        return found
    none = [not text for text, truths in known if not truths]
    more = {"has_answer_f1": _squad(answered)["f1"]} if answered else {}
    return {**found, **more, "no_answer_accuracy": 100.0 * sum(none) / len(none)}


def _squad(known: Sequence[tuple[str, list[str]]]) -> dict[str, float]:
    said = [{"id": str(at), "prediction_text": text} for at, (text, _) in enumerate(known)]
    truths: Any = [
        {"id": str(at), "answers": {"text": right or [""], "answer_start": [0] * len(right or [""])}}
        for at, (_, right) in enumerate(known)
    ]
    return {name: float(value) for name, value in squad(said, truths).items()}


# ---- from a store ----


def questions_of(rows: Any) -> tuple[np.ndarray, list[Question]]:
    """(int64 [N]: which question each row is of, the questions) of rows of a store, or of several one after another.

    Context and answers stand with the first window of a question, whether or not it is among the rows.
    """
    number, found = [], list[Question]()
    for part in getattr(rows, "parts", [rows]):
        views = part.store.sql("SELECT view FROM samples ORDER BY sample_id").fetchnumpy()["view"]
        if np.ma.is_masked(views):
            path = part.store.path
            raise StoreCorrupt(f"{path}: its index has no view of some rows: predistill index {path} --rebuild")
        first = np.maximum.accumulate(np.where(views == 0, np.arange(len(views)), 0))[part.sample_ids]
        wanted, own = np.unique(first, return_inverse=True)
        number.append(own + len(found))
        found += _told(part.store, wanted)
    return np.concatenate(number), found


def _told(store: Any, wanted: np.ndarray) -> list[Question]:
    """Of the samples `wanted`, ascending. Raises StoreCorrupt where the index has lost their texts."""
    low, high = (int(wanted[0]), int(wanted[-1])) if len(wanted) else (0, -1)
    first = f"view = 0 AND sample_id BETWEEN {low} AND {high}"
    table = store.sql(f"SELECT sample_id, id, context, answers FROM samples WHERE {first}").fetchall()
    by_id = {row[0]: row[1:] for row in table}
    made = []
    for sample in wanted.tolist():
        name, context, right = by_id.get(sample, (None, None, None))
        if context is None:
            raise StoreCorrupt(f"{store.path}: sample {sample} has no context: dump it anew")
        made.append(Question(name, context, None if right is None else list(right["text"])))
    return made


def judged(rows: Any, found: np.ndarray, threshold: float) -> dict[str, float]:
    """Scores of the student, the first of `found` [N, 1 or 2, 1 + K, 3], on these rows; where the teacher is the
    second, also its own scores, and how often both give the same answer (as a share).

    threshold: as for `answers`, and used where some question has no answer.
    """
    question, asked = questions_of(rows)
    contexts = [one.context for one in asked]
    empty = any(one.answers == [] for one in asked)
    given = [
        [best[0].text for best in answers(found[:, side], question, contexts, threshold=threshold if empty else None)]
        for side in range(found.shape[1])
    ]
    made = scores(given[0], asked)
    if len(given) < 2:
        return made
    same = np.mean([own == theirs for own, theirs in zip(*given, strict=True)])
    taught = {f"teacher_{name}": value for name, value in scores(given[1], asked).items()}
    return {**made, **taught, "teacher_agreement": float(same)}
