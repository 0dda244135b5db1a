"""Losses of feature maps against sums written out here; tokens as positions, padding, sizes, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from predistill.student_train.losses import feature_maps
from torch import Tensor

B, S, D = 3, 6, 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fsp(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return feature_maps.fsp(student, 2 * student, teacher, 2 * teacher, mask)


def vid(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return feature_maps.vid(student, teacher, torch.linspace(-1, 3, D, dtype=torch.float64), mask)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "attention_transfer": feature_maps.attention_transfer, "nst": feature_maps.nst, "fsp": fsp, "vid": vid,
}  # fmt: skip


def by_hand(loss: str, student: Tensor, teacher: Tensor) -> float:
    """One row: channels x positions."""
    s, t, positions = student.tolist(), teacher.tolist(), student.shape[1]
    if loss == "attention_transfer":
        maps = [[sum(f[c][at] ** 2 for c in range(D)) for at in range(positions)] for f in (s, t)]
        sizes = [math.hypot(*each) for each in maps]
        return sum((a / sizes[0] - b / sizes[1]) ** 2 for a, b in zip(*maps, strict=True)) / positions
    if loss == "nst":
        s, t = ([[v / math.hypot(*line) for v in line] for line in f] for f in (s, t))
        dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
        kernel = lambda a, b: sum(dot(x, y) ** 2 for x in a for y in b) / D**2  # noqa: E731
        return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    if loss == "fsp":
        flows = [
            [sum(f[i][at] * 2 * f[j][at] for at in range(positions)) / positions for i in range(D) for j in range(D)]
            for f in (s, t)
        ]
        return sum((a - b) ** 2 for a, b in zip(*flows, strict=True)) / D**2
    variances = [math.log1p(math.exp(-1 + 4 * c / (D - 1))) + 1e-5 for c in range(D)]
    parts = [
        (s[c][at] - t[c][at]) ** 2 / variances[c] + math.log(variances[c]) for c in range(D) for at in range(positions)
    ]
    return sum(parts) / 2 / D / positions


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rows_value_is_the_formula(loss: str) -> None:
    student, teacher = states(1, B, D, 2, 3), states(2, B, D, 2, 3)
    values = LOSSES[loss](student, teacher)
    tokens = student.flatten(2).mT, teacher.flatten(2).mT
    masked = LOSSES[loss](*tokens, MASK)
    torch.testing.assert_close(LOSSES[loss](*tokens), values)  # tokens are positions
    for b in range(B):
        s, t = student[b].flatten(1), teacher[b].flatten(1)
        assert values[b].item() == pytest.approx(by_hand(loss, s, t), rel=1e-11)
        assert masked[b].item() == pytest.approx(by_hand(loss, s[:, MASK[b]], t[:, MASK[b]]), rel=1e-11)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_in_padding_reaches_nothing(loss: str) -> None:
    student, teacher, padding = states(1, B, S, D), states(2, B, S, D), ~MASK.unsqueeze(-1)
    clean, spoilt = student.requires_grad_(), student.detach().masked_fill(padding, math.nan).requires_grad_()
    expected = LOSSES[loss](clean, teacher, MASK)
    values = LOSSES[loss](spoilt, teacher.masked_fill(padding, 1e30), MASK)
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    slope = torch.autograd.grad(values.sum(), spoilt)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), clean)[0], rtol=0, atol=0)
    assert not slope[~MASK].any()
    nothing = LOSSES[loss](spoilt, teacher, torch.zeros_like(MASK))
    assert nothing.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(loss: str) -> None:
    student, teacher = states(1, B, S, D).requires_grad_(), states(2, B, S, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[loss](s, teacher.detach(), MASK), (student,), atol=1e-6)
    slopes = torch.autograd.grad(LOSSES[loss](student, teacher).sum(), [student, teacher], allow_unused=True)
    assert slopes[0].abs().max() > 0 and slopes[1] is None


def test_the_variance_is_learnt() -> None:
    student, teacher = states(1, B, S, D), states(2, B, S, D)
    log_scale = torch.linspace(-1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scale: feature_maps.vid(student, teacher, scale, MASK), (log_scale,))


@pytest.mark.parametrize("loss", ["attention_transfer", "nst"])
def test_channels_and_sizes_may_differ(loss: str) -> None:
    """The larger map is average-pooled, whichever it is."""
    student, teacher = states(1, B, 4, 2, 3), states(2, B, 7, 4, 6)
    small = F.avg_pool2d(teacher, 2)
    torch.testing.assert_close(LOSSES[loss](student, teacher), LOSSES[loss](student, small))
    torch.testing.assert_close(LOSSES[loss](teacher, student), LOSSES[loss](small, student))


def test_layers_of_two_sizes_meet_at_the_smaller() -> None:
    large, small, teacher = states(1, B, D, 4, 4), states(2, B, D, 2, 2), states(3, B, D, 2, 2)
    pooled = feature_maps.fsp(F.avg_pool2d(large, 2), small, teacher, teacher)
    torch.testing.assert_close(feature_maps.fsp(large, small, teacher, teacher), pooled)


@pytest.mark.parametrize("loss", LOSSES)
def test_halves_and_autocast_are_computed_in_float32(loss: str) -> None:
    student, teacher = states(1, B, S, D).bfloat16(), states(2, B, S, D).half()
    exact = LOSSES[loss](student.double(), teacher.double(), MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = LOSSES[loss](student, teacher, MASK)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=1e-6)


def test_other_channels_are_refused() -> None:
    student, teacher = states(1, B, S, D), states(2, B, S, 7)
    with pytest.raises(ValueError, match=r"fsp needs the teacher's channels \(7, 7\) in both layers, not \(4, 4\)"):
        fsp(student, teacher)
    with pytest.raises(ValueError, match="vid needs the teacher's 7 channels, not 4"):
        vid(student, teacher)
