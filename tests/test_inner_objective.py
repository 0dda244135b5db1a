"""Losses of the inside from a store: columns, counts, micro-batches, evaluation, students, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inner_cases import INPUTS, ROWS, VOCABULARY, batch_of, bert, gap, objective_of, padded, stepped, write_inside
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError
from predistill.student_train.inside.objective import InnerObjective
from predistill.student_train.inside.projections import projections_of
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification


@pytest.fixture(scope="module")
def teacher():
    return bert(7, 4, 24, 4).eval()


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> TeacherStore:
    """Everything of a teacher of 4 blocks, 24 wide, 4 heads."""
    return write_inside(tmp_path_factory.mktemp("inside") / "store", teacher, {"train": ROWS})


@pytest.mark.parametrize("family", ["attentions", "attention_scores"])
def test_queries_and_keys_stand_for_attention(store, teacher, tmp_path, family):
    kept = write_inside(tmp_path / "store", teacher, {"train": ROWS}, keep=["queries", "keys"])
    found = []
    for one in (store, kept):
        student = bert(0, 2, 16, 4)
        objective = objective_of(one, student, [Term(family)])
        found.append(stepped(objective, student, batch_of(one, objective)))
    assert {name for name in objective.fields if "teacher" in name} == {
        f"teacher_{kind}_{layer}" for kind in ("queries", "keys") for layer in ("01", "03")
    }
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and gap(found[0][1], found[1][1]) < 1e-5


def test_stored_probabilities_stand_in_for_scores_where_the_term_allows(teacher, tmp_path):
    kept = write_inside(tmp_path / "store", teacher, {"train": ROWS}, keep=["attentions"])
    found = []
    for term in (Term("attentions"), Term("attention_scores", options={"or_attentions": True})):
        student = bert(0, 2, 16, 4)
        objective = objective_of(kept, student, [term])
        found.append(stepped(objective, student, batch_of(kept, objective))[0])
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="needs the teacher's attention_scores, but .* holds teacher_attentions"):
        objective_of(kept, bert(0, 2, 16, 4), [Term("attention_scores")])


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_narrow_stores_are_near(store, teacher, tmp_path, dtype, bound):
    keep = ["hidden_states", "queries", "keys"]
    narrow = write_inside(tmp_path / "store", teacher, {"train": ROWS}, keep=keep, dtype=dtype)
    found = []
    for one in (store, narrow):
        student = bert(0, 2, 16, 4)
        objective = objective_of(one, student, [Term("hidden_states"), Term("attentions")])
        found.append(stepped(objective, student, batch_of(one, objective)))
    assert found[1][0] == pytest.approx(found[0][0], rel=bound) and 0 < gap(found[1][1], found[0][1]) < bound


# ---- terms, counts, columns ----


def test_only_the_columns_of_the_map_are_read(store):
    student = bert(0, 2, 16, 2)
    made = InnerObjective(task_of(store).objective([Term("logits")]), [Term("hidden_states")], store.fields)
    assert [name for name in made.fields if "hidden" in name] == [f"teacher_hidden_states_0{n}" for n in range(5)]
    made.attach(student, padded(ROWS[:2]))
    expected = {"teacher_logits", *(f"teacher_hidden_states_0{n}" for n in (0, 2, 4))}
    assert set(made.fields) == set(made.evaluation_fields) == expected
    assert made.names == ["logits", "hidden_states"]


def test_micro_batches_give_the_loss_of_one_batch(store):
    """Of 1 to 5 rows of 2 to 12 tokens each; token, pair and row terms, each with its own denominator."""
    terms = [
        Term("hidden_states", weight=2.0), Term("attentions", weight=30.0), Term("attentions", "kl"),
        Term("hidden_states", "pkd", options={"over_layers": "sum"}), Term("relations", "minilm"),
    ]  # fmt: skip
    student = bert(0, 2, 16, 2).double()
    objective = objective_of(store, student, terms, [Term("labels", weight=0.5)])
    assert objective.names == ["labels", "hidden_states", "attentions", "attentions_3", "hidden_states_4", "relations"]
    whole = batch_of(store, objective)
    tokens, pairs = sum(map(len, ROWS)), sum(len(row) ** 2 for row in ROWS)
    assert objective.counts(whole).tolist() == [12, 3 * tokens, 2 * pairs, 2 * tokens, 3 * 12, 12]
    loss, gradients = stepped(objective, student, whole)
    pieces = [batch_of(store, objective, slice(*edges)) for edges in ((0, 5), (5, 6), (6, 10), (10, 12))]
    counts = sum(objective.counts(piece) for piece in pieces)
    parts = [stepped(objective, student, piece, counts) for piece in pieces]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-7), "minilm's teacher is in float32"
    summed = {name: sum(found[name] for _, found in parts) for name in gradients}
    assert gap(summed, gradients) < 1e-6


def test_terms_of_the_inside_alone(store):
    student = bert(0, 2, 16, 2)
    objective = objective_of(store, student, [Term("hidden_states", weight=0.5)])
    batch = batch_of(store, objective)
    assert objective.counts(batch).tolist() == [3 * sum(map(len, ROWS))]
    loss, gradients = stepped(objective, student, batch)
    twin = bert(0, 2, 16, 2)
    beside = objective_of(store, twin, [Term("hidden_states", weight=0.5)], [Term("labels", weight=1e-12)])
    assert loss == pytest.approx(stepped(beside, twin, batch_of(store, beside))[0], rel=1e-6)
    assert gradients["classifier.weight"].abs().max() == 0, "a gradient, for DDP to wait for"
    with pytest.raises(ConfigError, match="every term of the loss has weight 0"):
        InnerObjective(task_of(store).objective([]), [Term("hidden_states", weight=0.0)], store.fields)


def test_evaluation_reports_each_term_whatever_the_batches(store):
    student = bert(0, 2, 16, 2).eval()
    terms = [Term("hidden_states", weight=2.0), Term("attentions", weight=5.0)]
    objective = objective_of(store, student, terms, [Term("labels", weight=0.5)])
    found = []
    for edges in ([0, 12], [0, 3, 4, 9, 12]):
        totals = 0
        for begin, end in zip(edges, edges[1:], strict=False):
            batch = batch_of(store, objective, [*range(begin, end), 0, 1])  # two rows that only fill
            inputs = {name: batch[name] for name in INPUTS}
            with torch.no_grad():
                made = objective.evaluate(student, inputs, batch, end - begin)
            assert made.logits.shape == (end - begin + 2, 3)
            totals = totals + made.totals.double()
        found.append(objective.scores(totals))
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-6), name
    assert {"loss", "loss_labels", "loss_hidden_states", "loss_attentions", "teacher_agreement"} == found[0].keys()
    weighted = 0.5 * found[0]["loss_labels"] + 2 * found[0]["loss_hidden_states"] + 5 * found[0]["loss_attentions"]
    assert found[0]["loss"] == pytest.approx(weighted, rel=1e-6)
    assert made.loss is not None


def test_evaluation_without_columns_leaves_their_terms_out(store):
    student = bert(0, 2, 16, 2).eval()
    objective = objective_of(store, student, [Term("hidden_states")], [Term("labels")])
    batch = {k: v for k, v in batch_of(store, objective).items() if "hidden" not in k}
    with torch.no_grad():
        made = objective.evaluate(student, {name: batch[name] for name in INPUTS}, batch, 12)
    assert made.loss is None and "loss_labels" in objective.scores(made.totals)
    assert not {"loss", "loss_hidden_states"} & objective.scores(made.totals).keys()
    with pytest.raises(ConfigError, match="'hidden_states' needs teacher_hidden_states_00, which these rows do not"):
        objective.counts(batch)


# ---- students ----


def test_a_student_that_shares_its_layers(store):
    torch.manual_seed(0)
    student = AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, num_labels=3, initializer_range=0.3,
        )
    )  # fmt: skip
    objective = objective_of(store, student, [Term("hidden_states"), Term("attentions"), Term("relations", "minilm")])
    student.eval()
    loss, gradients = stepped(objective, student, batch_of(store, objective))
    live = student(**padded(ROWS), output_hidden_states=True)
    weights = dict(projections_of(student).named_parameters())
    mask, teacher = padded(ROWS)["attention_mask"].bool(), batch_of(store, objective)
    expected = np.mean([
        F.mse_loss(
            F.linear(live.hidden_states[i], weights[f"hidden_states/{i}:{2 * i}/weight"])[mask],
            teacher[f"teacher_hidden_states_0{2 * i}"][mask],
        ).item() for i in range(3)
    ])  # fmt: skip
    batch = batch_of(store, objective)
    sums = objective.step(student, padded(ROWS), batch, objective.counts(batch)).sums / objective.counts(batch)
    assert sums[0].item() == pytest.approx(expected, rel=1e-6) and math.isfinite(loss)


def test_projections_know_seed_and_precision(store):
    def weights(seed, student):
        made = InnerObjective(task_of(store).objective([]), [Term("hidden_states")], store.fields, seed=seed)
        made.attach(student, padded(ROWS[:2]))
        return dict(projections_of(student).named_parameters())

    one, same, other = (weights(seed, bert(0, 2, 16, 2)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert {value.dtype for value in weights(0, bert(0, 2, 16, 2).bfloat16()).values()} == {torch.float32}
    assert {value.dtype for value in weights(0, bert(0, 2, 16, 2).double()).values()} == {torch.float64}
    assert projections_of(bert(0, 2, 24, 4)) is None


def test_a_bfloat16_student_learns_from_it(store):
    student = bert(0, 2, 16, 2)
    terms = [Term("hidden_states"), Term("attentions"), Term("relations", "minilm")]
    objective = objective_of(store, student, terms)
    precise, _ = stepped(objective, student, batch_of(store, objective))
    with torch.autocast("cpu", torch.bfloat16):
        half, gradients = stepped(objective, student, batch_of(store, objective))
    assert half == pytest.approx(precise, rel=0.05) and all(torch.isfinite(one).all() for one in gradients.values())


def test_float16_loses_no_small_gradients(store):
    """Of a mean over 40 million tokens they are below float16's least number; the loss scale comes after them."""
    found = []
    for half in (False, True):
        student = bert(0, 2, 16, 2)
        objective = objective_of(store, student, [Term("hidden_states")])
        batch = batch_of(store, objective)
        with torch.autocast("cpu", torch.float16, enabled=half):
            counts = objective.counts(batch) * 500_000
            step = objective.step(student, {name: batch[name] for name in INPUTS}, batch, counts)
        (step.loss * 2.0**16).backward()
        found.append({name: one.grad for name, one in student.named_parameters() if one.grad is not None})
    for name, gradient in found[0].items():
        if "projections" in name or "layer.1.output.dense.weight" in name:
            assert (found[1][name] - gradient).norm() < 0.01 * gradient.norm(), name


# ---- refusals ----


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).mean(1))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term("hidden_states", options={"layers": "1:7"}), r"the teacher has hidden_states 0 to 4"),
        (Term("hidden_states", options={"layers": "3:4"}), r"the student has hidden_states 0 to 2"),
        (Term("attentions", options={"layers": "every-3"}), r"the teacher has attentions 0 to 3"),
        (Term("hidden_states", options={"projection": "none"}), r"'hidden_states': student and teacher hidden states"),
        (Term("attentions", options={"heads": "0:0,2:1"}), r"'attentions': the student has heads 0 to 1"),
        (Term("attentions", "kl", options={"heads": "sum"}), r"'attentions': heads=\"sum\" is for mse"),
        (Term("relations", "minilm", options={"relation_heads": 5}), r"5 relation heads must divide the width 16"),
        (Term("relations", "mmd", options={"layers": "last"}), r"its layer map last has one pair: give two"),
        (Term("relations", "fsp", options={"projection": "none"}), r"'relations': fsp needs the teacher's channels"),
    ],
)
def test_what_cannot_be_compared_is_said_before_training(store, term, message):
    with pytest.raises(ConfigError, match=message) as caught:
        objective_of(store, bert(0, 2, 16, 2), [term])
    assert "\n" not in str(caught.value)


def test_a_store_that_lacks_it_is_named(teacher, tmp_path):
    kept = write_inside(tmp_path / "store", teacher, {"train": ROWS}, keep=["states_00", "states_04", "queries_03"])
    with pytest.raises(ConfigError, match=r"pairs 1:2 .* teacher_hidden_states_00, _04: .* layer 2 in --layers"):
        objective_of(kept, bert(0, 2, 16, 2), [Term("hidden_states")])
    holds = r"but the store holds .*teacher_hidden_states_00, _04.*teacher_logits: dump --fields attentions too"
    with pytest.raises(ConfigError, match=holds):
        objective_of(kept, bert(0, 2, 16, 2), [Term("attentions")])
    with pytest.raises(ConfigError, match="needs the teacher's pooled"):
        objective_of(kept, bert(0, 2, 16, 2), [Term("relations", "rkd", options={"feature": "pooled"})])
    with pytest.raises(ConfigError, match="the student's layers, which only models of transformers tell"):
        student = BagOfWords()
        made = InnerObjective(task_of(kept).objective([]), [Term("hidden_states")], kept.fields)
        made.attach(student, {"input_ids": padded(ROWS)["input_ids"]})
