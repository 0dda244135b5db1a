"""The table of a plan equals KL divergences between distributions written out whole; a budget picks from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from predistill.store import ConfigError, DataError, FieldSpec, bytes_per_row, schema
from predistill.store.codecs import bfloat16_to_float32, float32_to_bfloat16
from predistill.store.head import Head
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.logits.fidelity import Candidate, Distributions, Loss, choose, measure, position_bytes
from predistill.teacher_dump.logits.tokens import TokenLogits, draw, score
from torch import Tensor

V, N = 400, 24


def config(**more: Any) -> DumpConfig:
    return DumpConfig(**{"teacher": "a/b", "dataset": "c/d", "task": "causal-lm", "output_dir": "out", **more})


def logits() -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 3 + 11


def lost(**more: Any) -> Loss:
    return measure(logits(), [TokenLogits(config(**more), V)], torch.linspace(0, 0.99, N, dtype=torch.float64))[0]


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """values [K] <= 0 as stored: by the definition of each dtype."""
    if dtype == "int8":
        scale = np.float32(-values.min()) / np.float32(255)
        return np.rint(values / scale) * scale if scale else values
    if dtype == "bfloat16":
        return bfloat16_to_float32(float32_to_bfloat16(values))
    return values.astype(dtype)


def rebuilt(row: np.ndarray, k: int, dtype: str, temperature: float, known: bool) -> np.ndarray:
    """float64 [V]: the distribution at `temperature` that a reader can make of the top k of logits [V]."""
    order = np.argsort(-row)
    top = rounded((row[order[:k]] - row.max()).astype(np.float32), dtype).astype(np.float64)
    q = np.empty(V)
    mass = np.exp(row.astype(np.float64) - row.max()).sum()
    rest = 1 - (np.exp(top) / mass).sum()
    if temperature == 1 or known:
        total = np.exp((row.astype(np.float64) - row.max()) / temperature).sum()
        q[order[:k]] = np.exp(top / temperature) / total
        q[order[k:]] = (1 - q[order[:k]].sum()) / (V - k)
    else:
        q[order[:k]], q[order[k:]] = np.exp(top) / mass, rest / (V - k)
        q = q ** (1 / temperature)
    return q / q.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def softmax(row: np.ndarray, temperature: float) -> np.ndarray:
    p = np.exp((row.astype(np.float64) - row.max()) / temperature)
    return p / p.sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_top_k(dtype: str) -> None:
    found = lost(top_k_logits=20, dtype=dtype)
    for at, row in enumerate(logits().numpy()):
        p = softmax(row, 1)
        assert found.entries[at] == 20
        assert found.mass[at] == pytest.approx(np.sort(p)[-20:].sum(), rel=1e-6)
        assert found.kl[at] == pytest.approx(kl(p, rebuilt(row, 20, dtype, 1, True)), rel=1e-4, abs=1e-9)
        hot = softmax(row, 2)
        assert found.kl_at_2[at] == pytest.approx(kl(hot, rebuilt(row, 20, dtype, 2, False)), rel=1e-4)
        assert found.kl_at_2_with_logsumexp[at] == pytest.approx(kl(hot, rebuilt(row, 20, dtype, 2, True)), rel=1e-4)


def test_top_p_is_top_k_of_each_positions_own_k() -> None:
    found = lost(top_k_logits=100, top_p=0.8)
    assert found.entries.unique().numel() > 3
    for at, row in enumerate(logits().numpy()):
        k, p = int(found.entries[at]), softmax(row, 1)
        assert found.mass[at] >= 0.8 - 1e-6 and np.sort(p)[-k:][1:].sum() < 0.8
        assert found.kl[at] == pytest.approx(kl(p, rebuilt(row, k, "float16", 1, True)), rel=1e-4)


def test_all_entries_in_float32_lose_nothing() -> None:
    for found in (lost(top_k_logits=V, dtype="float32"), lost(top_k_logits=0, dtype="float32")):
        for values in (found.kl, found.kl_at_2, found.kl_at_2_with_logsumexp):
            assert values.abs().max() < 1e-9
        torch.testing.assert_close(found.mass, torch.ones(N, dtype=torch.float64))


def test_dense() -> None:
    found = lost(top_k_logits=0, dtype="bfloat16")
    for at, row in enumerate(logits().numpy()):
        stored = bfloat16_to_float32(float32_to_bfloat16(row))
        assert found.kl[at] == pytest.approx(kl(softmax(row, 1), softmax(stored, 1)), rel=1e-6)
        assert found.kl_at_2[at] == pytest.approx(kl(softmax(row, 2), softmax(stored, 2)), rel=1e-6)


@pytest.mark.parametrize("proposal", [1.0, 1.5])
def test_draws(proposal: float) -> None:
    uniforms = torch.linspace(0, 0.99, N, dtype=torch.float64)
    found = lost(sampled_logits=10, sample_temperature=proposal)
    scores, scratch, _ = score(logits())
    drawn = draw(scores, 10, uniforms, proposal, scratch)
    for at, row in enumerate(logits().numpy()):
        p, hot = softmax(row, 1), softmax(row, proposal)
        size = int(drawn[schema.SAMPLE_SIZES][at])
        ids, counts = (drawn[name][at, :size].numpy() for name in (schema.SAMPLE_INDICES, schema.SAMPLE_COUNTS))
        weights = counts * p[ids] / hot[ids]
        q = np.full(V, 1 / 11 / (V - size))
        q[ids] = weights / weights.sum() * 10 / 11
        assert found.entries[at] == size and found.mass[at] == pytest.approx(p[ids].sum())
        assert found.kl[at] == pytest.approx(kl(p, q), rel=1e-5)
    assert found.kl_at_2.isnan().all()


def test_the_table_of_a_head() -> None:
    generator = torch.Generator().manual_seed(1)
    head = Head(torch.randn(V, 8, generator=generator) * 2)
    hidden = torch.randn(1000, 8, generator=generator)
    seen = Distributions(config(top_k_logits=100, dtype="bfloat16"), V, limit=200)
    for _ in range(3):
        assert seen.keep(head, hidden, torch.zeros(1000)) == {}
    assert seen.full and seen.seen == 200
    whole = Distributions(config(top_k_logits=100, dtype="bfloat16"), V, limit=200)
    for _ in range(3):
        whole.keep_from_logits(head.logits(hidden), torch.zeros(1000))
    table = seen.candidates()
    assert [one.name for one in table] == [one.name for one in whole.candidates()]
    by_name = {one.name: one for one in table}
    kept = [by_name[f"top {k}, float16"] for k in (8, 16, 32, 64, 128, 256)]
    assert [one.kl for one in kept] == sorted((one.kl for one in kept), reverse=True)
    assert [one.bytes_per_token for one in kept] == [k * (9 + 16) / 8 + 8 for k in (8, 16, 32, 64, 128, 256)]
    assert kept[-1].kl < kept[-1].kl_at_2_with_logsumexp <= kept[-1].kl_at_2 < kept[0].kl_at_2  # type: ignore[operator]
    assert by_name["top 100, bfloat16"].settings["dtype"] == "bfloat16"
    assert by_name["all, float16"].bytes_per_token == 2 * V and by_name["50 draws"].kl_at_2 is None
    assert 1 < by_name["top 256 up to p = 0.95, int8"].entries < 256


def test_logits_that_are_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="logits are expected to be finite"):
            Distributions(config(), V).keep_from_logits(torch.full((3, V), value), torch.zeros(3))
    with pytest.raises(DataError, match="no position whose logits are kept"):
        Distributions(config(), V).candidates()
    large = Distributions(config(), V)
    large.keep_from_logits(logits() + 70_000, torch.zeros(N))  # more than a float16 holds, unless it is relative
    names = [one.name for one in large.candidates()]
    assert "all, float16" not in names and "top 64, float16" in names


def test_a_small_vocabulary_has_fewer_candidates() -> None:
    seen = Distributions(config(), 5)
    seen.keep_from_logits(torch.randn(3, 5), torch.zeros(3))
    assert [one.name for one in seen.candidates()] == ["50 draws", "all, float16"]


def candidate(name: str, kl: float, size: int) -> Candidate:
    return Candidate({}, name, 1.0, 1.0, 1.0, kl, None, None, size)


def test_the_best_that_fits_is_chosen() -> None:
    table = [candidate("a", 0.1, 100), candidate("b", 0.01, 1000), candidate("c", 0.01, 900), candidate("d", 0.2, 500)]
    assert choose(table, 10**6).name == "c" and choose(table, 899).name == "a"
    with pytest.raises(ConfigError, match=r"--budget 9.9e-05 MB: the smallest store would have 0.0001 MB \(a\)"):
        choose(table, 99)


def test_bytes_of_a_position_are_those_of_a_row() -> None:
    for more in ({"top_k_logits": 64}, {"top_k_logits": 64, "top_p": 0.9}, {"sampled_logits": 50}):
        fields = TokenLogits(config(**more), 50_000).fields("S")
        ids = FieldSpec(schema.INPUT_IDS, ("S",), "int32", role="input")
        lengths = {"S": 7, "K": 12}
        row = bytes_per_row([ids, *fields], lengths) - bytes_per_row([ids, *fields], {**lengths, "S": 6})
        assert row == position_bytes(fields, 12) + 4


def test_a_candidate_is_a_config() -> None:
    seen = Distributions(config(temperatures=[2.0], budget="1GB"), V)
    seen.keep_from_logits(logits(), torch.zeros(N))
    for one in seen.candidates():
        way = TokenLogits(replace(config(temperatures=[2.0]), **one.settings), V)
        assert {name: way.settings[name] for name in one.settings} == one.settings
        assert position_bytes(way.fields("S"), one.entries) == one.bytes_per_token
