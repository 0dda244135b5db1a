"""Relations, which need no equal widths: between the tokens of a row, and between the rows of a batch.

Tokens of a row: minilm, mmd. Rows of a batch: the others, each row's value being its part of the published loss, which
is the mean over rows; a row is compared with all rows of its batch, so rows that should not count are left out before.
Half-precision tensors are computed in float32, float64 stays float64, and the teacher is a constant.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergences
from .attention import log_softmax_over
from .hidden import aligned, inner_products, kept, unit, widened

_PKT_EPSILON = 1e-7  # of the published formula, added to lengths and to probabilities


def minilm(
    student_left: Tensor,
    student_right: Tensor,
    teacher_left: Tensor,
    teacher_right: Tensor,
    mask: Tensor,
    *,
    heads: int,
    causal: bool = False,
    visible: Tensor | None = None,
) -> Tensor:
    """Mean over heads and the row's tokens of KL(teacher's relation || student's relation): [B].

    MiniLMv2 (Wang et al. 2021, arXiv:2012.15828): softmax(L R^T / sqrt(d)) over a row's tokens, of queries with
    queries, keys with keys, values with values, or any two. Features are [B, S, D] or [B, S, H, d]: their width is
    split anew into `heads` relation heads, so student and teacher may differ in it. mask: bool [B, S]. causal: only
    keys up to the query count; visible: bool [B, 1, S, S], only those keys (a window, packed documents). Raises
    ValueError where a width is no multiple of `heads`, or left and right are of different widths.
    """
    mask = mask.bool()
    seen = mask[:, None, :, None] & mask[:, None, None, :]
    if causal:
        seen = seen & torch.ones_like(seen[0, 0]).tril()
    if visible is not None:
        seen = seen & visible
    log_q = _relation(student_left, student_right, mask, seen, heads)
    log_p = _relation(teacher_left.detach(), teacher_right.detach(), mask, seen, heads)
    each = divergences.kl(log_q, log_p)  # [B, heads, S]
    return each.mean(1).sum(-1) / mask.sum(-1).clamp(min=1)


def mmd(student0: Tensor, student1: Tensor, teacher0: Tensor, teacher1: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared gap of h0 h1^T / width, the inner products between the tokens of two layers: [B, S, D] each ->
    [B, S, S]; 0 where a token does not count.

    TextBrewer's mmd (NST's squared maximum mean discrepancy, arXiv:1707.01219, seen token by token), with its divisor
    where it has no mask: with one it divides by the padded length, which makes padding enter.
    """
    products = []
    for left, right in ((student0, student1), (teacher0.detach(), teacher1.detach())):
        left, right = widened(left), widened(right)
        if mask is not None:
            left, right = kept(left, mask), kept(right, mask)
        products.append(inner_products(left, right) / left.shape[-1])
    return (products[0] - products[1]).square()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all j of huber(d_student(i, j) - d_teacher(i, j)): [B, …], [B, …] -> [B].

    Relational distillation (Park et al. 2019, arXiv:1904.05068): d is the distance over the batch's mean of all that
    are above 0; huber with delta 1. Distances come from differences, not from e^2 + e^2 - 2ee.
    """
    student, teacher = _features(student, teacher)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none").mean(-1)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all j, k of huber(cos_student - cos_teacher), cos between e_j - e_i and e_k - e_i: [B, …] -> [B].

    Park et al. 2019. Triples that are no angle (i = j, i = k: 0; j = k: 1) stay in the mean. Memory B^2 D + B^3.
    """
    cosines = []
    for embedding in _features(student, teacher):
        directions = unit(embedding.unsqueeze(0) - embedding.unsqueeze(1))  # [i, j, D]
        cosines.append(inner_products(directions, directions))
    return F.smooth_l1_loss(cosines[0], cosines[1], reduction="none").mean((1, 2))


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """distance * rkd_distance + angle * rkd_angle, RepDistiller's weights: [B, …], [B, …] -> [B]."""
    return distance * rkd_distance(student, teacher) + angle * rkd_angle(student, teacher)


def hard_dark_rank(
    student: Tensor, teacher: Tensor, *, alpha: float = 3.0, beta: float = 3.0, neighbours: int = 4
) -> Tensor:
    """-log of the probability that the student ranks the teacher's nearest rows as the teacher does: [B, …] -> [B].

    DarkRank (Chen et al. 2018, arXiv:1707.01220) as RKD's code has it: scores -alpha d^beta, Plackett-Luce over the
    `neighbours` nearest rows (fewer in a smaller batch).
    """
    student, teacher = _features(student, teacher)
    itself = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
    nearest = _distances(teacher).masked_fill(itself, -1.0).argsort(-1)[:, 1 : neighbours + 1]  # [B, neighbours]
    scores = (-alpha * _distances(student).pow(beta)).gather(1, nearest)
    left = [scores[:, rank:].logsumexp(-1) for rank in range(nearest.shape[1])]
    return torch.stack(left, -1).sum(-1) - scores.sum(-1) if left else scores.sum(-1)


def similarity(student: Tensor, teacher: Tensor, *, norm: float = 2.0) -> Tensor:
    """Sum over j of (G_student - G_teacher)^2 / B, G = f f^T with rows of length 1: [B, …], [B, …] -> [B].

    Similarity preserving (Tung and Mori 2019, arXiv:1907.09682). norm: 2 as published and in RepDistiller; 1, rows
    over their sum of absolutes, is what torchdistill computes.
    """
    student, teacher = (unit(inner_products(f, f), norm) for f in _features(student, teacher))
    return (student - teacher).square().mean(-1)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over j of q_teacher log((q_teacher + e) / (q_student + e)), e = 1e-7: [B, …], [B, …] -> [B].

    Probabilistic knowledge transfer (Passalis and Tefas 2018, arXiv:1803.10837): q is (1 + cos) / 2 over the row's
    sum, itself included.
    """
    affinities = []
    for features in _features(student, teacher):
        directions = unit(features, epsilon=_PKT_EPSILON)
        alike = (1.0 + inner_products(directions, directions)) / 2.0
        affinities.append(alike / alike.sum(-1, keepdim=True))
    q, p = affinities
    return (p * ((p + _PKT_EPSILON) / (q + _PKT_EPSILON)).log()).mean(-1)


def cc(student: Tensor, teacher: Tensor) -> Tensor:
    """B / (B - 1) * sum over features of |gap_i| |gap_(i+1)|, gap = f_student - f_teacher: [B, …], [B, …] -> [B].

    RepDistiller's reading of correlation congruence (Peng et al. 2019, arXiv:1904.01802): only neighbours in the batch
    meet, so it depends on their order. The last row has none: 0. Raises ValueError where widths differ.
    """
    student, teacher = _features(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"cc needs features of one width, not {student.shape[1]} and {teacher.shape[1]}")
    gap = (student - teacher).abs()
    rows = (gap[:-1] * gap[1:]).sum(-1) * (len(gap) / max(len(gap) - 1, 1))
    return F.pad(rows, (0, 1))


def dist(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """T^2 (beta (1 - r over the row's classes) + gamma (1 - mean over classes of r over the batch)): [B, C] -> [B].

    DIST (Huang et al. 2022, arXiv:2205.10536): r is Pearson's correlation of the two softmax(z / T). The second part
    is the batch's and the same for each of its rows. Raises ValueError where the classes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"dist needs logits of one shape, not {[*student_logits.shape]} and {[*teacher_logits.shape]}")
    q, p = ((logits / temperature).softmax(-1) for logits in aligned(student_logits, teacher_logits))
    rows, classes = _correlations(q, p), _correlations(q.mT, p.mT)
    return temperature**2 * (beta * (1.0 - rows) + gamma * (1.0 - classes.mean()))


def _correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, over the last axis; 0 where one is constant."""
    one, other = (unit(each - each.mean(-1, keepdim=True)) for each in (one, other))
    return (one * other).sum(-1)


def _relation(left: Tensor, right: Tensor, mask: Tensor, visible: Tensor, heads: int) -> Tensor:
    """Log-probabilities [B, heads, S, S]."""
    left, right = left.flatten(2), right.flatten(2)
    width = left.shape[-1]
    if right.shape[-1] != width:
        raise ValueError(f"a relation needs features of one width, not {width} and {right.shape[-1]}")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} relation heads must divide the width {width}")
    parts = [kept(widened(each), mask).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (left, right)]
    return log_softmax_over(inner_products(*parts) / math.sqrt(width // heads), visible)


def _features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[B, …], [B, …] -> [B, Fs], [B, Ft] in one dtype."""
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must have the same rows, not {len(student)} and {len(teacher)}")
    student, teacher = aligned(student, teacher)
    return student.flatten(1), teacher.flatten(1)


def _distances(features: Tensor) -> Tensor:
    """[B, F] -> [B, B]; 0 for equal rows, and no gradient there."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def _relative_distances(features: Tensor) -> Tensor:
    distances = _distances(features)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)
