"""The logits terms against formulas written out here, at extremes, and for what a row may depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predistill.student_train import losses
from predistill.student_train.losses.catalogue import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from predistill.student_train.losses.rows import LOGIT_FUNCTIONS, row_loss
from predistill.student_train.losses.terms import Term

Pair = tuple[torch.Tensor, torch.Tensor]

ROWS, CLASSES = 5, 4
SINGLE, MULTI = LOGIT_FUNCTIONS[SINGLE_LABEL], LOGIT_FUNCTIONS[MULTI_LABEL]
ALL = [(head, name) for head in PROBLEM_TYPES for name in LOGIT_FUNCTIONS[head]]
EVERY = [(head, name) for head, name in ALL if head != REGRESSION]


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), student)[0]


@pytest.fixture
def pair() -> Pair:
    return random_logits(ROWS, CLASSES, seed=1), random_logits(ROWS, CLASSES, seed=2)


# --- dense formulas, one probability at a time ---


def softmax(z: list[float], T: float) -> list[float]:
    total = sum(math.exp(v / T) for v in z)
    return [math.exp(v / T) / total for v in z]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p: list[float], q: list[float], beta: float) -> list[float]:
    return [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]


DENSE = {
    "kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.5 * kl(p, mixed(p, q, 0.5)) + 0.5 * kl(q, mixed(p, q, 0.5)),
    "total_variation": lambda p, q: 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
    "soft_cross_entropy": lambda p, q: -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DENSE)
def test_value_is_the_dense_formula(name: str, temperature: float, pair: Pair) -> None:
    student, teacher = pair
    for row, value in enumerate(SINGLE[name](student, teacher, temperature=temperature).tolist()):
        p, q = (softmax(z[row].tolist(), temperature) for z in (teacher, student))
        assert value == pytest.approx(temperature**2 * DENSE[name](p, q), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DENSE)
def test_multi_label_value_is_the_mean_of_bernoullis(name: str, temperature: float, pair: Pair) -> None:
    student, teacher = pair
    for row, value in enumerate(MULTI[name](student, teacher, temperature=temperature).tolist()):
        each = []
        for zs, zt in zip(student[row].tolist(), teacher[row].tolist(), strict=True):
            p, q = (1 / (1 + math.exp(-z / temperature)) for z in (zt, zs))
            each.append(DENSE[name]([p, 1 - p], [q, 1 - q]))
        assert value == pytest.approx(temperature**2 * sum(each) / CLASSES, rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_mixes_as_trl_does(beta: float, pair: Pair) -> None:
    student, teacher = pair
    for row, value in enumerate(losses.generalized_jsd(student, teacher, beta=beta).tolist()):
        p, q = softmax(teacher[row].tolist(), 1), softmax(student[row].tolist(), 1)
        m = mixed(p, q, beta)
        assert value == pytest.approx(beta * kl(p, m) + (1 - beta) * kl(q, m), rel=1e-12)


def test_jsd_ends_are_the_two_kls_and_not_its_limits(pair: Pair) -> None:
    assert torch.equal(losses.generalized_jsd(*pair, beta=0.0), losses.kl_divergence(*pair))
    assert torch.equal(losses.generalized_jsd(*pair, beta=1.0), losses.reverse_kl_divergence(*pair))
    assert losses.generalized_jsd(*pair, beta=1e-9).max() < 1e-6
    with pytest.raises(ValueError, match="beta must be between 0"):
        losses.generalized_jsd(*pair, beta=1.5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dkd_is_two_kls(temperature: float, pair: Pair) -> None:
    student, teacher = pair
    labels = torch.tensor([0, 3, 2, 1, 3])
    values = losses.dkd(student, teacher, labels, temperature=temperature, alpha=0.7, beta=3.0)
    for row, (value, target) in enumerate(zip(values.tolist(), labels.tolist(), strict=True)):
        p, q = (softmax(z[row].tolist(), temperature) for z in (teacher, student))
        target_part = kl([p[target], 1 - p[target]], [q[target], 1 - q[target]])
        others = [[v / (1 - d[target]) for c, v in enumerate(d) if c != target] for d in (p, q)]
        assert value == pytest.approx(temperature**2 * (0.7 * target_part + 3.0 * kl(*others)), rel=1e-11)


def test_dkd_with_the_teachers_weight_is_kl(pair: Pair) -> None:
    """KL = target part + (1 - p_target) others' part: the paper's own identity."""
    labels = torch.tensor([0, 3, 2, 1, 3])
    parts = [losses.dkd(*pair, labels, alpha=a, beta=b) for a, b in ((1.0, 0.0), (0.0, 1.0))]
    rest = 1 - pair[1].softmax(-1).gather(-1, labels[:, None])[:, 0]
    whole = losses.kl_divergence(*pair)
    torch.testing.assert_close(parts[0] + rest * parts[1], whole, rtol=1e-12, atol=1e-12)


def test_dkd_without_a_label_takes_the_teachers_prediction(pair: Pair) -> None:
    predicted = pair[1].argmax(-1)
    expected = losses.dkd(*pair, predicted)
    assert torch.equal(losses.dkd(*pair), expected)
    assert torch.equal(losses.dkd(*pair, torch.where(torch.arange(ROWS) < 2, -100, predicted)), expected)


def test_dkd_is_stable_where_the_original_is_not() -> None:
    student = torch.tensor([[500.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[-400.0, 2.0, 1.0]])
    loss = losses.dkd(student, teacher, torch.tensor([0]), alpha=1.0, beta=1.0)
    wide = losses.dkd(student.detach().double(), teacher.double(), torch.tensor([0]), alpha=1.0, beta=1.0)
    torch.testing.assert_close(loss.detach().double(), wide, rtol=1e-6, atol=0)
    slope = gradient(loss, student)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0.9


def test_dkd_keeps_its_digits_among_the_others_of_a_far_target() -> None:
    """2052 nats behind the target float32 log-probabilities hold 1e-4, and less 1000 is not excluded."""
    student, teacher = torch.tensor([[0.0, 0.0, 605.0]]), torch.tensor([[-4104.0, 0.0, -4104.0]])
    others = 0.5 * (math.log(0.5) - (-605 / 2)) + 0.5 * (math.log(0.5) - 0.0)
    loss = losses.dkd(student, teacher, temperature=2.0, alpha=0.0, beta=1.0)
    assert loss.item() == pytest.approx(4 * others, rel=1e-6)


def test_mse_and_nlp_architect_mse(pair: Pair) -> None:
    student, teacher = pair
    for row, value in enumerate(losses.mse(student, teacher, temperature=7.0).tolist()):
        gaps = [a - b for a, b in zip(student[row].tolist(), teacher[row].tolist(), strict=True)]
        assert value == pytest.approx(sum(gap**2 for gap in gaps) / CLASSES, rel=1e-12)
    for row, value in enumerate(losses.nlp_architect_mse(student, teacher, temperature=2.0).tolist()):
        p, q = (softmax(z[row].tolist(), 2.0) for z in (teacher, student))
        expected = 4 * sum((math.log(b) - a) ** 2 for a, b in zip(p, q, strict=True)) / CLASSES
        assert value == pytest.approx(expected, rel=1e-12)


def test_standardized_logits_have_mean_0_and_deviation_1() -> None:
    z = losses.standardize_logits(random_logits(6, 9, scale=30.0))
    torch.testing.assert_close(z.mean(-1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.std(-1), torch.ones(6, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("z", [[[3.0]], [[2.0, 2.0, 2.0]], [[1.0, -math.inf, 5.0]], [[-math.inf, 4.0]]])
def test_standardize_survives_rows_without_spread(z: list) -> None:
    logits = torch.tensor(z, requires_grad=True)
    out = losses.standardize_logits(logits)
    kept = torch.isfinite(logits)
    assert torch.equal(torch.isfinite(out), kept) and not torch.isnan(out).any()
    uneven = torch.arange(1, out[kept].numel() + 1)
    assert torch.isfinite(gradient(out[kept] * uneven, logits)).all()


# --- gradients ---


@pytest.mark.parametrize("head,name", ALL)
def test_gradient(head: str, name: str) -> None:
    student = random_logits(3, CLASSES, seed=3).requires_grad_()
    teacher = random_logits(3, CLASSES, seed=4)
    teacher[0, 2] = -math.inf if head == SINGLE_LABEL else -40.0
    function = LOGIT_FUNCTIONS[head][name]
    assert torch.autograd.gradcheck(lambda z: function(z, teacher, temperature=1.7), (student,))


@pytest.mark.parametrize("name", SINGLE)
def test_gradient_through_standardized_logits(name: str) -> None:
    student = random_logits(3, CLASSES, seed=5).requires_grad_()
    term = Term("logits", name, options={"standardize": True})
    teacher = random_logits(3, CLASSES, seed=6)
    assert torch.autograd.gradcheck(lambda z: row_loss(term, z, teacher)[0], (student,))


@pytest.mark.parametrize("head,name", ALL)
def test_no_gradient_reaches_the_teacher(head: str, name: str, pair: Pair) -> None:
    student, teacher = (z.requires_grad_() for z in pair)
    LOGIT_FUNCTIONS[head][name](student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("name", [*DENSE, "mse", "dkd"])
def test_equal_logits_have_no_gradient(name: str, pair: Pair) -> None:
    student = pair[0].clone().requires_grad_()
    value = SINGLE[name](student, pair[0], temperature=2.0)
    if name != "soft_cross_entropy":
        assert value.abs().max() < 1e-12
    assert gradient(value, student).abs().max() < 1e-12


def test_temperature_squared_keeps_the_gradients_size() -> None:
    sizes = []
    for temperature in (20.0, 200.0):
        student, teacher = random_logits(ROWS, CLASSES, seed=1).requires_grad_(), random_logits(ROWS, CLASSES)
        loss = losses.kl_divergence(student, teacher, temperature=temperature)
        sizes.append(gradient(loss, student).abs().max().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


# --- extremes ---

finite = st.floats(-1e4, 1e4, width=16)


@st.composite
def extreme_rows(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    """Student and teacher logits, 1 to 4 rows of 1 to 5 classes; some of the teacher's may be -inf."""
    classes = draw(st.integers(1, 5))
    student = draw(st.lists(st.lists(finite, min_size=classes, max_size=classes), min_size=1, max_size=4))
    teacher = [[draw(st.one_of(finite, st.just(-math.inf))) for _ in range(classes)] for _ in student]
    for row in teacher:
        row[draw(st.integers(0, classes - 1))] = draw(finite)
    return student, teacher


@settings(max_examples=200)
@given(rows=extreme_rows(), choice=st.sampled_from(EVERY), temperature=st.sampled_from([0.5, 1.0, 8.0]))
def test_extremes_stay_finite_and_agree_with_float64(rows: tuple, choice: tuple, temperature: float) -> None:
    function = LOGIT_FUNCTIONS[choice[0]][choice[1]]
    student = torch.tensor(rows[0], dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor(rows[1], dtype=torch.float32)
    loss = function(student, teacher, temperature=temperature)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient(loss, student)).all()
    wide = function(student.detach().double(), teacher.double(), temperature=temperature)
    size = 1.0 + max(abs(v) for row in rows[0] + rows[1] for v in row if math.isfinite(v)) * temperature
    torch.testing.assert_close(loss.detach().double(), wide, rtol=1e-5, atol=1e-5 * size)


@settings(max_examples=60)
@given(rows=extreme_rows(), name=st.sampled_from(sorted(SINGLE)))
def test_standardized_extremes_stay_finite(rows: tuple, name: str) -> None:
    student = torch.tensor(rows[0], dtype=torch.float32, requires_grad=True)
    term = Term("logits", name, options={"standardize": True})
    loss, valid = row_loss(term, student, torch.tensor(rows[1], dtype=torch.float32), temperature=2.0)
    assert valid.all() and torch.isfinite(loss).all() and torch.isfinite(gradient(loss, student)).all()


@pytest.mark.parametrize("name", SINGLE)
def test_one_class_teaches_nothing_but_mse(name: str) -> None:
    student = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    loss = SINGLE[name](student, torch.tensor([[1.0], [1.0]]))
    expected = {"mse": [4.0, 9.0], "nlp_architect_mse": [1.0, 1.0]}.get(name, [0.0, 0.0])
    assert loss.tolist() == expected and torch.isfinite(gradient(loss, student)).all()


@pytest.mark.parametrize("name", sorted(set(SINGLE) - {"nlp_architect_mse"}))
def test_a_class_impossible_to_both_changes_nothing(name: str, pair: Pair) -> None:
    """-inf appended on both sides. (nlp_architect_mse squares the student's log-probability: infinite.)"""
    student, teacher = pair[0].clone().requires_grad_(), pair[1]
    closed = torch.full((ROWS, 1), -math.inf, dtype=torch.float64)
    expected = SINGLE[name](student, teacher)
    loss = SINGLE[name](torch.cat([student, closed], -1), torch.cat([teacher, closed], -1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(gradient(loss, student)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head,name", EVERY)
def test_half_precision_is_computed_in_float32(head: str, name: str, dtype: torch.dtype, pair: Pair) -> None:
    student, teacher = (z.to(dtype) for z in pair)
    student.requires_grad_()
    function = LOGIT_FUNCTIONS[head][name]
    loss = function(student, teacher, temperature=2.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, function(student.float(), teacher.float(), temperature=2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(student, teacher, temperature=2.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss)
    slope = gradient(loss, student)
    assert slope.dtype == dtype and torch.isfinite(slope).all()


# --- what a row may depend on ---


@pytest.mark.parametrize("head,name", EVERY)
def test_a_row_depends_on_itself_alone(head: str, name: str) -> None:
    student, teacher = random_logits(6, CLASSES, seed=7), random_logits(6, CLASSES, seed=8)
    function, order = LOGIT_FUNCTIONS[head][name], torch.tensor([4, 0, 5, 2, 1, 3])
    rows = function(student, teacher, temperature=2.0)
    assert rows.shape == (6,)
    torch.testing.assert_close(function(student[order], teacher[order], temperature=2.0), rows[order])
    torch.testing.assert_close(function(student[2:3], teacher[2:3], temperature=2.0), rows[2:3])
    tokens = function(student.view(2, 3, CLASSES), teacher.view(2, 3, CLASSES), temperature=2.0)
    torch.testing.assert_close(tokens, rows.view(2, 3))
    classes = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(function(student[:, classes], teacher[:, classes], temperature=2.0), rows)


@pytest.mark.parametrize("head,name", EVERY)
def test_a_temperature_for_each_row(head: str, name: str, pair: Pair) -> None:
    function, temperatures = LOGIT_FUNCTIONS[head][name], [1.0, 2.0, 3.0, 4.0, 5.0]
    rows = function(*pair, temperature=torch.tensor(temperatures))
    alone = [function(pair[0][i], pair[1][i], temperature=t) for i, t in enumerate(temperatures)]
    torch.testing.assert_close(rows, torch.stack(alone))


def test_shapes_that_would_broadcast_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"one shape .* \(5, 4\) and \(1, 4\)"):
        losses.kl_divergence(pair[0], pair[1][:1])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        losses.kl_divergence(*pair, temperature=0.0)
