"""Head and losses in chunks, against whole logits and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from predistill.store.errors import ConfigError
from predistill.student_train.losses.catalogue import SINGLE_LABEL
from predistill.student_train.losses.fused import FusedLoss, TokenTerm, fused_linear_loss
from predistill.student_train.losses.rows import LOGIT_FUNCTIONS
from predistill.student_train.losses.sparse import SparseTargets, sparse_loss, top_k_targets
from predistill.student_train.losses.terms import Term, parse_loss

N, V, D, K = 23, 40, 8, 5
CHUNK = 7 * V * 4  # bytes: four chunks of six in float32, six of four or fewer in float64
LOSSES = ["kl", "reverse_kl", "jsd:beta=0.3", "total_variation", "soft_cross_entropy"]
LABELS = Term("labels")


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype)


def head(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, D], weight [V, D], bias [V], which want gradients."""
    shapes = ((N, D), (V, D), (V,))
    found = tuple(random(*shape, seed=at, dtype=dtype).requires_grad_() for at, shape in enumerate(shapes))
    return found[0], found[1], found[2]


def slope_of(given: torch.Tensor) -> torch.Tensor:
    assert given.grad is not None
    return given.grad


def labels(seed: int = 0) -> torch.Tensor:
    made = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(N) % 5 == 3, -100, made)


def mask(seed: int = 1) -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) > 0.3


def teacher(
    k: int = K, temperature: float = 1.0, seed: int = 9, vocabulary: int = V, scale: float = 2.0
) -> SparseTargets:
    logits = random(N, vocabulary, seed=seed, scale=scale)
    logits = logits - logits.amax(-1, keepdim=True)
    kept, indices = logits.topk(k)
    at = (logits / temperature).logsumexp(-1)
    return top_k_targets(
        kept, logits.logsumexp(-1), indices, temperature=temperature, logsumexp_at=at, vocabulary=vocabulary
    )


def whole(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    terms: Sequence[TokenTerm],
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(loss, sums, logits [N, V]), all of it at once by autograd."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    sums = []
    for term, _, kept, target in terms:
        each: Any
        if isinstance(target, SparseTargets):
            each = sparse_loss(term, logits, target)
        elif term.name == "labels":
            each = F.cross_entropy(logits, target, reduction="none", ignore_index=-100)
        else:
            options = {name: value for name, value in term.options.items() if name != "standardize"}
            function = LOGIT_FUNCTIONS[SINGLE_LABEL][term.loss]
            each = function(logits, target, temperature=term.temperature or 1.0, **options)
        sums.append((each if kept is None else each[kept]).sum())
    loss = torch.stack([one.coefficient * total for one, total in zip(terms, sums, strict=True)]).sum()
    return loss, sums, logits


def compare(
    terms: Sequence[TokenTerm], dtype: torch.dtype = torch.float64, bound: float = 1e-11, **of_head: Any
) -> FusedLoss:
    """Loss, sums, predictions and gradients, relative to the largest of each."""
    hidden, weight, bias = head(dtype)
    fused = fused_linear_loss(hidden, weight, terms, bias=bias, chunk_bytes=CHUNK, predictions=True, **of_head)
    loss, sums, logits = whole(hidden, weight, terms, bias, **of_head)
    assert fused.predictions is not None and torch.equal(fused.predictions, logits.argmax(-1))
    pairs = [(fused.loss, loss), *zip(fused.sums, sums, strict=True)]
    given = (hidden, weight, bias)
    pairs += zip(torch.autograd.grad(fused.loss, given), torch.autograd.grad(loss, given), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max().clamp(min=1e-3)
    return fused


# --- the same as whole logits ---


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [None, 2.0, 3.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_and_a_truncated_teacher(loss: str, tail: str, temperature: float | None, softcap: float | None) -> None:
    options = {**parse_loss(loss).options, "tail": tail}
    term = Term("logits", loss.partition(":")[0], temperature=temperature, options=options)
    terms = [
        TokenTerm(LABELS, 0.25, None, labels()),
        TokenTerm(term, torch.tensor(0.5), mask(), teacher(temperature=temperature or 1.0)),
    ]
    compare(terms, scale=1.3, softcap=softcap)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_with_every_id_kept_it_is_the_dense_loss_to_a_millionth(loss: str, temperature: float) -> None:
    """float32 against dense float64."""
    term = Term("logits", loss.partition(":")[0], temperature=temperature, options=parse_loss(loss).options)
    logits = random(N, V, seed=9)
    dense = [TokenTerm(LABELS, 0.25, None, labels()), TokenTerm(term, 0.5, None, logits)]
    hidden, weight, _ = ((each.detach() / 2).float().requires_grad_() for each in head())
    sparse = [dense[0], dense[1]._replace(target=teacher(V, temperature, scale=1.0))]
    fused = fused_linear_loss(hidden, weight, sparse, chunk_bytes=CHUNK)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    loss_of, *_ = whole(wide[0], wide[1], dense)
    pairs = zip(torch.autograd.grad(fused.loss, (hidden, weight)), torch.autograd.grad(loss_of, wide), strict=True)
    for ours, theirs in [(fused.loss, loss_of), *pairs]:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize(
    "terms",
    [
        [TokenTerm(LABELS, 0.5, None, labels())],
        [TokenTerm(LABELS, 0.5, mask(), labels())],
        [TokenTerm(parse_loss("kl:temperature=4"), 2.0, None, teacher(temperature=4.0))],
        [TokenTerm(LABELS, 0.5, None, labels()), TokenTerm(LABELS, 0.2, mask(), labels(seed=3))],
        [
            TokenTerm(LABELS, 0.5, mask(), labels()),
            TokenTerm(Term("logits"), 0.2, None, teacher()),
            TokenTerm(parse_loss("reverse_kl:temperature=2"), 0.3, None, teacher(temperature=2.0)),
            TokenTerm(parse_loss("jsd:temperature=4"), 0.1, mask(), teacher(temperature=4.0)),
        ],
        [TokenTerm(Term("logits"), 0.5, None, teacher()), TokenTerm(Term("logits"), 0.5, mask(), teacher(seed=10))],
        [TokenTerm(Term("logits"), 0.5, None, teacher()), TokenTerm(Term("logits"), 0.5, None, teacher(K + 1))],
        [TokenTerm(Term("logits"), 0.5, None, teacher(vocabulary=V + 9)), TokenTerm(LABELS, 0.5, None, labels())],
        [TokenTerm(Term("logits"), 0.5, None, teacher(vocabulary=V - 9)), TokenTerm(LABELS, 0.5, None, labels())],
        [TokenTerm(Term("logits", "mse"), 0.5, mask(), random(N, V)), TokenTerm(LABELS, 0.5, None, labels())],
        [
            TokenTerm(parse_loss("jsd:temperature=2"), 0.5, None, random(N, V)),
            TokenTerm(Term("logits"), 0.5, None, teacher()),
        ],
    ],
    ids=[
        "labels", "masked labels", "teacher alone", "two labels", "temperatures", "two teachers", "two sizes",
        "larger teacher", "smaller teacher", "dense mse", "dense and truncated",
    ],
)  # fmt: skip
def test_other_terms(terms: list[TokenTerm]) -> None:
    compare(terms)
    compare(terms, softcap=3.0)


@pytest.mark.parametrize("rows", [1, 6, 22, 23, 100])
def test_chunks_change_nothing(rows: int) -> None:
    hidden, weight, _ = head()
    terms = [TokenTerm(LABELS, 0.5, None, labels()), TokenTerm(Term("logits"), 0.5, mask(), teacher())]
    found = [fused_linear_loss(hidden, weight, terms, chunk_bytes=8 * V * each) for each in (rows, 23)]
    slopes = [torch.autograd.grad(each.loss, (hidden, weight)) for each in found]
    for ours, theirs in [(found[0].loss, found[1].loss), *zip(*slopes, strict=True)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_tied_weights_get_both_gradients() -> None:
    _, weight, _ = head()
    ids, mixing = torch.arange(N), random(D, D, seed=4)
    terms = [TokenTerm(LABELS, 0.5, None, labels()), TokenTerm(Term("logits"), 0.5, None, teacher())]
    fused = fused_linear_loss(torch.tanh(weight[ids] @ mixing), weight, terms, chunk_bytes=CHUNK).loss
    loss, *_ = whole(torch.tanh(weight[ids] @ mixing), weight, terms)
    slopes = [torch.autograd.grad(each, weight)[0] for each in (fused, loss)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-11, atol=1e-12)


def test_gradients_are_scaled_and_accumulate_as_any() -> None:
    hidden, weight, _ = head()
    terms = [TokenTerm(LABELS, 1e-3, None, labels())]
    for _ in range(2):
        (1000 * fused_linear_loss(hidden, weight, terms, chunk_bytes=CHUNK).loss).backward()
    once = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels(), reduction="sum"), (hidden, weight))
    for ours, theirs in zip((hidden.grad, slope_of(weight)), once, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-11, atol=1e-12)


def test_a_term_of_weight_0_is_reported_and_teaches_nothing() -> None:
    hidden, weight, _ = head()
    fused = fused_linear_loss(hidden, weight, [TokenTerm(LABELS, 0.0, None, labels())])
    assert fused.loss == 0 and fused.sums[0] > 0
    assert torch.autograd.grad(fused.loss, weight)[0].abs().max() == 0


@pytest.mark.parametrize("target", ["labels", "sparse", "dense"])
def test_no_position_at_all_gives_0_with_a_graph(target: str) -> None:
    _, weight, bias = head()
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    targets = {
        "labels": TokenTerm(LABELS, 0.5, None, torch.zeros(0, dtype=torch.int64)),
        "sparse": TokenTerm(Term("logits"), 0.5, None, SparseTargets(*(each[:0] for each in teacher()))),
        "dense": TokenTerm(Term("logits"), 0.5, torch.ones(0, dtype=torch.bool), torch.zeros(0, V)),
    }
    fused = fused_linear_loss(hidden, weight, [targets[target]], bias=bias, predictions=True)
    fused.loss.backward()
    assert fused.loss == 0 and fused.sums.tolist() == [0.0]
    assert fused.predictions is not None and fused.predictions.shape == (0,)
    assert slope_of(hidden).shape == (0, D) and slope_of(weight).abs().max() == 0 and slope_of(bias).abs().max() == 0


def test_positions_without_a_teacher_are_masked_whatever_is_there() -> None:
    targets = teacher()
    junk = SparseTargets(*(each.clone() for each in targets))
    junk.indices[~mask()], junk.logprobs[~mask()], junk.tail_logprob[~mask()] = 0, -math.inf, -math.inf
    for filled in (junk, SparseTargets(junk.indices, junk.logprobs.nan_to_num(neginf=0.0), targets.tail_logprob)):
        fused = compare([TokenTerm(Term("logits", "jsd"), 0.5, mask(), filled)])
        clean = compare([TokenTerm(Term("logits", "jsd"), 0.5, mask(), targets)])
        torch.testing.assert_close(fused.loss, clean.loss, rtol=1e-12, atol=0)


# --- precision ---


@pytest.mark.parametrize(
    "dtype,weight_dtype",
    [(half, weight) for half in (torch.bfloat16, torch.float16) for weight in (half, torch.float32)],
)
def test_half_precision_products(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """As far from float64 as F.linear and its gradient in that precision are, and no more."""
    hidden = random(N, D, seed=0, dtype=dtype).requires_grad_()
    weight = random(V, D, seed=1, dtype=weight_dtype).requires_grad_()
    terms = [TokenTerm(LABELS, 0.5 / N, None, labels()), TokenTerm(Term("logits"), 0.5 / N, mask(), teacher())]
    fused = fused_linear_loss(hidden, weight, terms, chunk_bytes=CHUNK)
    assert fused.loss.dtype == torch.float32
    fused.loss.backward()
    assert slope_of(hidden).dtype == dtype and slope_of(weight).dtype == weight_dtype
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    plain = [each.detach().to(dtype).requires_grad_() for each in (hidden, weight)]
    for given in (exact, plain):
        whole(given[0], given[1], terms)[0].backward()
    for ours, theirs, true in zip((hidden, weight), plain, exact, strict=True):
        error, usual = ((slope_of(each).double() - slope_of(true)).norm() for each in (ours, theirs))
        assert error <= 1.5 * usual


def test_the_smallest_coefficients_reach_half_precision_gradients() -> None:
    """1e-9 of a gradient is nothing in float16; a loss scale comes to it in the backward pass only."""
    hidden, weight = (random(*shape, dtype=torch.float16).requires_grad_() for shape in ((N, D), (V, D)))
    fused = fused_linear_loss(hidden, weight, [TokenTerm(LABELS, 1e-9, None, labels())])
    (1e9 * fused.loss).backward()
    plain = hidden.detach().double().requires_grad_()
    F.cross_entropy(F.linear(plain, weight.detach().double()), labels(), reduction="sum").backward()
    torch.testing.assert_close(slope_of(hidden).double(), plain.grad, rtol=0.02, atol=0.02)


def test_autocast_leaves_it_alone() -> None:
    hidden, weight, _ = head(torch.float32)
    terms = [TokenTerm(LABELS, 0.5, None, labels()), TokenTerm(Term("logits"), 0.5, None, teacher())]
    outside = fused_linear_loss(hidden, weight, terms, chunk_bytes=CHUNK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_linear_loss(hidden, weight, terms, chunk_bytes=CHUNK)
    assert torch.equal(inside.loss, outside.loss)
    for ours, theirs in zip(
        *(torch.autograd.grad(each.loss, (hidden, weight)) for each in (inside, outside)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_logits_far_apart_stay_finite() -> None:
    """Ids not kept hundreds of nats below a kept one: their sum is taken relative to their own largest."""
    hidden = torch.eye(D)[:3].requires_grad_()
    weight = torch.zeros(V, D)
    weight[2] = 500.0
    weight.requires_grad_()
    targets = SparseTargets(
        torch.tensor([[2], [2], [3]]), torch.full((3, 1), math.log(0.5)), torch.full((3,), math.log(0.5))
    )
    fused = fused_linear_loss(hidden, weight, [TokenTerm(Term("logits"), 1.0, None, targets)])
    wide = sparse_loss(Term("logits"), (hidden @ weight.T).detach().double(), targets).sum()
    torch.testing.assert_close(fused.loss.double(), wide)
    slope = torch.autograd.grad(fused.loss, weight)[0]
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope[0, 0], torch.tensor(-0.5 / (V - 1)))


# --- what is refused ---


def test_one_backward_and_no_more() -> None:
    hidden, weight, _ = head()
    loss = fused_linear_loss(hidden, weight, [TokenTerm(LABELS, 1.0, None, labels())]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward; call it again"):
        loss.backward()


def test_what_cannot_be_computed_is_refused() -> None:
    hidden, weight, _ = head()
    with pytest.raises(ConfigError, match="dkd needs every logit of the teacher"):
        fused_linear_loss(hidden, weight, [TokenTerm(Term("logits", "dkd"), 1.0, None, teacher())])
    with pytest.raises(ValueError, match="needs one term at least"):
        fused_linear_loss(hidden, weight, [])
