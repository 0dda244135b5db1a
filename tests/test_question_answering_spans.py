"""Answers from logits, against every span tried one by one; scores, against SQuAD's own rules written out."""

from __future__ import annotations

import re
import string
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from predistill.student_train.spans import Answer, Question, answers, best_spans, candidates, scores


def every_span(start, end, inside, longest):
    """(score, first, last) of all that are allowed, best first."""
    size = len(start)
    found = [
        (float(start[i] + end[j]), i, j)
        for i in range(size) for j in range(i, min(i + longest, size)) if inside[i] and inside[j]
    ]  # fmt: skip
    return sorted(found, reverse=True)


@pytest.mark.parametrize(("size", "longest", "n_best"), [(17, 4, 6), (5, 30, 20), (1, 1, 3), (40, 30, 20)])
def test_best_spans_are_the_best_of_all(size: int, longest: int, n_best: int) -> None:
    generator = torch.Generator().manual_seed(size)
    start, end = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    inside = torch.rand(3, size, generator=generator) < 0.7
    inside[2] = False
    got, first, last = best_spans(start, end, inside, longest=longest, n_best=n_best)
    assert got.shape == first.shape == last.shape == (3, n_best)
    for row in range(3):
        expected = every_span(start[row], end[row], inside[row], longest)[:n_best]
        there = torch.isfinite(got[row])
        assert int(there.sum()) == len(expected)
        made = zip(got[row][there].tolist(), first[row][there].tolist(), last[row][there].tolist(), strict=True)
        for (score, i, j), (best, at, to) in zip(made, expected, strict=True):
            assert (score, i, j) == (pytest.approx(best), at, to)


def test_candidates_are_characters_and_padding_is_none() -> None:
    offsets = torch.tensor(
        [[[-1, -1], [-1, -1], [0, 3], [4, 9], [-1, -1]], [[-1, -1], [0, 2], [3, 5], [-1, -1], [0, 0]]]
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    logits = torch.zeros(2, 2, 5)
    logits[0, 0] = torch.tensor([1.0, 9, 2, 3, 9])
    logits[0, 1] = torch.tensor([0.5, 9, 0, 5, 9])
    logits[1, :, 4] = 50.0
    found = candidates(logits.half(), offsets, mask, n_best=4)
    assert found[0, 0].tolist() == [1.5, -1, -1] and found[0, 1].tolist() == [8, 4, 9]
    assert found[0, 2].tolist() == [7, 0, 9] and found[0, 3].tolist() == [2, 0, 3] and found[0, 4, 0] == -torch.inf
    assert found[1, 1:, 0].tolist() == [0, 0, 0, -torch.inf]


def test_an_answer_is_looked_for_in_all_windows() -> None:
    contexts = ["the old cat sat", "nothing"]
    one = [[4.0, -1, -1], [3.0, 8, 11], [2.0, 3, 11]]  # "cat", " old cat"
    two = [[1.0, -1, -1], [2.5, 8, 11], [2.9, 4, 11]]
    none = [[5.0, -1, -1], [-np.inf, 0, 0], [-np.inf, 0, 0]]
    found, question = np.array([one, none, two]), np.array([0, 1, 0])
    told = answers(found, question, contexts, n_best=5)
    assert told[0] == [Answer("cat", 8, 3.0), Answer("old cat", 4, 2.9)]
    assert told[1] == [Answer("", -1, 5.0)]
    assert [one[0].text for one in answers(found, question, contexts, threshold=0.0)] == ["cat", ""]
    assert answers(found, question, contexts, threshold=-2.5)[0][0] == Answer("", -1, 1.0)
    assert [one.text for one in answers(found, question, contexts, threshold=0.0, n_best=5)[0]] == [
        "cat",
        "old cat",
        "",
    ]


def plain(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(said: str, truth: str) -> float:
    ours, theirs = plain(said).split(), plain(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def test_scores_are_squads() -> None:
    asked = [
        Question("1", "", ["the old cat", "cat"]), Question("2", "", ["A b c."]), Question("3", "", []),
        Question("4", "", []), Question("5", "", None), Question("6", "", ["x y"]),
    ]  # fmt: skip
    said = ["Cat!", "b d", "", "something", "whatever", ""]
    pairs = [(one, right.answers or [""]) for one, right in zip(said, asked, strict=True) if right.answers is not None]
    f1 = [max(overlap(one, truth) for truth in truths) for one, truths in pairs]
    exact = [any(plain(one) == plain(truth) for truth in truths) for one, truths in pairs]
    found = scores(said, asked)
    assert found["exact_match"] == pytest.approx(100 * np.mean(exact)) and found["f1"] == pytest.approx(
        100 * np.mean(f1)
    )
    assert found["has_answer_f1"] == pytest.approx(100 * np.mean([f1[0], f1[1], f1[4]]))
    assert found["no_answer_accuracy"] == 50
    assert scores(["cat"], asked[:1]) == {"exact_match": 100, "f1": 100} and scores(["x"], asked[4:5]) == {}


def test_what_models_return() -> None:
    from predistill.store import ConfigError
    from predistill.student_train.tasks.question_answering import span_logits
    from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

    start, end = torch.randn(2, 3, 4)
    for outputs in ((start, end, "more"), {"start_logits": start, "end_logits": end},
                    QuestionAnsweringModelOutput(start_logits=start, end_logits=end),
                    SimpleNamespace(start_logits=start, end_logits=end)):  # fmt: skip
        torch.testing.assert_close(span_logits(outputs), torch.stack([start, end], 1))
    for wrong in (start, (start,), SequenceClassifierOutput(logits=start), (start, end[:, :2])):
        with pytest.raises(ConfigError, match="a student that gives start_logits and end_logits"):
            span_logits(wrong)
