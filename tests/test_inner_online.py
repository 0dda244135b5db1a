"""Offline equals online: each family from a store, and written out in plain torch with the live teacher beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inner_cases import ROWS, batch_of, bert, gap, objective_of, padded, stepped, write_inside
from predistill.store import TeacherStore
from predistill.student_train.inside import objective as inner
from predistill.student_train.losses.terms import Term


@pytest.fixture(scope="module")
def teacher():
    return bert(7, 4, 24, 4).eval()


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> TeacherStore:
    """Everything of a teacher of 4 blocks, 24 wide, 4 heads."""
    return write_inside(tmp_path_factory.mktemp("inside") / "store", teacher, {"train": ROWS})


class Live:
    """Both models on the same rows, and everything inside them by the models' own means."""

    def __init__(self, model, inputs):
        model.set_attn_implementation("eager")
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        self.hidden, self.attentions = outputs.hidden_states, outputs.attentions
        self.logits, self.model = outputs.logits, model
        self.pooled = model.bert(**inputs).pooler_output
        model.set_attn_implementation("sdpa")

    def heads(self, kind, layer):
        """[B, H, S, d]"""
        attention = self.model.bert.encoder.layer[layer].attention.self
        made = getattr(attention, kind)(self.hidden[layer])
        return made.unflatten(-1, (self.model.config.num_attention_heads, -1)).transpose(1, 2)

    def scores(self, layer):
        query, key = self.heads("query", layer), self.heads("key", layer)
        return query @ key.mT / math.sqrt(query.shape[-1])


def squares(mask):
    return mask[:, :, None] & mask[:, None, :]


def online_hidden(s, t, mask, project, pairs):
    return [F.mse_loss(project(own, theirs, s.hidden[own])[mask], t.hidden[theirs][mask]) for own, theirs in pairs]


def online_minilm(s, t, mask, own, theirs, heads):
    total = 0.0
    for row in range(len(mask)):
        length = int(mask[row].sum())
        for kind in ("query", "key", "value"):
            sides = []
            for side, layer in ((t, theirs), (s, own)):
                features = side.heads(kind, layer).transpose(1, 2).flatten(2)[row, :length]
                parts = features.unflatten(-1, (heads, -1)).transpose(0, 1)
                sides.append(parts @ parts.mT / math.sqrt(parts.shape[-1]))
            p, log_q = sides[0].softmax(-1), sides[1].log_softmax(-1)
            total += F.kl_div(log_q, p, reduction="sum") / (heads * length * len(mask))
    return total


def online_distance(s, t):
    found = []
    for features in (s, t):
        distances = (features[:, None] - features[None]).square().sum(-1).clamp(min=1e-24).sqrt()
        distances = distances * (1 - torch.eye(len(features)))
        found.append(distances / (distances.sum() / (len(features) * (len(features) - 1))))
    return F.smooth_l1_loss(*found)


def mean_tokens(hidden, mask):
    return torch.stack([row[kept].mean(0) for row, kept in zip(hidden, mask, strict=True)])


CASES = {
    "hidden": (
        (2, 16, 2), Term("hidden_states"),
        lambda s, t, m, P: sum(online_hidden(s, t, m, P("hidden_states"), ((0, 0), (1, 2), (2, 4)))) / 3,
    ),
    "hidden summed, as wide": (
        (2, 24, 4), Term("hidden_states", options={"over_layers": "sum", "layers": "1:3,2:1"}),
        lambda s, t, m, P: sum(online_hidden(s, t, m, lambda *at: at[-1], ((1, 3), (2, 1)))),
    ),
    "hidden always projected": (
        (2, 24, 4), Term("hidden_states", options={"projection": "linear", "bias": True, "layers": "last"}),
        lambda s, t, m, P: online_hidden(s, t, m, P("hidden_states"), ((2, 4),))[0],
    ),
    "cosine": (
        (2, 24, 4), Term("hidden_states", "cosine", options={"layers": "last"}),
        lambda s, t, m, P: (1 - F.cosine_similarity(s.hidden[2][m], t.hidden[4][m], dim=-1)).mean(),
    ),
    "pkd": (
        (2, 24, 4), Term("hidden_states", "pkd", options={"layers": "every-2"}),
        lambda s, t, m, P: sum(
            (F.normalize(s.hidden[i][:, 0], dim=-1) - F.normalize(t.hidden[2 * i][:, 0], dim=-1)).square().sum() / 12
            for i in range(3)
        ) / 3,
    ),
    "embeddings": (
        (3, 16, 2), Term("embeddings", options={"bias": True}),
        lambda s, t, m, P: online_hidden(s, t, m, P("embeddings"), ((0, 0),))[0],
    ),
    "attentions": (
        (2, 16, 4), Term("attentions"),
        lambda s, t, m, P: sum(
            (s.attentions[i] - t.attentions[2 * i + 1]).square().mean(1)[squares(m)].mean() for i in range(2)
        ) / 2,
    ),
    "attentions of other heads": (
        (2, 16, 2), Term("attentions", options={"over_layers": "sum"}),
        lambda s, t, m, P: sum(
            (s.attentions[i].mean(1) - t.attentions[2 * i + 1].mean(1)).square()[squares(m)].mean() for i in range(2)
        ),
    ),
    "attentions by a head map": (
        (2, 16, 2), Term("attentions", options={"heads": "0:3,1:1", "layers": "last"}),
        lambda s, t, m, P: (s.attentions[1] - t.attentions[3][:, [3, 1]]).square().mean(1)[squares(m)].mean(),
    ),
    "attentions kl": (
        (2, 16, 4), Term("attentions", "kl", options={"layers": "last"}),
        lambda s, t, m, P: torch.xlogy(t.attentions[3], t.attentions[3]).sub(
            t.attentions[3] * torch.where(squares(m)[:, None], s.attentions[1], 1).log()
        ).sum(-1).mean(1)[m].mean(),
    ),
    "scores": (
        (2, 16, 4), Term("attention_scores"),
        lambda s, t, m, P: sum(
            (s.scores(i) - t.scores(2 * i + 1)).square().mean(1)[squares(m)].mean() for i in range(2)
        ) / 2,
    ),
    "minilm": (
        (2, 16, 2), Term("relations", "minilm", options={"relation_heads": 8, "layers": "0:1"}),
        lambda s, t, m, P: online_minilm(s, t, m, 0, 1, 8),
    ),
    "distances": (
        (2, 16, 2), Term("relations", "rkd_distance"),
        lambda s, t, m, P: online_distance(mean_tokens(s.hidden[2], m), mean_tokens(t.hidden[4], m)),
    ),
    "distances of the pooler": (
        (2, 16, 2), Term("relations", "rkd_distance", options={"feature": "pooled"}),
        lambda s, t, m, P: online_distance(s.pooled, t.pooled),
    ),
}  # fmt: skip


@pytest.mark.parametrize("most", [1, 400, 1 << 30], ids=["a row at a time", "a few rows", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_offline_equals_online(store, teacher, case, most, monkeypatch):
    monkeypatch.setattr(inner, "PIECE", (most, most))
    shape, term, formula = CASES[case]
    student, outer = bert(0, *shape), [Term("labels", weight=0.3), Term("logits", "kl", 0.7, 2.0)]
    objective = objective_of(store, student, [term], outer)
    batch = batch_of(store, objective)
    loss, gradients = stepped(objective, student, batch)

    student.zero_grad()
    inputs, labels = padded(ROWS), torch.as_tensor(np.arange(12) % 3)
    with torch.no_grad():
        t = Live(teacher, inputs)
    s, mask = Live(student, inputs), inputs["attention_mask"].bool()

    def projected(family):
        weights = dict(student.distillation_projections.named_parameters())
        return lambda own, theirs, value: F.linear(
            value, weights[f"{family}/{own}:{theirs}/weight"], weights.get(f"{family}/{own}:{theirs}/bias")
        )

    expected = formula(s, t, mask, projected) + 0.3 * F.cross_entropy(s.logits, labels)
    p, log_q = F.softmax(t.logits / 2, -1), F.log_softmax(s.logits / 2, -1)
    expected = expected + 0.7 * 4 * F.kl_div(log_q, p, reduction="batchmean")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    found = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    assert gradients.keys() == found.keys() and gap(gradients, found) < 2e-6
