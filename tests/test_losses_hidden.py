"""Losses of hidden states against sums written out here; padding, half precision, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from predistill.student_train.losses import hidden
from torch import Tensor

B, S, D = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)  # padded on either side
LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hidden.mse, "cosine": hidden.cosine, "pkd": hidden.pkd}


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, S, D)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(loss: str, s: list[float], t: list[float]) -> float:
    size_s, size_t = (math.sqrt(sum(v * v for v in h)) for h in (s, t))
    if loss == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    if loss == "cosine":
        return 1 - sum(a * b for a, b in zip(s, t, strict=True)) / size_s / size_t
    return sum((a / size_s - b / size_t) ** 2 for a, b in zip(s, t, strict=True))


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_a_tokens_value_is_the_formula(loss: str) -> None:
    student, teacher = states(1), states(2)
    values, masked = LOSSES[loss](student, teacher), LOSSES[loss](student, teacher, MASK)
    for b in range(B):
        for s in range(S):
            value = by_hand(loss, student[b, s].tolist(), teacher[b, s].tolist())
            assert values[b, s].item() == pytest.approx(value, rel=1e-12)
            assert masked[b, s].item() == pytest.approx(value if MASK[b, s] else 0.0, rel=1e-12)


def test_pkd_is_of_the_first_token_that_counts() -> None:
    student, teacher = states(1), states(2)
    for mask, first in ((None, [0, 0, 0]), (MASK, [0, 0, 2])):
        values = hidden.pkd(student, teacher, mask)
        for b, at in enumerate(first):
            value = by_hand("pkd", student[b, at].tolist(), teacher[b, at].tolist())
            assert values[b].item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(hidden.pkd(student[:, 0], teacher[:, 0]), hidden.pkd(student, teacher))


def test_features_of_a_row() -> None:
    states_ = states(3)
    means = torch.stack([states_[b][MASK[b]].mean(0) for b in range(B)])
    torch.testing.assert_close(hidden.mean_token(states_, MASK), means)
    torch.testing.assert_close(hidden.first_token(states_, MASK), states_[torch.arange(B), torch.tensor([0, 0, 2])])
    nothing = torch.zeros(B, S, dtype=torch.bool)
    spoilt = torch.full_like(states_, math.nan)
    assert not hidden.mean_token(spoilt, nothing).any() and not hidden.first_token(spoilt, nothing).any()


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_in_padding_reaches_nothing(loss: str, fill: float) -> None:
    student, teacher = states(1), states(2)
    clean = student.clone().requires_grad_()
    expected = LOSSES[loss](clean, teacher, MASK)
    spoilt = student.masked_fill(~MASK.unsqueeze(-1), fill).requires_grad_()
    values = LOSSES[loss](spoilt, teacher.masked_fill(~MASK.unsqueeze(-1), fill), MASK)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    slope = torch.autograd.grad(values.sum(), spoilt)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), clean)[0], rtol=0, atol=0)
    assert not slope[~MASK].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(loss: str) -> None:
    student, teacher = states(1).requires_grad_(), states(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[loss](s, teacher.detach(), MASK), (student,))
    slopes = torch.autograd.grad(LOSSES[loss](student, teacher).sum(), [student, teacher], allow_unused=True)
    assert slopes[0].abs().max() > 0 and slopes[1] is None


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("student_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_halves_are_computed_in_float32(loss: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = (states(1) * 100).to(student_dtype), (states(2) * 100).to(teacher_dtype)
    values = LOSSES[loss](student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), LOSSES[loss](student.double(), teacher.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_states_of_zero_are_finite(loss: str) -> None:
    student, teacher = torch.zeros(B, S, D, requires_grad=True), states(2).float()
    values = LOSSES[loss](student, teacher)
    slope = torch.autograd.grad(values.sum(), student)[0]
    assert values.isfinite().all() and slope.isfinite().all() and slope.abs().max() < 10


@pytest.mark.parametrize("loss", LOSSES)
def test_other_widths_are_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=r"one shape \[B, S, D\], not \(3, 5, 4\) and \(3, 5, 6\); project"):
        LOSSES[loss](states(1), states(2, B, S, 6))
