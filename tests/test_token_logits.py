"""What is kept of each position equals a dense float64 computation, and [positions, vocabulary] never exists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from predistill.store import ConfigError, schema
from predistill.store.codecs import codec_of
from predistill.store.head import Head
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.logits import tokens as token_logits
from predistill.teacher_dump.logits.fidelity import position_bytes
from predistill.teacher_dump.logits.tokens import CHUNK_BYTES, TokenLogits, inverse_cdf, row_uniforms
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

V, D, N = 300, 16, 40


def config(**more: Any) -> DumpConfig:
    given = {"teacher": "a/b", "dataset": "c/d", "task": "causal-lm", "output_dir": "out", "dtype": "float32", **more}
    return DumpConfig(**given)


def problem(vocabulary: int = V, count: int = N) -> tuple[Head, Tensor, Tensor]:
    """A soft-capped head with bias, hidden states [N, D], and targets of which every fourth is missing."""
    generator = torch.Generator().manual_seed(3)
    head = Head(
        torch.randn(vocabulary, D, generator=generator), torch.randn(vocabulary, generator=generator), 0.7, 15.0
    )
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    return head, torch.randn(count, D, generator=generator), targets.where(torch.arange(count) % 4 > 0, -100)


def dense(head: Head, hidden: Tensor) -> Tensor:
    assert head.bias is not None and head.softcap is not None
    product = hidden.double() @ head.weight.double().T + head.bias.double()
    return head.softcap * torch.tanh(head.scale * product / head.softcap)


def uniforms(count: int = N) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).random(count))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "memory" not in request.node.name:
        monkeypatch.setattr(token_logits, "CHUNK_BYTES", 7 * V * 12)  # 7 positions


def test_top_k_is_exact_at_every_temperature_asked_for() -> None:
    head, hidden, targets = problem()
    kept = TokenLogits(config(top_k_logits=20, temperatures=[2.0, 0.5, 1.0]), V).keep(head, hidden, targets)
    logits = dense(head, hidden)
    values, indices = logits.topk(20)
    assert torch.equal(kept[schema.TOP_K_INDICES].long(), indices)
    relative = kept[schema.TOP_K_LOGITS].double()
    torch.testing.assert_close(relative, values - values[:, :1], rtol=0, atol=4e-6)
    assert (relative[:, 0] == 0).all() and (relative.diff(dim=1) <= 0).all()
    for temperature in (1.0, 2.0, 0.5):
        normaliser = kept[schema.logsumexp_column(temperature)].double()[:, None]
        expected = torch.log_softmax(logits / temperature, dim=1).gather(1, indices)
        torch.testing.assert_close(relative / temperature - normaliser, expected, rtol=1e-6, atol=4e-6)
    logprobs = torch.log_softmax(logits, dim=1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    torch.testing.assert_close(kept["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept["max_logprob"].double(), logprobs.amax(dim=1), rtol=1e-5, atol=1e-6)
    label = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0].where(targets >= 0, 0)
    torch.testing.assert_close(kept[schema.LABEL_LOGPROBS].double(), label, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_relative_logits_are_rounded_once(dtype: str) -> None:
    head, hidden, targets = problem()
    head = Head(head.weight, torch.full((V,), 500.0))  # half precision knows multiples of 0.25 there
    exact = TokenLogits(config(top_k_logits=8), V).keep(head, hidden, targets)
    kept = TokenLogits(config(top_k_logits=8, dtype=dtype), V).keep(head, hidden, targets)
    assert torch.equal(kept[schema.TOP_K_LOGITS].float(), exact[schema.TOP_K_LOGITS].to(getattr(torch, dtype)).float())


def test_top_p_keeps_the_fewest_that_have_the_mass() -> None:
    head, hidden, targets = problem()
    kept = TokenLogits(config(top_k_logits=12, top_p=0.6), V).keep(head, hidden, targets)
    probabilities = torch.softmax(dense(head, hidden), dim=1).sort(descending=True).values
    counts = kept[schema.TOP_K_COUNTS]
    for count, row, logits, ids in zip(
        counts.tolist(), probabilities, kept[schema.TOP_K_LOGITS], kept[schema.TOP_K_INDICES], strict=True
    ):
        fewest = next((k for k in range(1, 13) if row[:k].sum() >= 0.6), 12)
        assert count == fewest
        assert (logits[count:] == -65504).all() and (ids[count:] == 0).all() and (logits[:count] > -65504).all()
    assert 1 < counts.min() + 1 <= counts.max() == 12


def test_a_certain_teacher_keeps_one() -> None:
    logits = torch.zeros(3, V)
    logits[:, 7] = 90.0
    kept = TokenLogits(config(top_k_logits=12, top_p=1.0), V).keep_from_logits(logits, torch.full((3,), 7))
    assert kept[schema.TOP_K_COUNTS].tolist() == [1, 1, 1] and (kept[schema.LABEL_LOGPROBS] == 0).all()


def test_dense_keeps_logits_as_the_teacher_gives_them() -> None:
    head, hidden, targets = problem()
    way = TokenLogits(config(), V)  # a vocabulary of at most 1024
    assert way.kind == "dense" and way.settings["top_k_logits"] == 0
    kept = way.keep(head, hidden, targets)
    torch.testing.assert_close(kept[schema.LOGITS].double(), dense(head, hidden), rtol=1e-5, atol=1e-5)
    assert TokenLogits(config(), 2000).k == 64


def test_draws_are_unbiased_and_within_one() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 3
    p, rounds, draws = torch.softmax(logits.double(), dim=1)[0], 20_000, 12
    way = TokenLogits(config(sampled_logits=draws), V)
    kept = way.keep_from_logits(logits.expand(rounds, V).clone(), torch.full((rounds,), -100), uniforms(rounds))
    ids, counts, sizes = (
        kept[name].long() for name in (schema.SAMPLE_INDICES, schema.SAMPLE_COUNTS, schema.SAMPLE_SIZES)
    )
    assert (counts.sum(dim=1) == draws).all() and ((counts > 0).sum(dim=1) == sizes).all()
    there = torch.arange(draws) < sizes[:, None]
    assert (ids.diff(dim=1)[there[:, 1:]] > 0).all()
    assert ((counts - draws * p[ids]).abs()[there] < 1 + 1e-5).all()
    mean = torch.zeros(V, dtype=torch.float64).scatter_add_(0, ids.flatten(), counts.double().flatten()) / rounds
    spread = (draws * p * rounds).clamp(min=1).sqrt() / rounds  # of a sum of less than `rounds` Bernoulli draws
    assert ((mean - draws * p).abs() <= 5 * spread).all()


def test_draws_at_another_temperature_carry_what_corrects_for_it() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 2
    p, rounds, draws = torch.softmax(logits.double(), dim=1)[0], 20_000, 30
    way = TokenLogits(config(sampled_logits=draws, sample_temperature=2.0), V)
    kept = way.keep_from_logits(logits.expand(rounds, V).clone(), torch.full((rounds,), -100), uniforms(rounds))
    q = torch.softmax(logits.double() / 2, dim=1)[0]
    ids, there = kept[schema.SAMPLE_INDICES].long(), kept[schema.SAMPLE_COUNTS] > 0
    ratios = kept[schema.SAMPLE_RATIOS].double()
    torch.testing.assert_close(ratios[there], (p / q)[ids][there], rtol=1e-5, atol=0)
    weights = (kept[schema.SAMPLE_COUNTS] * ratios / draws).double()
    mean = torch.zeros(V, dtype=torch.float64).scatter_add_(0, ids.flatten(), weights.flatten()) / rounds
    spread = p / q * (q / draws).clamp(min=1 / rounds / draws**2).sqrt() / rounds**0.5
    assert ((mean - p).abs() <= 5 * spread).all()


@pytest.mark.parametrize(("vocabulary", "draws"), [(5, 3), (128, 255), (1000, 1), (5000, 7), (4096, 4)])
def test_inverse_cdf_is_that_of_a_search_over_all(vocabulary: int, draws: int) -> None:
    rng = np.random.default_rng(vocabulary)
    weights = rng.random((6, vocabulary)).astype(np.float32) ** 4
    weights[:, rng.random(vocabulary) < 0.3] = 0
    shares = rng.random((6, draws))
    ids, total = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(shares))
    ends = weights.astype(np.float64).cumsum(axis=1)
    np.testing.assert_allclose(total, ends[:, -1], rtol=1e-6)
    for row in range(6):
        expected = np.searchsorted(ends[row], shares[row] * ends[row, -1], side="right")
        assert (ids[row].numpy() == expected).mean() >= 0.99  # a share may fall on a border
        assert (weights[row][ids[row]] > 0).all()


def test_uniforms_belong_to_the_row() -> None:
    first, second = np.arange(16, dtype=np.uint8), np.arange(1, 17, dtype=np.uint8)
    values = row_uniforms(first, 1000)
    assert np.array_equal(row_uniforms(first, 10), values[:10]) and ((values >= 0) & (values < 1)).all()
    assert not np.isin(row_uniforms(second, 1000), values).any()
    assert abs(values.mean() - 0.5) < 5 / (12 * 1000) ** 0.5
    assert values[:2].tolist() == [0.7761366048984066, 0.9612052412461628]  # stores of all versions draw alike


@pytest.mark.parametrize("more", [{"top_k_logits": 9}, {"top_k_logits": 9, "top_p": 0.5}, {"sampled_logits": 9}, {}])
def test_other_chunks_and_own_logits_give_the_same(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = problem()
    way = TokenLogits(config(**more), V)
    kept = way.keep(head, hidden, targets, uniforms())
    monkeypatch.setattr(token_logits, "CHUNK_BYTES", CHUNK_BYTES)
    for other in (
        way.keep(head, hidden, targets, uniforms()),
        way.keep_from_logits(head.logits(hidden), targets, uniforms()),
    ):
        assert kept.keys() == other.keys() >= {spec.name for spec in way.fields("S")}
        for name, values in kept.items():
            torch.testing.assert_close(other[name], values, rtol=1e-5, atol=1e-5)
    none = way.keep(head, hidden[:0], targets[:0], uniforms(0))
    assert {name: values.shape[1:] for name, values in none.items()} == {
        name: values.shape[1:] for name, values in kept.items()
    } and all(len(values) == 0 for values in none.values())


def test_ruled_out_ids_have_no_probability_and_nan_is_not_hidden() -> None:
    logits = torch.randn(2, V)
    logits[:, 5:] = -torch.inf
    logits[1, 0] = torch.nan
    kept = TokenLogits(config(top_k_logits=9), V).keep_from_logits(logits, torch.tensor([3, 3]))
    assert (kept[schema.TOP_K_LOGITS][0, 5:] == -65504).all() and kept["entropy"][0] <= np.log(5)
    assert all(values[0].isfinite().all() for values in kept.values())
    assert kept[schema.TOP_K_LOGITS][1].isnan().all() and kept[schema.LOGSUMEXP][1].isnan()


@pytest.mark.parametrize(
    ("more", "size"),
    [
        ({"top_k_logits": 64, "dtype": "float16"}, 136 + 128 + 4 + 4),  # 64 ids of 17 bits, 64 halves
        ({"top_k_logits": 64, "dtype": "int8"}, 136 + 64 + 4 + 4 + 4),  # a scale
        ({"top_k_logits": 64, "temperatures": [2.0, 4.0]}, 136 + 256 + 4 * 4),
        ({"top_k_logits": 64, "top_p": 0.9, "dtype": "float16"}, 2 + 22 + 20 + 4 + 4),  # 10 entries
        ({"sampled_logits": 50}, 2 + 22 + 10 + 4 + 4),
        ({"sampled_logits": 50, "sample_temperature": 2.0}, 2 + 22 + 10 + 20 + 4 + 4),
        ({"top_k_logits": 0, "dtype": "bfloat16"}, 2 * 131072),
    ],
)
def test_sizes(more: dict[str, Any], size: int) -> None:
    assert position_bytes(TokenLogits(config(**more), 131072).fields("P"), 10) == size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_what_is_kept_goes_through_its_codec(dtype: str) -> None:
    head, hidden, targets = problem()
    way = TokenLogits(config(top_k_logits=20, dtype=dtype), V)
    kept = way.keep(head, hidden, targets)
    for spec in way.fields("S"):
        values = kept[spec.name]
        given = (values.float() if values.is_floating_point() else values).numpy()
        codec = codec_of(spec)
        parts = codec.encode(given, spec)
        decoded = codec.decode(parts, spec)
        step = np.abs(given).max() / 510 if spec.codec == "uint8" else 0
        np.testing.assert_allclose(decoded, given, rtol=0, atol=step * 1.01)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"top_k_logits": V + 1}, rf"--top-k-logits {V + 1}: the teacher has {V} entries"),
        ({"dtype": "int8"}, "--dtype int8 is for top-k logits"),
        ({"top_p": 0.5}, "--top-p 0.5 shortens the top k; give --top-k-logits"),
    ],
)
def test_settings_that_a_vocabulary_does_not_allow(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TokenLogits(config(**more), V)


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still there: the most at one time, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = [leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


@pytest.mark.parametrize(
    ("positions", "dtype", "more"),
    [
        (2048, torch.float32, {"top_k_logits": 64}),  # in float32, one [2048, 150000] has 1229 MB
        (128, torch.bfloat16, {"top_k_logits": 64, "temperatures": [2.0]}),
        (128, torch.float32, {"sampled_logits": 50}),
        (128, torch.float32, {"sampled_logits": 255, "sample_temperature": 2.0}),
    ],
)
def test_memory_at_150000_entries(positions: int, dtype: torch.dtype, more: dict[str, Any]) -> None:
    """All that is made and kept stays below CHUNK_BYTES, twice what is kept, and 8 MB."""
    vocabulary = 150_000
    head = Head(torch.randn(vocabulary, 16, dtype=dtype), softcap=30.0)
    hidden, targets = torch.randn(positions, 16, dtype=dtype), torch.zeros(positions, dtype=torch.int64)
    with torch.inference_mode(), Allocations() as seen:
        kept = TokenLogits(config(**more), vocabulary).keep(head, hidden, targets, uniforms(positions))
    stored = sum(values.nbytes for values in kept.values())
    assert len(kept[schema.LOGSUMEXP]) == positions and seen.largest < CHUNK_BYTES / 2
    assert CHUNK_BYTES / 2 < seen.peak < CHUNK_BYTES + 2 * stored + 8 * 2**20
