"""Truncated targets against dense float64 formulas, sums written out here, and chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predistill.store.errors import ConfigError
from predistill.student_train.losses import terms
from predistill.student_train.losses.catalogue import SINGLE_LABEL
from predistill.student_train.losses.rows import LOGIT_FUNCTIONS
from predistill.student_train.losses.sparse import SparseTargets, sample_targets, sparse_loss, top_k_targets
from predistill.student_train.losses.terms import Term, parse_loss

N, V, K = 6, 11, 4
LOSSES = ["kl", "reverse_kl", "jsd:beta=0.3", "total_variation", "soft_cross_entropy"]
TAILS = ["bucket", "renormalize", "ignore"]
NONE = -65504.0  # what stores pad logits with


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def top_k(teacher: torch.Tensor, k: int, temperature: float = 1.0, exact: bool = True) -> SparseTargets:
    """What a store with k of these logits [N, V] gives."""
    relative = teacher - teacher.amax(-1, keepdim=True)
    logits, indices = relative.topk(k)
    at = (relative / temperature).logsumexp(-1) if exact else None
    return top_k_targets(
        logits, relative.logsumexp(-1), indices, temperature=temperature, logsumexp_at=at, vocabulary=teacher.shape[-1]
    )


def term_of(loss: str, tail: str = "bucket", temperature: float | None = None) -> Term:
    term = parse_loss(f"{loss}{',' if ':' in loss else ':'}tail={tail}")
    return Term("logits", term.loss, temperature=temperature, options=term.options)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), student)[0]


# --- against dense formulas ---


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_with_every_id_kept_it_is_the_dense_loss(loss: str, temperature: float, tail: str) -> None:
    student, teacher = random_logits(N, V, seed=1).requires_grad_(), random_logits(N, V, seed=2)
    options = {"beta": 0.3} if loss.startswith("jsd") else {}
    dense = LOGIT_FUNCTIONS[SINGLE_LABEL][loss.partition(":")[0]](student, teacher, temperature=temperature, **options)
    targets = top_k(teacher, V, temperature)
    assert targets.tail_logprob.tolist() == [-math.inf] * N
    sparse = sparse_loss(term_of(loss, tail), student, targets, temperature=temperature)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(sparse, student), gradient(dense, student), rtol=1e-12, atol=1e-12)
    single = top_k(teacher.float(), V, temperature)
    half = sparse_loss(term_of(loss, tail), student.float(), single, temperature=temperature)
    torch.testing.assert_close(half.double(), dense, rtol=1e-6, atol=1e-6)


def softmax(z: list[float], temperature: float) -> list[float]:
    total = sum(math.exp(v / temperature) for v in z)
    return [math.exp(v / temperature) / total for v in z]


def divergence(loss: str, p: list[float], q: list[float]) -> float:
    """Sum over classes; a p of 0 stands 100 nats below 1 where its logarithm is taken."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * (math.log(x) - (math.log(y) if y else -100.0)) for x, y in zip(a, b, strict=True) if x)

    m = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
    return {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd:beta=0.3": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        "total_variation": 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)),
        "soft_cross_entropy": -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
    }[loss]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_value_is_the_formula_over_kept_ids_and_the_rest(loss: str, temperature: float, tail: str) -> None:
    student, teacher = random_logits(N, V, seed=3), random_logits(N, V, seed=4)
    values = sparse_loss(term_of(loss, tail, temperature), student, top_k(teacher, K, temperature))
    for row, value in enumerate(values.tolist()):
        p, q = (softmax(z[row].tolist(), temperature) for z in (teacher, student))
        kept = sorted(range(V), key=p.__getitem__, reverse=True)[:K]
        rest = [sum(d[i] for i in range(V) if i not in kept) for d in (p, q)]
        p, q = [p[i] for i in kept], [q[i] for i in kept]
        if tail == "bucket":
            p, q = [*p, rest[0]], [*q, rest[1]]
        elif tail == "renormalize":
            p, q = [*(a / sum(p) for a in p), 0.0], [*q, rest[1]]
        assert value == pytest.approx(temperature**2 * divergence(loss, p, q), rel=1e-11)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(loss: str, tail: str) -> None:
    student, targets = random_logits(3, V, seed=5).requires_grad_(), top_k(random_logits(3, V, seed=6), K, 1.7)
    assert torch.autograd.gradcheck(lambda z: sparse_loss(term_of(loss, tail, 1.7), z, targets), (student,))


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"total_variation"}))  # which has a corner there
def test_a_student_that_is_the_teacher_has_nothing_to_learn(loss: str) -> None:
    student = random_logits(N, V, seed=7).requires_grad_()
    value = sparse_loss(term_of(loss, temperature=2.0), student, top_k(student.detach(), K, 2.0))
    assert gradient(value, student).abs().max() < 1e-12
    assert loss == "soft_cross_entropy" or value.abs().max() < 1e-12


# --- padding, other vocabularies ---


@pytest.mark.parametrize("loss", LOSSES)
def test_padded_entries_and_order_change_nothing(loss: str) -> None:
    """Padding has index 0, which may be another kept id or one of the rest."""
    student, targets = random_logits(N, V, seed=8).requires_grad_(), top_k(random_logits(N, V, seed=9), K)
    plain = sparse_loss(term_of(loss), student, targets)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    padded = SparseTargets(
        torch.cat([torch.zeros(N, 2, dtype=torch.int64), targets.indices], -1)[:, order],
        torch.cat([torch.full((N, 2), NONE, dtype=torch.float64), targets.logprobs], -1)[:, order],
        targets.tail_logprob,
    )
    same = sparse_loss(term_of(loss), student, padded)
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(same, student), gradient(plain, student), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tail", TAILS)
def test_positions_without_any_entry_are_finite(loss: str, tail: str) -> None:
    student = random_logits(2, V).requires_grad_()
    empty = SparseTargets(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), NONE), torch.full((2,), -math.inf))
    for targets in (empty, SparseTargets(*(each[:, :0] for each in empty[:2]), empty[2])):
        value = sparse_loss(term_of(loss, tail), student, targets)
        assert torch.isfinite(value).all() and torch.isfinite(gradient(value, student)).all()


def test_ids_beyond_the_students_vocabulary_count_with_the_rest() -> None:
    teacher, student = random_logits(N, V, seed=10), random_logits(N, V - 5, seed=11)
    targets = top_k(teacher, K)
    value = sparse_loss(Term("logits"), student, targets)
    for row in range(N):
        p, q = teacher[row].softmax(-1), student[row].softmax(-1)
        kept = [i for i in targets.indices[row].tolist() if i < V - 5]
        pairs = [(p[i], q[i]) for i in kept] + [(1 - p[kept].sum(), 1 - q[kept].sum())]
        assert value[row] == pytest.approx(float(sum(a * math.log(a / b) for a, b in pairs)), rel=1e-10, abs=1e-12)


def test_a_student_with_more_ids_has_them_in_the_rest() -> None:
    teacher, student = random_logits(N, V, seed=12), random_logits(N, V + 3, seed=13)
    closed = torch.cat([teacher, torch.full((N, 3), -math.inf, dtype=torch.float64)], -1)
    value = sparse_loss(Term("logits"), student, top_k(teacher, K))
    torch.testing.assert_close(value, sparse_loss(Term("logits"), student, top_k(closed, K)), rtol=1e-12, atol=1e-12)


def test_a_student_without_other_ids_has_no_rest() -> None:
    """The teacher's one more id has some mass that no id of the student's could take."""
    teacher, student = random_logits(1, 4, seed=14), random_logits(1, 3, seed=15).requires_grad_()
    value = sparse_loss(Term("logits"), student, top_k(teacher, 4))
    p, log_q = teacher[0].softmax(-1), student[0].log_softmax(-1)
    assert value.item() == pytest.approx((p[:3] * (p[:3].log() - log_q)).sum().item(), rel=1e-11)
    assert torch.isfinite(gradient(value, student)).all()


# --- precision and extremes ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, targets = random_logits(N, V).to(dtype).requires_grad_(), top_k(random_logits(N, V, seed=1).float(), K)
    value = sparse_loss(Term("logits"), student, targets)
    assert value.dtype == torch.float32
    assert torch.equal(value, sparse_loss(Term("logits"), student.float(), targets))


finite = st.floats(-1e4, 1e4, width=16)


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(finite, finite), min_size=3, max_size=7),
    choice=st.tuples(st.sampled_from(LOSSES), st.sampled_from(TAILS), st.sampled_from([0.5, 1.0, 8.0])),
)
def test_extremes_stay_finite_and_agree_with_float64(rows: list, choice: tuple) -> None:
    loss, tail, temperature = choice
    student, teacher = (torch.tensor([z]) for z in zip(*rows, strict=True))
    term, student = term_of(loss, tail, temperature), student.requires_grad_()
    targets = top_k(teacher.double(), 2, temperature)
    value = sparse_loss(term, student, SparseTargets(targets[0], targets[1].float(), targets[2].float()))
    assert torch.isfinite(value).all() and torch.isfinite(gradient(value, student)).all()
    wide = sparse_loss(term, student.detach().double(), targets)
    largest = max(abs(v) for row in rows for v in row)
    shares = 2.0**-22 * largest**2  # the student's log q is rounded as its logits are, and weighs log-ratios as large
    size = 1.0 + largest * temperature
    torch.testing.assert_close(value.detach().double(), wide, rtol=1e-5, atol=1e-5 * size + shares)


# --- targets ---


def test_the_stored_log_sum_exp_makes_another_temperature_exact() -> None:
    teacher = random_logits(N, V, seed=16)
    targets, p = top_k(teacher, K, 3.0), (teacher / 3).log_softmax(-1)
    torch.testing.assert_close(targets.logprobs, p.gather(-1, targets.indices))
    torch.testing.assert_close(targets.tail_logprob, (1 - p.gather(-1, targets.indices).exp().sum(-1)).log())


@pytest.mark.parametrize("temperature", [0.7, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.6, 6.0])
def test_a_power_laws_tail_is_found_at_any_temperature(exponent: float, temperature: float) -> None:
    logits = -exponent * torch.arange(1, 2001, dtype=torch.float64).log().unsqueeze(0)
    estimated, exact = top_k(logits, 20, temperature, exact=False), top_k(logits, 20, temperature)
    torch.testing.assert_close(estimated.tail_logprob.exp(), exact.tail_logprob.exp(), rtol=5e-3, atol=1e-9)
    torch.testing.assert_close(estimated.logprobs, exact.logprobs, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0, 300.0])
def test_the_estimated_tail_lies_between_all_alike_and_as_few_as_can_be(scale: float) -> None:
    teacher = random_logits(50, 400, scale=scale)
    p = teacher.softmax(-1).sort(-1, descending=True).values
    left = torch.minimum(p[:, 16:].sum(-1).clamp(min=2.3e-16), 384 * p[:, 15])  # what float64 knows of it
    alike, few = (384 * left).sqrt(), left / p[:, 15].sqrt()  # sums of p^(1/2) over the others
    targets = top_k(teacher, 16, 2.0, exact=False)
    estimate = (targets.tail_logprob - targets.logprobs[:, 0]).exp() * p[:, 0].sqrt()
    assert (estimate <= alike * 1.01).all() and (estimate >= few * 0.9).all()
    for each in (targets, top_k(teacher.float(), 16, 2.0, exact=False)):
        masses = torch.cat([each.logprobs, each.tail_logprob.unsqueeze(-1)], -1).exp().sum(-1)
        torch.testing.assert_close(masses, torch.ones_like(masses))


def test_it_is_nearer_the_truth_than_equal_or_lumped_tails_where_several_power_laws_mix() -> None:
    rank, temperature = torch.arange(1, 4001, dtype=torch.float64), 2.0
    laws = torch.stack([rank**-exponent for exponent in (0.7, 1.1, 2.0, 4.0)])
    p = (laws / laws.sum(-1, keepdim=True)).mean(0)
    exact, found = (
        top_k(p.log().unsqueeze(0), 32, temperature, exact=which).tail_logprob[0] for which in (True, False)
    )
    kept, left = p[:32].sqrt().sum(), p[32:].sum()
    for sum_of_roots in ((3968 * left).sqrt(), left.sqrt()):
        assert abs(found - exact) < 0.3 * abs((sum_of_roots / (sum_of_roots + kept)).log() - exact)


def test_padding_of_stored_rows_is_no_entry() -> None:
    teacher = random_logits(N, V, seed=17)
    targets = top_k(teacher, 2, 2.0, exact=False)
    relative = teacher - teacher.amax(-1, keepdim=True)
    logits, indices = relative.topk(2)
    padded = top_k_targets(
        torch.nn.functional.pad(logits, (0, 3), value=NONE), relative.logsumexp(-1),
        torch.nn.functional.pad(indices, (0, 3)).int(), temperature=2.0, vocabulary=V,
    )  # fmt: skip
    assert padded.indices.dtype == torch.int64
    torch.testing.assert_close(padded.logprobs[:, :2], targets.logprobs)
    assert torch.isneginf(padded.logprobs[:, 2:]).all()
    torch.testing.assert_close(padded.tail_logprob, targets.tail_logprob)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("filler", [0.0, NONE])
def test_positions_that_hold_no_teacher_stay_finite(filler: float, temperature: float) -> None:
    """Readers fill what was not stored; a mask leaves these positions out, but not their NaN."""
    targets = top_k_targets(
        torch.full((2, 3), filler), torch.zeros(2), torch.zeros(2, 3, dtype=torch.int32),
        temperature=temperature, vocabulary=V,
    )  # fmt: skip
    student = random_logits(2, V).requires_grad_()
    for loss in LOSSES:
        value = sparse_loss(term_of(loss, temperature=temperature), student, targets)
        assert not torch.isnan(value).any() and torch.isfinite(gradient(value, student)).all()


# --- samples ---


def draws_of(p: torch.Tensor, draws: int, times: int, seed: int) -> torch.Tensor:
    """Counts [times, V] of independent draws."""
    found = torch.multinomial(p, draws * times, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(found.view(times, draws), len(p)).sum(1)


def distinct(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, counts) of those drawn, padded with 0, from counts [times, V]."""
    sizes = (counts > 0).sum(-1).amax()
    ordered, ids = counts.sort(dim=-1, descending=True, stable=True)
    return torch.where(ordered > 0, ids, 0)[:, :sizes], ordered[:, :sizes]


@pytest.mark.parametrize("proposal_temperature", [1.0, 1.5])
@pytest.mark.parametrize("loss", ["kl", "soft_cross_entropy"])
def test_the_gradient_from_samples_is_right_on_average(loss: str, proposal_temperature: float) -> None:
    teacher, times, draws = random_logits(V, seed=18), 20_000, 6
    p, proposal = teacher.softmax(-1), (teacher / proposal_temperature).softmax(-1)
    ids, counts = distinct(draws_of(proposal, draws, times, seed=19))
    ratios = None if proposal_temperature == 1 else (p / proposal)[ids]
    student = random_logits(V, seed=20).expand(times, V).clone().requires_grad_()
    value = sparse_loss(term_of(loss), student, sample_targets(ids, counts, draws, ratios))
    slopes, exact = gradient(value, student), student[0].detach().softmax(-1) - p
    error = (slopes.mean(0) - exact).abs() / (slopes.std(0) / math.sqrt(times)).clamp(min=1e-9)
    assert error.max() < 4.5  # standard errors, 11 of them
    assert (slopes[0] - exact).abs().max() > 0.02  # one draw alone is far off


def test_weights_of_samples() -> None:
    targets = sample_targets(
        torch.tensor([[3, 1, 0]], dtype=torch.int32), torch.tensor([[3, 1, 0]], dtype=torch.uint8), 4,
        torch.tensor([[0.5, 2.0, 0.0]], dtype=torch.float16),
    )  # fmt: skip
    assert targets.indices.dtype == torch.int64 and torch.isneginf(targets.tail_logprob).all()
    torch.testing.assert_close(targets.logprobs.exp(), torch.tensor([[0.375, 0.5, 0.0]]))


# --- what is refused ---


def test_losses_that_need_every_logit_are_refused() -> None:
    student, targets = random_logits(N, V), top_k(random_logits(N, V), K)
    for loss in ("mse", "dkd", "nlp_architect_mse"):
        with pytest.raises(ConfigError, match=f"loss {loss} needs every logit .* choose from kl, reverse_kl, jsd"):
            sparse_loss(Term("logits", loss), student, targets)
    with pytest.raises(ConfigError, match="standardize needs every logit"):
        sparse_loss(parse_loss("kl:standardize"), student, targets)


def test_tail_is_an_option_of_losses_that_can_be_truncated() -> None:
    assert parse_loss("jsd:beta=0.1,tail=Ignore").options == {"beta": 0.1, "standardize": False, "tail": "ignore"}
    assert parse_loss("kl:tail=bucket") == Term("logits", "kl")
    with pytest.raises(ConfigError, match="no kl tail 'drop'; choose from bucket, renormalize, ignore"):
        parse_loss("kl:tail=drop")
    with pytest.raises(ConfigError, match="dkd has no option 'tail'"):
        parse_loss("dkd:tail=ignore")
    with pytest.raises(ConfigError, match="tail=ignore is for truncated logits; these are whole"):
        terms.check_term(parse_loss("kl:tail=ignore"), SINGLE_LABEL, 3)
