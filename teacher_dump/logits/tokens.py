"""What is kept of a language model's logits: all, the top k, or draws; computed a chunk of positions at a time.

N positions, V vocabulary, K kept entries, D width, C positions of a chunk. Logits are float32 and relative to their
position's largest before anything is rounded; [N, V] never exists: a chunk's [C, V] arrays together take at most
CHUNK_BYTES (CHUNK_BYTES_ON_DEVICES), or one position's where that is more.

Draws: systematic sampling of sparse teacher distributions (Anshumann et al. 2025, "Sparse Logit Sampling", who draw
independently): thresholds (i + u) / n on the cumulated probabilities, one uniform u a position, so that the counts are
unbiased and within 1 of n p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...store import ConfigError, FieldSpec, schema
from ...store.head import Head
from ..config import DumpConfig

CHUNK_BYTES = 128 * 2**20  # on a CPU; V = 152,000: 706 ms with 32 MB, 458 with 128 MB, 431 with 256 MB
CHUNK_BYTES_ON_DEVICES = 2**30  # whose kernels want hundreds of positions, and whose memory holds a teacher
LOWEST = -65504.0  # relative logit of what the model rules out: the least of float16, and no probability at all
NO_TARGET = schema.MISSING_LABEL
DENSE, TOP_K, SAMPLED = "dense", "top-k", "sampled"
DENSE_BELOW = 1024  # a smaller vocabulary is kept whole unless something else is asked for
DEFAULT_TOP_K = 64
MAX_LOGPROB, ENTROPY = "max_logprob", "entropy"
_BLOCK = 128  # ids whose probabilities are summed together
_COPIES = 3  # [C, V] float32 at one time: the product, float32 logits, a scratch array


def row_uniforms(content_hash: np.ndarray, size: int) -> np.ndarray:
    """float64 [size] in [0, 1): a row's own random numbers, whatever batch, rank or run asks for them.

    content_hash: uint8 [16], the key of a Philox counter (Salmon et al. 2011); a longer row continues a shorter one's.
    """
    raw = np.random.Philox(key=np.ascontiguousarray(content_hash, np.uint8).view(np.uint64)).random_raw(size)
    return (raw >> np.uint64(11)) * 2.0**-53


class Scores(NamedTuple):
    """A chunk's logits relative to their largest, [C, V] float32, none above 0; and log Σ exp of them, [C]."""

    relative: Tensor
    logsumexp: Tensor


class TokenLogits:
    """How the logits of each position are stored. Raises ConfigError for settings that V entries do not allow."""

    def __init__(self, config: DumpConfig, vocabulary: int):
        self.vocabulary, self.dtype = vocabulary, config.dtype
        self.top_p, self.draws = config.top_p, config.sampled_logits
        self.temperatures = sorted({float(one) for one in config.temperatures} - {1.0})
        self.proposal = float(config.sample_temperature)
        self.k = _kept(config, vocabulary)
        self.kind = SAMPLED if self.draws else TOP_K if self.k else DENSE
        if self.dtype == "int8" and self.kind != TOP_K and config.keeps_inner:  # which it is for, then
            self.dtype = "float16"
        self.settings: dict[str, Any] = {
            "top_k_logits": None if self.draws else self.k, "top_p": self.top_p, "sampled_logits": self.draws,
            "dtype": self.dtype, "temperatures": self.temperatures, "sample_temperature": self.proposal,
        }  # fmt: skip
        _check(self)

    def fields(self, symbol: str) -> list[FieldSpec]:
        """Columns of one position each; symbol: "S" where every input position is kept, "P" where some are."""
        if self.kind == DENSE:
            return [FieldSpec(schema.LOGITS, (symbol, self.vocabulary), self.dtype)]
        columns = self._top_k_fields(symbol) if self.kind == TOP_K else self._sampled_fields(symbol)
        names = [schema.LOGSUMEXP, *map(schema.logsumexp_column, self.temperatures), schema.LABEL_LOGPROBS]
        return [*columns, *(FieldSpec(name, (symbol,), "float32") for name in names)]

    def keep(self, head: Head, hidden: Tensor, targets: Tensor, uniforms: Tensor | None = None) -> dict[str, Tensor]:
        """Everything that is stored of N positions, by column, on the head's device.

        hidden: [N, D]. targets: int64 [N], the next token or -100. uniforms: float64 [N] in [0, 1), for draws only.
        Entries that differ in number come padded, [N, K]. Beside the columns: max_logprob, entropy: float32 [N], nats.
        """
        parts = chunks(len(hidden), self.vocabulary, head.weight.device)
        return self._chunked(parts, lambda part: head.logits(hidden[part]), targets, uniforms)

    def keep_from_logits(self, logits: Tensor, targets: Tensor, uniforms: Tensor | None = None) -> dict[str, Tensor]:
        """The same from logits [N, V], for a model whose head cannot be split."""
        parts = chunks(len(logits), self.vocabulary, logits.device)
        return self._chunked(parts, lambda part: logits[part].to(torch.float32, copy=True), targets, uniforms)

    def _chunked(
        self, parts: Iterator[slice], logits: Callable[[slice], Tensor], targets: Tensor, uniforms: Tensor | None
    ) -> dict[str, Tensor]:
        made = [
            self._chunk(logits(part), targets[part], None if uniforms is None else uniforms[part]) for part in parts
        ]
        return {name: torch.cat([one[name] for one in made]) for name in made[0]}

    def _chunk(self, logits: Tensor, targets: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """logits: float32 [C, V], overwritten."""
        kept = {schema.LOGITS: logits.clone()} if self.kind == DENSE else {}
        scores, scratch, more = score(logits)
        kept.update(more)
        kept[schema.LABEL_LOGPROBS] = label_logprobs(scores, targets.to(logits.device))
        for temperature in self.temperatures:
            kept[schema.logsumexp_column(temperature)] = logsumexp_at(scores, temperature, scratch)
        if self.kind == TOP_K:
            kept.update(self._top(scores))
        elif self.kind == SAMPLED:
            if uniforms is None:
                raise ConfigError("draws need one uniform number a position; got none")
            kept.update(draw(scores, self.draws or 0, uniforms.to(logits.device), self.proposal, scratch))
        return kept

    def _top(self, scores: Scores) -> dict[str, Tensor]:
        values, indices = scores.relative.topk(self.k, dim=-1)
        kept = {schema.TOP_K_LOGITS: _stored(values, self.dtype), schema.TOP_K_INDICES: indices.int()}
        if self.top_p is not None:
            counts = top_p_counts(values, scores.logsumexp, self.top_p)
            beyond = torch.arange(self.k, device=counts.device) >= counts[:, None]
            kept[schema.TOP_K_LOGITS] = kept[schema.TOP_K_LOGITS].masked_fill(beyond, LOWEST)
            kept[schema.TOP_K_INDICES] = kept[schema.TOP_K_INDICES].masked_fill(beyond, 0)
            kept[schema.TOP_K_COUNTS] = counts
        return kept

    def _top_k_fields(self, symbol: str) -> list[FieldSpec]:
        ragged = self.top_p is not None
        size: int | str = "K" if ragged else self.k
        more = {"vocabulary": self.vocabulary, **({"counts": schema.TOP_K_COUNTS} if ragged else {})}
        codec, dtype = ("uint8", "float32") if self.dtype == "int8" else ("dense", self.dtype)
        counts = [FieldSpec(schema.TOP_K_COUNTS, (symbol,), "uint16")] if ragged else []
        return [
            *counts,
            _ids(schema.TOP_K_INDICES, (symbol, size), more),
            FieldSpec(schema.TOP_K_LOGITS, (symbol, size), dtype, codec, pad=LOWEST if ragged else 0, parameters=more),
        ]

    def _sampled_fields(self, symbol: str) -> list[FieldSpec]:
        more = {"vocabulary": self.vocabulary, "counts": schema.SAMPLE_SIZES}
        shape, drawn = (symbol, "K"), {**more, "draws": self.draws, "temperature": self.proposal}
        fields = [
            FieldSpec(schema.SAMPLE_SIZES, (symbol,), "uint16"),
            _ids(schema.SAMPLE_INDICES, shape, more),
            FieldSpec(schema.SAMPLE_COUNTS, shape, "uint8", parameters=drawn),
        ]
        if self.proposal != 1:
            fields.append(FieldSpec(schema.SAMPLE_RATIOS, shape, "float16", parameters=more))
        return fields


def chunks(count: int, vocabulary: int, device: torch.device, copies: int = _COPIES) -> Iterator[slice]:
    """Positions of which `copies` float32 [C, V] together take CHUNK_BYTES; one empty chunk where there are none."""
    size = max(1, (CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_ON_DEVICES) // (vocabulary * 4 * copies))
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


def score(logits: Tensor) -> tuple[Scores, Tensor, dict[str, Tensor]]:
    """(relative logits, a scratch array as large, {log-sum-exp, max_logprob, entropy}); logits [C, V] is overwritten.

    entropy = log Σ exp z − Σ z exp z / Σ exp z, in nats, of relative logits z.
    """
    relative = logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=LOWEST)
    scratch = torch.exp(relative)
    total = scratch.sum(dim=-1)
    logsumexp = total.log()
    mean = scratch.mul_(relative).sum(dim=-1) / total
    found = {schema.LOGSUMEXP: logsumexp, MAX_LOGPROB: -logsumexp, ENTROPY: logsumexp - mean}
    return Scores(relative, logsumexp), scratch, found


def logsumexp_at(scores: Scores, temperature: float, scratch: Tensor) -> Tensor:
    """[C]: log Σ exp(z / T)."""
    return torch.mul(scores.relative, 1 / temperature, out=scratch).exp_().sum(dim=-1).log()


def label_logprobs(scores: Scores, targets: Tensor) -> Tensor:
    """[C]: log p(target), 0 where there is none (-100)."""
    known = targets != NO_TARGET
    at = scores.relative.gather(1, targets.where(known, 0)[:, None])[:, 0]
    return (at - scores.logsumexp).where(known, 0)


def top_p_counts(values: Tensor, logsumexp: Tensor, top_p: float) -> Tensor:
    """int32 [C]: how many of values [C, K], in descending order, have the mass `top_p`; at least one, at most K."""
    mass = (values - logsumexp[:, None]).exp().cumsum(dim=-1)
    return 1 + (mass[:, :-1] < top_p).sum(dim=-1, dtype=torch.int32)


def draw(scores: Scores, draws: int, uniforms: Tensor, proposal: float, scratch: Tensor) -> dict[str, Tensor]:
    """`draws` systematic draws from softmax(z / proposal): different ids in ascending order, [C, K] padded with 0, the
    draws of each, and p / q of each where the proposal is not the teacher's own distribution. uniforms: float64 [C]."""
    weights = torch.mul(scores.relative, 1 / proposal, out=scratch).exp_()
    steps = torch.arange(draws, dtype=torch.float64, device=weights.device)
    drawn, total = inverse_cdf(weights, (steps + uniforms[:, None]) / draws)
    ids, counts, sizes = run_lengths(drawn)
    kept = {schema.SAMPLE_INDICES: ids.int(), schema.SAMPLE_COUNTS: counts.int(), schema.SAMPLE_SIZES: sizes.int()}
    if proposal != 1:
        relative = scores.relative.gather(1, ids)
        own, other = relative - scores.logsumexp[:, None], relative / proposal - total[:, None].log()
        kept[schema.SAMPLE_RATIOS] = (own - other).exp().clamp(max=-LOWEST).where(counts > 0, 0).float()
    return kept


def inverse_cdf(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """(the first id at which the cumulated weights [C, V] exceed each share [C, n] of their sum, int64 [C, n]; the sum,
    float64 [C]). First the block of ids, then the id in it: cumulating all V in float64 takes half as long as a head of
    width 512, this a fiftieth. A block's probability is a float32 sum, so ids are drawn to one part in 10**6."""
    vocabulary = weights.shape[1]
    block = max(1, min(_BLOCK, vocabulary // (8 * shares.shape[1])))  # so that [C, n, block] is less than [C, V]
    whole = vocabulary // block * block
    sums = weights[:, :whole].unflatten(1, (-1, block)).sum(dim=-1).double()
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True).double()], dim=1)
    ends = sums.cumsum(dim=-1)
    wanted = shares * ends[:, -1:]
    at = torch.searchsorted(ends, wanted, right=True).clamp_(max=sums.shape[1] - 1)
    ids = at[:, :, None] * block + torch.arange(block, device=at.device)
    inside = weights.gather(1, ids.flatten(1).clamp(max=vocabulary - 1)).view(ids.shape).double()
    inside = inside.where(ids < vocabulary, 0)
    left = wanted - (ends - sums).gather(1, at)
    offset = torch.searchsorted(inside.cumsum(dim=-1), left[:, :, None], right=True)[:, :, 0]
    last = torch.where(inside > 0, torch.arange(block, device=at.device), 0).amax(dim=-1)  # where rounding goes beyond
    return at * block + torch.minimum(offset, last), ends[:, -1]


def run_lengths(ordered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(different values [C, n], how often each [C, n], how many [C]) of ascending rows int64 [C, n]; padded with 0."""
    fresh = torch.ones_like(ordered)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = fresh.cumsum(dim=-1) - 1
    values = torch.zeros_like(ordered).scatter_(1, place, ordered)
    counts = torch.zeros_like(ordered).scatter_add_(1, place, torch.ones_like(ordered))
    return values, counts, place[:, -1] + 1


def _kept(config: DumpConfig, vocabulary: int) -> int:
    """K of top-k; 0 where all are kept."""
    if config.top_k_logits is not None:
        return config.top_k_logits
    return 0 if config.sampled_logits or vocabulary <= DENSE_BELOW else DEFAULT_TOP_K


def _check(kept: TokenLogits) -> None:
    if kept.k > kept.vocabulary:
        raise ConfigError(f"--top-k-logits {kept.k}: the teacher has {kept.vocabulary} entries; keep at most as many")
    if kept.kind == DENSE and kept.dtype == "int8":
        raise ConfigError("--dtype int8 is for top-k logits; all logits are kept here: give --top-k-logits, or float16")
    if kept.kind != TOP_K and kept.top_p is not None:
        raise ConfigError(f"--top-p {kept.top_p:g} shortens the top k; give --top-k-logits, the most that are kept")


def _ids(name: str, shape: tuple[int | str, ...], parameters: dict[str, Any]) -> FieldSpec:
    bits = max(1, (parameters["vocabulary"] - 1).bit_length())
    return FieldSpec(name, shape, "int32", "bitpack", parameters={"bits": bits, **parameters})


def _stored(values: Tensor, dtype: str) -> Tensor:
    """In the dtype that is stored, where torch and the codec agree on it; rounding here halves what is copied."""
    return values.half() if dtype == "float16" else values.bfloat16() if dtype == "bfloat16" else values
