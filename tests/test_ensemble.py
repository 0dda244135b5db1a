"""Averages of teachers against their formulas written out, weights against a grid, rows against a live ensemble."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classification_store import random_rows, write_store
from predistill.store import TeacherStore
from predistill.store.addresses import addresses, compared
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.ensembles.formulas import (
    combined,
    confidence_weights,
    fixed_weights,
    learned_weights,
    negative_log_likelihood,
)
from predistill.student_train.ensembles.rows import CONFIDENCE, Combination, EnsembleRows, Member, shared
from predistill.student_train.losses.catalogue import MULTI_LABEL, REGRESSION
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of

K, N, C = 3, 40, 4


def answers(seed: int = 0, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*(shape or (K, N, C)), generator=generator, dtype=torch.float64)


# ---- averages ----


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 0.3, 0.2], [0, 2, 1]])
def test_probabilities_and_logits_are_the_two_means(weights: list[float]) -> None:
    z, w = answers(), fixed_weights(weights)
    assert w.sum() == pytest.approx(1)
    arithmetic = sum(each * one.softmax(-1) for each, one in zip(w, z, strict=True))
    torch.testing.assert_close(combined(z, w, "probabilities").softmax(-1), arithmetic)
    geometric = torch.stack([one.softmax(-1) ** each for each, one in zip(w, z, strict=True)]).prod(0)
    torch.testing.assert_close(combined(z, w, "logits").softmax(-1), geometric / geometric.sum(-1, keepdim=True))


def test_several_labels_and_numbers() -> None:
    z, w = answers(), fixed_weights([0.5, 0.3, 0.2])
    found = combined(z, w, "probabilities", MULTI_LABEL)
    torch.testing.assert_close(torch.sigmoid(found), torch.einsum("k,knc->nc", w, torch.sigmoid(z)))
    mean = torch.einsum("k,knc->nc", w, z)
    torch.testing.assert_close(combined(z, w, "logits", MULTI_LABEL), mean)
    torch.testing.assert_close(combined(z, w, "probabilities", REGRESSION), mean)
    with pytest.raises(ValueError, match="average is one of probabilities, logits"):
        combined(z, w, "median")


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", ["single_label_classification", MULTI_LABEL, REGRESSION])
def test_one_teacher_several_times_is_that_teacher(average: str, kind: str) -> None:
    z = answers()[:1].repeat(3, 1, 1)
    torch.testing.assert_close(combined(z, fixed_weights([1, 2, 3]), average, kind), z[0])


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_what_cannot_be_stays_so(average: str) -> None:
    z = answers()
    z[:, :, 2:] = -torch.inf
    found = combined(z, fixed_weights([1, 0, 1]), average)
    assert torch.isfinite(found[:, :2]).all() and (found[:, 2:] == -torch.inf).all()
    assert torch.isfinite(confidence_weights(z)).all()


def test_extreme_logits_stay_finite_in_float32() -> None:
    z = torch.tensor([[[300.0, -300.0]], [[-300.0, 300.0]]])
    for kind in ("single_label_classification", MULTI_LABEL):
        found = combined(z, fixed_weights([1, 1]), "probabilities", kind)
        assert torch.isfinite(found).all() and abs(float(found[0, 0] - found[0, 1])) < 1e-3


# ---- weights ----


def test_confidence_weights_are_the_formula() -> None:
    z = answers()
    entropy = torch.stack([torch.distributions.Categorical(logits=one).entropy() for one in z])
    expected = (1 - entropy.exp() / entropy.exp().sum(0)) / (K - 1)
    found = confidence_weights(z)
    torch.testing.assert_close(found[..., 0], expected)
    torch.testing.assert_close(found.sum(0), torch.ones(N, 1, dtype=torch.float64))
    several = confidence_weights(z, MULTI_LABEL)
    p = torch.sigmoid(z)
    own = torch.distributions.Bernoulli(p).entropy().mean(-1)
    torch.testing.assert_close(several[..., 0], (1 - own.softmax(0)) / (K - 1))
    assert float(confidence_weights(z[:1]).min()) == 1
    with pytest.raises(ValueError, match="no confidence"):
        confidence_weights(z, REGRESSION)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_learned_weights_are_the_best_of_a_grid(average: str) -> None:
    """The first teacher knows the label, the second half of it, the third nothing."""
    z = answers()
    labels = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    for number, known in enumerate((2.5, 1.0, 0.0)):
        z[number] += known * F.one_hot(labels, C)
    found = learned_weights(z, labels, average)
    assert found.sum() == pytest.approx(1) and found[0] == found.max()

    def cost(w: torch.Tensor) -> float:
        mean = sum(a * one.softmax(-1) for a, one in zip(w, z, strict=True)).log() if average == "probabilities" else (
            torch.einsum("k,knc->nc", w, z)
        )  # fmt: skip
        return float(F.cross_entropy(mean, labels))

    steps = torch.linspace(0, 1, 41, dtype=torch.float64)
    best = min(cost(torch.stack([a, b, 1 - a - b])) for a in steps for b in steps if a + b <= 1 + 1e-9)
    assert cost(found) <= best + 1e-6
    assert cost(found) == pytest.approx(float(negative_log_likelihood(z, labels, found, average)))


def test_learned_weights_of_numbers_and_several_labels() -> None:
    truth = answers(5, N)
    z = torch.stack([truth + 1, truth - 1, 5 * answers(6, N)])[..., None]
    found = learned_weights(z, truth, "probabilities", REGRESSION)
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)  # their errors cancel
    assert float(negative_log_likelihood(z, truth, found, "logits", REGRESSION)) < 0.05
    labels = (answers(7, N, C) > 0).double()
    labels[::3, 0] = torch.nan
    z = torch.stack([4 * labels.nan_to_num(0.5) - 2, answers(8, N, C)])
    assert learned_weights(z, labels, "probabilities", MULTI_LABEL)[0] > 0.95


# ---- rows ----


@pytest.fixture(scope="module")
def teachers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Sequential(torch.nn.EmbeddingBag(60, 8), torch.nn.Linear(8, C)) for _ in range(K)]


@pytest.fixture(scope="module")
def stores(teachers: list[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> list[TeacherStore]:
    """Three teachers of the same rows, in shards of other sizes; the last one's classes in another order."""
    folder, rows = tmp_path_factory.mktemp("ensemble"), random_rows(N)
    labels = np.arange(N) % C
    made = []
    for number, teacher in enumerate(teachers):
        with torch.no_grad():
            logits = torch.cat([4 * teacher(torch.tensor([row])) for row in rows]).numpy()
        order = [2, 0, 3, 1] if number == 2 else [0, 1, 2, 3]
        names = [f"class {at}" for at in order]
        truth = np.argsort(order)[labels]
        made.append(write_store(folder / str(number), {"train": rows}, {"train": logits[:, order]}, {"train": truth},
                                label_names=names, shard_rows=7 + 5 * number))  # fmt: skip
    return made


def together(stores: list[TeacherStore], weights: Any, average: str = "probabilities", order: Any = None) -> Any:
    rows = [store.select("train", fields=["teacher_logits"]) for store in stores]
    members = [Member(rows[1]), Member(rows[2], classes=np.array([1, 3, 0, 2]))]
    return EnsembleRows(rows[0], members, Combination({"teacher_logits": -1}, average, weights))


def live(teachers: list[torch.nn.Module], rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([torch.cat([4 * one(torch.tensor([row])) for row in rows]) for one in teachers]).double()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", ["given", CONFIDENCE])
def test_offline_is_online(stores: Any, teachers: Any, temperature: float, average: str, weights: str) -> None:
    """Loss and gradient of a batch equal those beside the live teachers, to 1e-6: averaged at 1, then softened."""
    w: Any = fixed_weights([0.5, 0.3, 0.2]) if weights == "given" else CONFIDENCE
    rows, chosen = together(stores, w, average), [3, 39, 11, 20, 0]
    student = torch.nn.Sequential(torch.nn.EmbeddingBag(60, 6), torch.nn.Linear(6, C))
    ids = [random_rows(N)[at] for at in chosen]

    z = live(teachers, ids)
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    own = w[:, None, None] if weights == "given" else (1 - entropy.softmax(0)) / (K - 1)
    mean = (own * p).sum(0).log() if average == "probabilities" else (own * z).sum(0)
    target = (mean / temperature).softmax(-1)
    output = torch.cat([student(torch.tensor([row])) for row in ids]).double()
    log_q = (output / temperature).log_softmax(-1)
    expected = temperature**2 * (target * (target.log() - log_q)).sum(-1).mean()
    expected.backward()
    gradients = [one.grad.clone() for one in student.parameters()]  # type: ignore[union-attr]
    student.zero_grad()

    batch = DataCollatorForDistillation()(rows[chosen])
    objective = task_of(stores[0]).objective([Term("logits", temperature=temperature)])
    outputs = torch.cat([student(torch.tensor([row])) for row in ids]).double()
    step = objective.step(lambda **_: outputs, {}, batch, objective.counts(batch))  # type: ignore[arg-type]
    step.loss.backward()
    assert float(step.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for one, wanted in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(one.grad, wanted, rtol=1e-5, atol=1e-6)


def test_batches_single_rows_columns_and_unread_members(stores: Any) -> None:
    rows = together(stores, fixed_weights([1, 1, 1]))
    lists = [[5, 2], [39], list(range(10, 30)), [0, -1]]
    for numbers, batch in zip(lists, rows.batches(lists), strict=True):
        expected = rows[[number % N for number in numbers]]
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name], values)
    one = rows[7]
    assert one["input_ids"].tolist() == random_rows(N)[7]
    np.testing.assert_array_equal(one["teacher_logits"], rows.column("teacher_logits")[7])
    assert len(rows) == N and rows.lengths.tolist() == [len(row) for row in random_rows(N)]
    assert rows.column("labels").tolist() == [at % C for at in range(N)]
    bare = rows.narrowed([])
    assert not bare.members and "teacher_logits" not in bare[[0]]


def test_rows_in_another_order_and_the_ends_of_a_thread(stores: Any) -> None:
    """Rows of a member may stand elsewhere; closing a half-read iterator ends its threads."""
    rows = together(stores, fixed_weights([1, 1, 1]))
    backwards = np.arange(N)[::-1].copy()
    turned = EnsembleRows(rows.rows, [Member(stores[1].select("train"), order=backwards)],
                          Combination({"teacher_logits": -1}, "logits", fixed_weights([0, 1])))  # fmt: skip
    expected = stores[1].select("train").column("teacher_logits")[::-1]
    np.testing.assert_allclose(turned.column("teacher_logits"), expected)
    np.testing.assert_allclose(turned[[4, 9]]["teacher_logits"], expected[[4, 9]])
    before = threading.active_count()
    reading = rows.batches([[at] for at in range(N)])
    next(reading)
    assert threading.active_count() > before
    reading.close()
    assert threading.active_count() == before

    def broken() -> Any:
        yield [0]
        raise RuntimeError("the sampler is broken")

    with pytest.raises(RuntimeError, match="the sampler is broken"):
        list(rows.batches(broken()))
    first, second = shared(iter(range(3)), 2)
    assert list(first) == list(second) == [0, 1, 2]


# ---- addresses ----


def test_what_two_stores_share(stores: Any, tmp_path: Path) -> None:
    ours = addresses(stores[0], "train")
    assert compared(ours, addresses(stores[2], "train")).whole
    rows = random_rows(N)
    for name, changed in {
        "short": rows[:30],
        "other": [*rows[:7], [9, 9], *rows[8:]],
        "none": random_rows(N, 9),
    }.items():
        zeros = np.zeros((len(changed), 2))
        write_store(tmp_path / name, {"train": changed}, {"train": zeros}, None)
    short, other, none = (
        compared(ours, addresses(TeacherStore.open(tmp_path / name), "train")) for name in ("short", "other", "none")
    )
    assert short.rows == (N, 30) and short.common == 30 and short.first and short.first[0] == 30
    assert short.first[3] == "" and len(short.first[2]) == 32
    assert other.common == N - 1 and other.first and other.first[0] == 7 and other.first[2] != other.first[3]
    assert none.common == 0 and not none.whole and (none.places == -1).all()
    longer = compared(addresses(TeacherStore.open(tmp_path / "short"), "train"), ours)
    assert longer.first and longer.first[0] == 30 and longer.first[2] == ""
