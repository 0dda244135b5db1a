"""Relations between tokens and between rows against sums written out here; widths, padding, degenerate batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from predistill.student_train.losses import relations
from torch import Tensor

B, S = 4, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
OF_ROWS: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": relations.rkd_distance, "rkd_angle": relations.rkd_angle, "rkd": relations.rkd,
    "hard_dark_rank": relations.hard_dark_rank, "similarity": relations.similarity, "pkt": relations.pkt,
    "cc": relations.cc, "dist": relations.dist,
}  # fmt: skip
ONE_WIDTH = {"cc", "dist"}


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(loss: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    return states(seed, 6, 4), states(seed + 1, 6, 4 if loss in ONE_WIDTH else 7)


def huber(gap: float) -> float:
    return 0.5 * gap * gap if abs(gap) < 1 else abs(gap) - 0.5


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


# --- tokens of a row ---


def relation(student: Any, teacher: Any, mask: Tensor = MASK, **options: Any) -> Tensor:
    """student, teacher: left and right features."""
    return relations.minilm(student[0], student[1], teacher[0], teacher[1], mask, **options)


def relation_by_hand(left: Tensor, right: Tensor, queries: list[int], seen: Callable, heads: int) -> dict:
    """{(head, query): probabilities of the keys it sees} of one row."""
    size, found = left.shape[-1] // heads, {}
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in queries:
            weights = [math.exp(dot(left[i, part], right[j, part]) / math.sqrt(size)) for j in queries if seen(i, j)]
            found[head, i] = [weight / sum(weights) for weight in weights]
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_minilm_is_the_formula(heads: int, causal: bool) -> None:
    student, teacher = states(1, 2, B, S, 6), states(2, 2, B, S, 12)
    values = relation(student, teacher, heads=heads, causal=causal)
    for b in range(B):
        tokens = [s for s in range(S) if MASK[b, s]]
        seen = lambda i, j: not causal or j <= i  # noqa: E731
        q, p = (relation_by_hand(left[b], right[b], tokens, seen, heads) for left, right in (student, teacher))
        total = sum(math.log(v / u) * v for at in p for u, v in zip(q[at], p[at], strict=True))
        assert values[b].item() == pytest.approx(total / heads / max(len(tokens), 1), rel=1e-11, abs=1e-15)


def test_minilm_regroups_heads_of_any_number() -> None:
    """Features [B, S, H, d] are their heads side by side."""
    student, teacher = states(1, 2, B, S, 3, 4), states(2, 2, B, S, 2, 12)
    values = relation(student, teacher, heads=4)
    flat = relation(student.flatten(3), teacher.flatten(3), heads=4)
    torch.testing.assert_close(values, flat, rtol=0, atol=0)


def test_minilm_sees_only_what_is_visible() -> None:
    """Two documents packed into a row are two rows."""
    student, teacher = states(1, 2, 1, 5, 4), states(2, 2, 1, 5, 8)
    document = torch.tensor([0, 0, 0, 1, 1])
    visible = (document[:, None] == document)[None, None]
    packed = relation(student, teacher, torch.ones(1, 5), heads=2, causal=True, visible=visible)
    parts = [
        relation(student[:, :, at], teacher[:, :, at], torch.ones(1, 5)[:, at], heads=2, causal=True)
        for at in (slice(0, 3), slice(3, 5))
    ]
    torch.testing.assert_close(packed, (3 * parts[0] + 2 * parts[1]) / 5)


def minilm(student: Tensor, teacher: Tensor) -> Tensor:
    return relations.minilm(student, student, teacher, teacher, MASK, heads=2)


def mmd(student: Tensor, teacher: Tensor) -> Tensor:
    return relations.mmd(student, 2 * student, teacher, 3 * teacher, MASK)


@pytest.mark.parametrize("loss", [minilm, mmd])
def test_what_is_in_padding_reaches_nothing(loss: Callable) -> None:
    student, teacher, padding = states(1, B, S, 4), states(2, B, S, 8), ~MASK.unsqueeze(-1)
    clean = student.masked_fill(padding, 0.0).requires_grad_()
    expected = loss(clean, teacher.masked_fill(padding, 0.0))
    slope = torch.autograd.grad(expected.sum(), clean)[0]
    spoilt = student.masked_fill(padding, math.nan).requires_grad_()
    values = loss(spoilt, teacher.masked_fill(padding, math.nan))
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), spoilt)[0], slope, rtol=0, atol=0)
    assert not slope[~MASK].any() and slope[MASK].any()
    assert not values[-1].any()  # a row without tokens


def test_mmd_is_the_formula() -> None:
    s0, s1, t0, t1 = states(1, B, S, 3), states(2, B, S, 3), states(3, B, S, 7), states(4, B, S, 7)
    values, masked = relations.mmd(s0, s1, t0, t1), relations.mmd(s0, s1, t0, t1, MASK)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                gap = dot(s0[b, i], s1[b, j]) / 3 - dot(t0[b, i], t1[b, j]) / 7
                assert values[b, i, j].item() == pytest.approx(gap * gap, rel=1e-10)
                counts = MASK[b, i] and MASK[b, j]
                assert masked[b, i, j].item() == pytest.approx(gap * gap if counts else 0.0, rel=1e-10)


def test_widths_that_cannot_be_split_are_refused() -> None:
    student, teacher = states(1, 2, B, S, 6), states(2, 2, B, S, 8)
    with pytest.raises(ValueError, match="4 relation heads must divide the width 6"):
        relation(student, teacher, heads=4)
    with pytest.raises(ValueError, match="features of one width, not 6 and 3"):
        relation([student[0], student[1][..., :3]], teacher, heads=1)


# --- rows of a batch ---


def distances_by_hand(rows: Tensor) -> list[list[float]]:
    apart = [[math.dist(a, b) for b in rows.tolist()] for a in rows.tolist()]
    mean = sum(map(sum, apart)) / (len(rows) * (len(rows) - 1))
    return [[d / mean for d in line] for line in apart]


def angles_by_hand(rows: Tensor, i: int) -> list[float]:
    def unit(v: Tensor) -> Tensor:
        return v / (dot(v, v) ** 0.5 or 1.0)

    return [dot(unit(a - rows[i]), unit(b - rows[i])) for a in rows for b in rows]


def test_rkd_is_the_formula() -> None:
    student, teacher = rows("rkd")
    s, t = distances_by_hand(student), distances_by_hand(teacher)
    for i in range(6):
        distance = sum(huber(a - b) for a, b in zip(s[i], t[i], strict=True)) / 6
        pairs = zip(angles_by_hand(student, i), angles_by_hand(teacher, i), strict=True)
        angle = sum(huber(a - b) for a, b in pairs) / 36
        assert relations.rkd_distance(student, teacher)[i].item() == pytest.approx(distance, rel=1e-11)
        assert relations.rkd_angle(student, teacher)[i].item() == pytest.approx(angle, rel=1e-11)
        whole = relations.rkd(student, teacher, distance=2.0, angle=3.0)[i].item()
        assert whole == pytest.approx(2 * distance + 3 * angle, rel=1e-11)


def test_similarity_and_pkt_are_the_formula() -> None:
    student, teacher = rows("pkt")
    grams = [[[dot(a, b) for b in each] for a in each] for each in (student, teacher)]
    for i in range(6):
        for norm, size in ((2.0, lambda line: math.hypot(*line)), (1.0, lambda line: sum(map(abs, line)))):
            s, t = ([v / size(gram[i]) for v in gram[i]] for gram in grams)
            value = sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 6
            found = relations.similarity(student, teacher, norm=norm)[i].item()
            assert found == pytest.approx(value, rel=1e-11)
        alike = [[(1 + gram[i][j] / math.sqrt(gram[i][i] * gram[j][j])) / 2 for j in range(6)] for gram in grams]
        q, p = ([v / sum(line) for v in line] for line in alike)
        value = sum(b * math.log((b + 1e-7) / (a + 1e-7)) for a, b in zip(q, p, strict=True)) / 6
        assert relations.pkt(student, teacher)[i].item() == pytest.approx(value, rel=1e-5)  # 1e-7 on lengths


def test_hard_dark_rank_is_plackett_luce() -> None:
    student, teacher = rows("hard_dark_rank")
    values = relations.hard_dark_rank(student, teacher, alpha=0.7, beta=2.0, neighbours=3)
    s, t = (each.tolist() for each in (student, teacher))
    for i in range(6):
        away = {j: math.dist(t[i], t[j]) for j in range(6) if j != i}
        order = sorted(away, key=away.__getitem__)[:3]
        worths = [math.exp(-0.7 * math.dist(s[i], s[j]) ** 2) for j in order]
        chance = math.prod(worth / sum(worths[rank:]) for rank, worth in enumerate(worths))
        assert values[i].item() == pytest.approx(-math.log(chance), rel=1e-11)


def test_cc_is_of_neighbours() -> None:
    student, teacher = rows("cc")
    gap = (student - teacher).abs()
    expected = torch.cat([(gap[:-1] * gap[1:]).sum(1), torch.zeros(1)]) * 6 / 5
    torch.testing.assert_close(relations.cc(student, teacher), expected)


def test_dist_is_one_less_correlations() -> None:
    student, teacher = rows("dist")
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    classes = [torch.corrcoef(torch.stack([q[:, c], p[:, c]]))[0, 1] for c in range(4)]
    for i, value in enumerate(relations.dist(student, teacher, temperature=2.0, beta=0.5, gamma=3.0)):
        row = torch.corrcoef(torch.stack([q[i], p[i]]))[0, 1]
        torch.testing.assert_close(value, 4 * (0.5 * (1 - row) + 3 * (1 - sum(classes) / 4)))


@pytest.mark.parametrize("loss", OF_ROWS)
def test_gradient(loss: str) -> None:
    student, teacher = (each.requires_grad_() for each in rows(loss, seed=5))
    assert torch.autograd.gradcheck(lambda s: OF_ROWS[loss](s, teacher.detach()), (student,), atol=1e-6)
    slopes = torch.autograd.grad(OF_ROWS[loss](student, teacher).sum(), [student, teacher], allow_unused=True)
    assert slopes[0].abs().max() > 0 and slopes[1] is None


@pytest.mark.parametrize("loss", sorted(set(OF_ROWS) - {"cc"}))  # which depends on the order of the batch
def test_rows_move_with_their_values(loss: str) -> None:
    student, teacher = rows(loss)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = OF_ROWS[loss](student[order], teacher[order])
    torch.testing.assert_close(moved, OF_ROWS[loss](student, teacher)[order])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("loss", OF_ROWS)
def test_batches_of_equal_rows_of_zeros_and_of_one_are_finite(loss: str, count: int) -> None:
    teacher = rows(loss)[1][:count].float()
    for student in (torch.zeros(count, 4), torch.ones(count, 4), states(1, 1, 4).float().expand(count, 4).clone()):
        values = OF_ROWS[loss](student.requires_grad_(), teacher)
        assert values.shape == (count,) and values.isfinite().all()
        slope = torch.autograd.grad(values.sum(), student)[0]
        assert slope.isfinite().all() and slope.abs().max() < 1e3


@pytest.mark.parametrize("loss", sorted(set(OF_ROWS) - {"hard_dark_rank"}))  # a likelihood, above 0 everywhere
def test_a_student_that_is_the_teacher_has_nothing_to_learn(loss: str) -> None:
    student = rows(loss)[0].float().requires_grad_()
    values = OF_ROWS[loss](student, student.detach())
    assert values.abs().max() < 1e-5 and torch.autograd.grad(values.sum(), student)[0].abs().max() < 1e-5


@pytest.mark.parametrize("loss", OF_ROWS)
def test_halves_and_autocast_are_computed_in_float32(loss: str) -> None:
    student, teacher = (each.bfloat16() for each in rows(loss))
    exact = OF_ROWS[loss](student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = OF_ROWS[loss](student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=1e-6)


def test_features_of_any_shape_are_one_vector_a_row() -> None:
    student, teacher = states(1, 3, 2, 4), states(2, 3, 5, 2, 2)
    torch.testing.assert_close(relations.rkd(student, teacher), relations.rkd(student.flatten(1), teacher.flatten(1)))
    with pytest.raises(ValueError, match="the same rows, not 3 and 2"):
        relations.rkd(student, teacher[:2])
    with pytest.raises(ValueError, match="cc needs features of one width, not 8 and 20"):
        relations.cc(student, teacher)
    with pytest.raises(ValueError, match="dist needs logits of one shape"):
        relations.dist(states(1, 3, 4), states(1, 3, 5))
