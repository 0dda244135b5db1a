"""Attention from queries and keys, against loops over rows, heads, queries and keys."""

import math

import pytest
import torch
from predistill.store.attention import (
    AttentionSettings,
    attention_probabilities,
    attention_scores,
    visible_keys,
)
from predistill.store.errors import StoreCorrupt

PLAIN = AttentionSettings(heads=4, key_heads=2, head_dim=3, scaling=0.7)
FULL = AttentionSettings(
    heads=4, key_heads=2, head_dim=3, scaling=0.7, softcap=1.5, window=3, causal=True, sinks=(0.5, -1.0, 2.0, 0.0)
)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 3]])


@pytest.mark.parametrize("settings", [PLAIN, FULL])
@pytest.mark.parametrize("packed", [False, True])
def test_visible_keys(settings, packed):
    documents = [[0, 0, 0, 1, 1, 2], [0] * 6, [-1, -2, 0, 0, 0, 0]] if packed else [[0] * 6] * 3
    visible = visible_keys(MASK, settings, POSITIONS if packed else None)
    assert visible.shape == (3, 1, 6, 6) and visible.dtype == torch.bool
    for row in range(3):
        for query in range(6):
            for key in range(6):
                expected = MASK[row, query] and MASK[row, key] and documents[row][query] == documents[row][key]
                if settings.causal:
                    expected = expected and key <= query
                if settings.window:
                    expected = expected and abs(query - key) < settings.window
                assert visible[row, 0, query, key] == bool(expected)


def test_a_window_without_causality_is_open_to_both_sides():
    settings = AttentionSettings(heads=1, key_heads=1, head_dim=1, scaling=1.0, window=2)
    visible = visible_keys(torch.ones(1, 4, dtype=torch.bool), settings)[0, 0]
    assert visible.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("settings", [PLAIN, FULL])
def test_scores_and_probabilities(settings):
    queries, keys = torch.randn(3, 6, 4, 3, dtype=torch.float64), torch.randn(3, 6, 2, 3, dtype=torch.float64)
    visible = visible_keys(MASK, settings)
    scores = attention_scores(queries, keys, settings)
    made = attention_probabilities(scores, visible, settings.sinks)
    for row in range(3):
        for head in range(4):
            for query in range(6):
                values = [
                    float(settings.scaling * queries[row, query, head] @ keys[row, key, head // 2]) for key in range(6)
                ]
                if settings.softcap:
                    values = [settings.softcap * math.tanh(value / settings.softcap) for value in values]
                assert scores[row, head, query].tolist() == pytest.approx(values, rel=1e-12)
                seen = [math.exp(value) if visible[row, 0, query, key] else 0.0 for key, value in enumerate(values)]
                total = sum(seen) + (math.exp(settings.sinks[head]) if settings.sinks else 0.0)
                expected = [value / total if value else 0.0 for value in seen]
                assert made[row, head, query].tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_scores_are_float32_of_halves_and_under_autocast():
    queries, keys = torch.randn(2, 5, 4, 3).bfloat16(), torch.randn(2, 5, 2, 3).bfloat16()
    expected = attention_scores(queries.double(), keys.double(), PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = attention_scores(queries, keys, PLAIN)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [PLAIN, FULL])
def test_gradients(settings):
    queries = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    sinks = None if settings.sinks is None else torch.tensor(settings.sinks, dtype=torch.float64, requires_grad=True)
    visible = visible_keys(MASK[1:, :4], settings)

    def probabilities(queries, keys, *sinks):
        return attention_probabilities(attention_scores(queries, keys, settings), visible, *sinks)

    assert torch.autograd.gradcheck(probabilities, (queries, keys) if sinks is None else (queries, keys, sinks))


@pytest.mark.parametrize("sinks", [None, (1.0, 2.0)])
def test_what_is_not_visible_reaches_neither_values_nor_gradients(sinks):
    scores = torch.randn(1, 2, 3, 3)
    visible = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)[None, None]
    made = []
    for filler in (0.0, math.nan, math.inf, -math.inf):
        given = torch.where(visible, scores, filler).requires_grad_()
        probabilities = attention_probabilities(given, visible, sinks)
        (gradient,) = torch.autograd.grad(probabilities.square().sum(), given)
        made.append((probabilities.detach(), gradient))
        assert (probabilities[~visible.expand_as(probabilities)] == 0).all() and gradient.isfinite().all()
    for probabilities, gradient in made[1:]:
        assert torch.equal(probabilities, made[0][0]) and torch.equal(gradient, made[0][1])


@pytest.mark.parametrize(
    "shapes", [((1, 5, 4, 3), (1, 5, 4, 3)), ((1, 5, 2, 3), (1, 5, 2, 3)), ((1, 5, 4, 3), (1, 4, 2, 3))]
)
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"queries \[B, S, 4, 3\] and keys \[B, S, 2, 3\] expected; got"):
        attention_scores(*map(torch.zeros, shapes), PLAIN)


@pytest.mark.parametrize("settings", [PLAIN, FULL])
def test_settings_survive_json(settings):
    assert AttentionSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0}, {"heads": True}, {"heads": 2.0}, {"heads": 2**40}, {"heads": 3}, {"key_heads": 0},
        {"head_dim": "3"}, {"scaling": None}, {"scaling": math.nan}, {"scaling": "1"}, {"softcap": 0},
        {"softcap": -1.0}, {"softcap": []},
        {"window": 0}, {"window": 2.5}, {"causal": 1}, {"causal": None}, {"sinks": [1.0]}, {"sinks": "1234"},
        {"sinks": [1.0, 2.0, 3.0, math.inf]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_of_a_stranger(change):
    with pytest.raises(StoreCorrupt, match="attention settings of a column: .* expected; got"):
        AttentionSettings.from_json({**FULL.to_json(), **change})


@pytest.mark.parametrize("data", [None, [], "x", {}, {"heads": 1}])
def test_no_settings_at_all(data):
    with pytest.raises(StoreCorrupt, match="an object of heads, key_heads"):
        AttentionSettings.from_json(data)
