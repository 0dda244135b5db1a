"""Losses of attention maps against sums written out here; heads, what is not visible, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from predistill.student_train.losses import attention
from torch import Tensor

B, S = 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
BOTH_WAYS = MASK[:, None, :, None] & MASK[:, None, None, :]  # [B, 1, S, S]
CAUSAL = BOTH_WAYS & torch.ones(S, S, dtype=torch.bool).tril()
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": attention.mse, "kl": attention.kl, "soft_cross_entropy": attention.soft_cross_entropy,
}  # fmt: skip


def scores(seed: int, heads: int = 2) -> Tensor:
    return torch.randn(B, heads, S, S, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def probabilities(seed: int, visible: Tensor, heads: int = 2) -> Tensor:
    """Exactly 0 where a key is not visible, and everywhere for a query that sees nothing."""
    return scores(seed, heads).masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)


def maps_for(loss: str, seed: int, visible: Tensor, heads: int = 2) -> Tensor:
    return probabilities(seed, visible, heads) if loss == "kl" else scores(seed, heads)


def by_hand(loss: str, student: list[float], teacher: list[float]) -> list[float]:
    """One query's visible keys: for mse a value a key, else one value."""
    if loss == "mse":
        return [(a - b) ** 2 for a, b in zip(student, teacher, strict=True)]
    if loss == "kl":
        return [sum(p * math.log(p / q) for q, p in zip(student, teacher, strict=True))]
    q, p = ([math.exp(z) / sum(math.exp(other) for other in row) for z in row] for row in (student, teacher))
    return [-sum(b * math.log(a) for a, b in zip(q, p, strict=True))]


@pytest.mark.parametrize("visible", [BOTH_WAYS, CAUSAL], ids=["both-ways", "causal"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_value_is_the_formula_over_visible_keys(loss: str, visible: Tensor) -> None:
    student, teacher = maps_for(loss, 1, visible), maps_for(loss, 2, visible)
    values = LOSSES[loss](student, teacher, visible)
    assert values.shape == ((B, S, S) if loss == "mse" else (B, S))
    expected = torch.zeros_like(values)
    for b in range(B):
        for query in range(S):
            keys = [key for key in range(S) if visible[b, 0, query, key]]
            for head in range(2 if keys else 0):
                found = by_hand(loss, *(each[b, head, query, keys].tolist() for each in (student, teacher)))
                for key, value in zip(keys, found, strict=loss == "mse"):
                    expected[(b, query, key) if loss == "mse" else (b, query)] += value / 2
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_how_heads_meet(loss: str) -> None:
    student, teacher = maps_for(loss, 1, CAUSAL, heads=2), maps_for(loss, 2, CAUSAL, heads=4)
    plain = lambda s, t: LOSSES[loss](s, t, CAUSAL)  # noqa: E731
    mean_s, mean_t = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    ways: list[tuple[Any, Tensor]] = [
        ("mean", plain(mean_s, mean_t)),
        ("auto", plain(mean_s, mean_t)),
        ("repeat", plain(student, mean_t.expand_as(student))),
        ([(0, 3), (1, 0), (1, 1)], plain(student[:, [0, 1, 1]], teacher[:, [3, 0, 1]])),
    ]
    for heads, expected in ways:
        torch.testing.assert_close(LOSSES[loss](student, teacher, CAUSAL, heads=heads), expected)
    torch.testing.assert_close(LOSSES[loss](student, mean_t, CAUSAL), plain(mean_s, mean_t))  # stored head-mean
    for heads in ("auto", "repeat"):  # equal counts: each with its own
        pairs = LOSSES[loss](student, teacher[:, :2], CAUSAL, heads=[(0, 0), (1, 1)])
        torch.testing.assert_close(LOSSES[loss](student, teacher[:, :2], CAUSAL, heads=heads), pairs)


def test_sums_over_heads_are_for_mse() -> None:
    student, teacher = scores(1, 2), scores(2, 4)
    summed = attention.mse(student.sum(1, keepdim=True), teacher.sum(1, keepdim=True), CAUSAL)
    torch.testing.assert_close(attention.mse(student, teacher, CAUSAL, heads="sum"), summed)
    for loss in ("kl", "soft_cross_entropy"):
        with pytest.raises(ValueError, match='heads="sum" is for mse'):
            LOSSES[loss](student, teacher, CAUSAL, heads="sum")


@pytest.mark.parametrize("heads", ["auto", "mean", "repeat", [(0, 1)]], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_visible_reaches_nothing(loss: str, heads: Any) -> None:
    student, teacher = maps_for(loss, 1, CAUSAL), maps_for(loss, 2, CAUSAL)
    clean = student.clone().requires_grad_()
    expected = LOSSES[loss](clean, teacher, CAUSAL, heads=heads)
    spoilt = student.masked_fill(~CAUSAL, math.nan).requires_grad_()
    values = LOSSES[loss](spoilt, teacher.masked_fill(~CAUSAL, math.nan), CAUSAL, heads=heads)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    slope = torch.autograd.grad(values.sum(), spoilt)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), clean)[0], rtol=0, atol=0)
    assert not slope[~CAUSAL.expand_as(slope)].any()
    blind = ~CAUSAL.any(-1).squeeze(1)  # [B, S]
    assert blind.any() and not values[blind].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(loss: str) -> None:
    student, teacher = maps_for(loss, 1, CAUSAL).requires_grad_(), maps_for(loss, 2, CAUSAL).requires_grad_()
    inside = lambda s: LOSSES[loss](torch.where(CAUSAL, s, 0.0), teacher.detach(), CAUSAL)  # noqa: E731
    assert torch.autograd.gradcheck(inside, (student,))
    slopes = torch.autograd.grad(LOSSES[loss](student, teacher, CAUSAL).sum(), [student, teacher], allow_unused=True)
    assert slopes[0].abs().max() > 0 and slopes[1] is None


def test_cross_entropy_of_scores_has_the_gradient_of_kl_of_probabilities() -> None:
    student, teacher = scores(1).requires_grad_(), scores(2)
    log_q = student.masked_fill(~BOTH_WAYS, -1e30).log_softmax(-1)
    log_p = teacher.masked_fill(~BOTH_WAYS, -1e30).log_softmax(-1)
    kl = attention.kl(log_q.exp(), log_p.exp(), BOTH_WAYS)
    cross = attention.soft_cross_entropy(student, teacher, BOTH_WAYS)
    entropy = -torch.where(BOTH_WAYS, log_p.exp() * log_p, 0.0).sum(-1).mean(1)
    torch.testing.assert_close(cross, kl + entropy)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), student)[0] for each in (cross, kl)))


def test_a_student_that_gives_a_key_nothing_is_finite() -> None:
    student = torch.tensor([0.0, 1.0, 0.0]).expand(1, 1, 3, 3).clone().requires_grad_()
    teacher, visible = torch.tensor([0.5, 0.5, 0.0]).expand(1, 1, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    values = attention.kl(student, teacher, visible)
    assert values.isfinite().all() and values.min() > 40  # half of 87 nats
    assert torch.autograd.grad(values.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_halves_are_computed_in_float32(loss: str, dtype: torch.dtype) -> None:
    student, teacher = maps_for(loss, 1, CAUSAL).to(dtype), maps_for(loss, 2, CAUSAL).to(dtype)
    values = LOSSES[loss](student, teacher, CAUSAL)
    assert values.dtype == torch.float32
    exact = LOSSES[loss](student.double(), teacher.double(), CAUSAL)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    student, teacher = scores(1, 2), scores(2, 4)
    for heads, message in (
        ("max", "one of auto, mean, sum, repeat, or pairs of heads, not 'max'"),
        ([(0, 4)], "the teacher has heads 0 to 3, but the head map has head 4"),
        ([(2, 0)], "the student has heads 0 to 1, but the head map has head 2"),
        ([], "the head map has no pair"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.mse(student, teacher, CAUSAL, heads=heads)
    with pytest.raises(ValueError, match="of the same tokens"):
        attention.mse(student, teacher[..., :-1], CAUSAL)
