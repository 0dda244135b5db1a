"""Terms into one loss: denominators over the whole accumulation window, and equality with online distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from predistill.store.errors import ConfigError, DataError
from predistill.student_train.losses.rows import row_loss
from predistill.student_train.losses.terms import Term
from predistill.student_train.settings import DistillationSettings
from predistill.student_train.tasks.text_classification import ClassificationObjective as Objective

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
NAN = float("nan")


def batch_of(problem_type, rows=12, classes=4, seed=0, labelled=0.5):
    generator = torch.Generator().manual_seed(seed)
    width = 1 if problem_type == REGRESSION else classes
    teacher = 3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    missing = torch.rand(rows, generator=generator) > labelled
    if problem_type == SINGLE:
        labels = torch.randint(0, classes, (rows,), generator=generator).masked_fill(missing, -100)
    elif problem_type == MULTI:
        labels = torch.randint(0, 2, (rows, classes), generator=generator).double()
        labels[torch.rand(rows, classes, generator=generator) > labelled] = NAN
        labels[missing] = NAN
    else:
        labels = torch.randn(rows, generator=generator, dtype=torch.float64).masked_fill(missing, NAN)
    logits = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return logits, {"input_ids": torch.ones(rows, 3).long(), "labels": labels, "teacher_logits": teacher}


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def loss_and_gradient(objective, logits, batch, pieces):
    """Forward and backward of each micro-batch apart, as a Trainer does."""
    logits = logits.clone().requires_grad_()
    counts = sum(objective.counts(part(batch, rows)) for rows in pieces)
    total = 0.0
    for rows in pieces:
        loss = objective.combine(objective.sums(logits[rows], part(batch, rows)), counts)
        loss.backward()
        total += loss.item()
    return total, logits.grad


TERMS = {
    SINGLE: [Term("labels", weight=0.3), Term("logits", "kl", 0.7, 3.0), Term("pseudo_labels", weight=0.2)],
    MULTI: [Term("labels", weight=0.3), Term("logits", "kl", 0.7, 3.0), Term("pseudo_labels", weight=0.2)],
    REGRESSION: [Term("labels", weight=0.3), Term("logits", "mse", 0.7), Term("pseudo_labels", weight=0.2)],
}


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("cuts", [[4, 8], [1, 2, 11], [3]])
def test_micro_batches_give_the_loss_of_one_batch(problem_type, cuts):
    logits, batch = batch_of(problem_type)
    objective = Objective(TERMS[problem_type], problem_type, logits.shape[-1])
    whole = loss_and_gradient(objective, logits, batch, [slice(0, 12)])
    edges = [0, *cuts, 12]
    pieces = loss_and_gradient(objective, logits, batch, [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)])
    assert pieces[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-12, atol=1e-15)


def test_against_formulas_written_out():
    logits, batch = batch_of(SINGLE)
    known = batch["labels"] != -100
    p, log_q = F.softmax(batch["teacher_logits"] / 3, -1), F.log_softmax(logits / 3, -1)
    expected = 0.3 * F.cross_entropy(logits[known], batch["labels"][known])
    expected += 0.7 * 9 * F.kl_div(log_q, p, reduction="sum") / len(logits)
    expected += 0.2 * F.cross_entropy(logits[~known], batch["teacher_logits"][~known].argmax(-1))
    objective = Objective(TERMS[SINGLE], SINGLE, 4)
    assert objective.names == ["labels", "logits", "pseudo_labels"]
    assert objective.counts(batch).tolist() == [int(known.sum()), 12, int((~known).sum())]
    assert objective.combine(objective.sums(logits, batch), objective.counts(batch)).item() == pytest.approx(
        expected.item()
    )


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_what_is_counted_is_what_the_losses_call_valid(problem_type, threshold):
    threshold = 0.0 if problem_type == REGRESSION else threshold
    logits, batch = batch_of(problem_type, rows=40)
    for term in (Term("labels"), Term("logits"), Term("pseudo_labels", options={"threshold": threshold})):
        _, valid = row_loss(term, logits, batch["teacher_logits"], batch["labels"], problem_type=problem_type)
        assert Objective([term], problem_type, logits.shape[-1]).counts(batch).item() == int(valid.sum()) > 0


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_a_batch_without_labels_teaches_by_the_teacher_alone(problem_type):
    logits, batch = batch_of(problem_type, labelled=0.0)
    objective = Objective([Term("labels", weight=0.5), Term("logits", weight=0.5)], problem_type, logits.shape[-1])
    teacher_only = Objective([Term("logits", weight=0.5)], problem_type, logits.shape[-1])
    counts = objective.counts(batch)
    assert counts.tolist() == [0, 12]
    value = objective.combine(objective.sums(logits, batch), counts)
    assert torch.equal(value, teacher_only.combine(teacher_only.sums(logits, batch), counts[1:]))
    del batch["labels"]
    assert torch.equal(objective.combine(objective.sums(logits, batch), objective.counts(batch)), value)


def test_label_only_reads_no_teacher_column():
    logits, batch = batch_of(SINGLE)
    objective = Objective(DistillationSettings(alpha=0).terms(), SINGLE, 4)
    del batch["teacher_logits"]
    known = batch["labels"] != -100
    assert objective.fields == [] and objective.names == ["labels"]
    value = objective.combine(objective.sums(logits, batch), objective.counts(batch))
    assert value.item() == pytest.approx(F.cross_entropy(logits[known], batch["labels"][known]).item())


def test_half_precision_logits_are_summed_in_float32():
    logits, batch = batch_of(SINGLE)
    batch["teacher_logits"] = batch["teacher_logits"].half()
    objective = Objective(TERMS[SINGLE], SINGLE, 4)
    assert objective.sums(logits.bfloat16(), batch).dtype == torch.float32


def test_clear_refusals():
    logits, batch = batch_of(SINGLE)
    objective = Objective(TERMS[SINGLE], SINGLE, 4)
    with pytest.raises(DataError, match="5 labels, the store's teacher has 4"):
        objective.sums(torch.zeros(12, 5), batch)
    del batch["teacher_logits"]
    with pytest.raises(ConfigError, match="needs teacher_logits"):
        objective.counts(batch)
    with pytest.raises(ConfigError, match="weight 0"):
        Objective([Term("labels", weight=0.0)], SINGLE, 4)
    with pytest.raises(ConfigError, match="not defined for a regression head"):
        Objective([Term("logits", "dkd")], REGRESSION, 1)


def test_settings_become_terms():
    terms = DistillationSettings().terms()
    assert [(term.name, term.loss, term.temperature) for term in terms][1] == ("logits", "kl", 2.0)
    assert np.allclose([term.weight for term in terms], [0.3, 0.7])
    assert DistillationSettings(alpha=1).terms()[0].name == "logits"
    assert DistillationSettings(loss="jsd:beta=0.2,temperature=5", temperature=3).terms()[1].temperature == 5
    assert [term.weight for term in DistillationSettings(preset="nlp-architect").terms()] == [1.0, 0.1]
    assert DistillationSettings(preset="tutorial").terms()[1].temperature == 4
    assert DistillationSettings(preset="tutorial", temperature=8, alpha=1).terms()[0].temperature == 8
    pseudo = DistillationSettings(pseudo_labels=0.5, pseudo_label_confidence=0.9).terms()[-1]
    assert (pseudo.weight, pseudo.options["threshold"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "--alpha lies between 0 and 1; got 1.5"),
        ({"temperature": 0}, "--temperature"),
        ({"loss": "klx"}, "klx"),
        ({"loss": "kl:weight=2"}, "--alpha"),
        ({"preset": "tutorial", "loss": "mse"}, "has a loss of its own"),
        ({"preset": "mine"}, "--preset is one of tutorial, tutorial-layers"),
        ({"shuffle": "none"}, "--shuffle is one of auto, global, window"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DistillationSettings(**wrong)
