"""What ways of keeping logits cost and lose: bytes a token against the KL divergence to the exact distribution.

N positions, V vocabulary, K kept entries. A distribution is rebuilt from what a reader gets back, that is after the
codec's encode and decode: the kept entries as decoded, and the rest of the mass spread evenly over all other ids. Of
draws, which say nothing of the other ids, one draw's worth is spread over them: that measures one set of draws, and the
mean of many would be exact. KL(exact ‖ rebuilt), in nats, at T = 1, and at T = 2 with and without the log-sum-exp that
`--temperatures 2` stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...store import ConfigError, DataError, FieldSpec, schema
from ...store.codecs import codec_of, parts_of
from ...store.head import Head
from ..config import CHOSEN_BY_BUDGET, DumpConfig
from .tokens import DENSE, SAMPLED, TOP_K, TokenLogits, chunks, draw, score, top_p_counts

POSITIONS = 512  # of pilot rows
_A_BATCH = 128  # positions of one batch, so that they come from several rows
_KEPT = (8, 16, 32, 64, 128, 256)
_TOP_P = (0.95, 0.99)
_DRAWS = 50  # about 12 different ids, the number that Anshumann et al. 2025 recommend
_COPIES = 12  # [C, V] float32 at one time, those in float64 counted twice
_LEAST = 2.0**-24  # mass of all other ids where rounding left none


@dataclass(frozen=True)
class Candidate:
    """One way of keeping logits. entries: of a position, on average; bytes: of the whole store, where known."""

    settings: dict[str, Any]
    name: str
    bytes_per_token: float
    entries: float
    mass: float
    kl: float
    kl_at_2: float | None
    kl_at_2_with_logsumexp: float | None
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Loss(NamedTuple):
    """Of N positions, float64 [N] each, or their sums: entries kept, exact mass of them, and KL; NaN: not known."""

    entries: Any
    mass: Any
    kl: Any
    kl_at_2: Any
    kl_at_2_with_logsumexp: Any


class Distributions:
    """Takes the place of TokenLogits in a task's forward, and measures every candidate on the exact logits it sees.

    Its answers are empty. Raises ConfigError for settings that V entries do not allow, DataError for NaN.
    """

    def __init__(self, config: DumpConfig, vocabulary: int, limit: int = POSITIONS):
        self.ways = ways(config, vocabulary)
        self._limit, self.seen = limit, 0
        self._sums = [Loss(0.0, 0.0, 0.0, 0.0, 0.0) for _ in self.ways]
        self._random = np.random.default_rng(0)

    def keep(self, head: Head, hidden: Tensor, targets: Tensor, uniforms: Tensor | None = None) -> dict[str, Tensor]:
        """hidden: [N, D]; some of the positions, evenly spread, are looked at."""
        chosen = hidden[self._some(len(hidden)).to(hidden.device)]
        for part in self._parts(len(chosen), head.weight.device):
            self._look(head.logits(chosen[part]))
        return {}

    def keep_from_logits(self, logits: Tensor, targets: Tensor, uniforms: Tensor | None = None) -> dict[str, Tensor]:
        """logits: [N, V]."""
        chosen = logits[self._some(len(logits)).to(logits.device)]
        for part in self._parts(len(chosen), logits.device):
            self._look(chosen[part].float())
        return {}

    @property
    def full(self) -> bool:
        return self.seen >= self._limit

    def candidates(self) -> list[Candidate]:
        """Means over all positions seen, of the ways that can hold them. Raises DataError where there was none."""
        if not self.seen:
            raise DataError("the pilot rows have no position whose logits are kept; see --positions")
        made = [_candidate(way, sums, self.seen) for way, sums in zip(self.ways, self._sums, strict=True)]
        return [one for one in made if math.isfinite(one.kl)]

    def _some(self, count: int) -> Tensor:
        size = min(count, _A_BATCH, self._limit - self.seen)
        self.seen += max(size, 0)
        return torch.linspace(0, max(count - 1, 0), max(size, 0)).long()

    def _parts(self, count: int, device: torch.device) -> Sequence[slice]:
        return list(chunks(count, self.ways[0].vocabulary, device, _COPIES)) if count else []

    def _look(self, logits: Tensor) -> None:
        """logits: float32 [C, V]. Raises DataError where one is NaN or infinite; -inf rules an id out."""
        if not bool((logits < math.inf).all()):
            raise DataError(
                "the teacher's logits are expected to be finite, and in the pilot rows they are not: look at them, "
                "and at the teacher's own dtype (float16 teachers overflow; bfloat16 or float32 ones do not)"
            )
        logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
        uniforms = torch.from_numpy(self._random.random(len(logits))).to(logits.device)
        for at, loss in enumerate(measure(logits, self.ways, uniforms)):
            sums = zip(self._sums[at], loss, strict=True)
            self._sums[at] = Loss(*(before + float(now.sum()) for before, now in sums))


def ways(config: DumpConfig, vocabulary: int) -> list[TokenLogits]:
    """The candidates: a handful, and what `config` asks for."""
    sizes = [k for k in _KEPT if k < vocabulary]
    settings: list[dict[str, Any]] = [{"top_k_logits": k, "dtype": kind} for k in sizes for kind in ("float16", "int8")]
    for top_p in _TOP_P if sizes else ():
        settings += [{"top_k_logits": sizes[-1], "top_p": top_p, "dtype": kind} for kind in ("float16", "int8")]
    settings += [{"sampled_logits": _DRAWS}, {"top_k_logits": 0}]
    usual: dict[str, Any] = {"top_k_logits": None, "top_p": None, "sampled_logits": None, "dtype": "float16"}
    made = [
        TokenLogits(replace(config, budget=None, sample_temperature=1.0, **{**usual, **one}), vocabulary)
        for one in settings
    ]
    if config.budget is None:
        made.append(TokenLogits(config, vocabulary))
    return list({_name(one): one for one in made}.values())


def measure(logits: Tensor, kept: Sequence[TokenLogits], uniforms: Tensor) -> list[Loss]:
    """logits: float32 [C, V], overwritten; uniforms: float64 [C]. What each way loses at each position."""
    whole = {dtype: _dense(logits, dtype) for dtype in {one.dtype for one in kept if one.kind == DENSE}}
    scores, scratch, _ = score(logits)
    exact = _exact(scores.relative, max([one.k for one in kept if one.kind == TOP_K], default=1))
    losses = []
    for one in kept:
        if one.kind == DENSE:
            losses.append(whole[one.dtype])
        elif one.kind == TOP_K:
            losses.append(_top_k(exact, one))
        else:
            drawn = draw(scores, one.draws or 0, uniforms, one.proposal, scratch)
            losses.append(_drawn(exact, scores.relative, drawn, one.draws or 0))
    return losses


def choose(candidates: Sequence[Candidate], budget: int) -> Candidate:
    """The least KL at T = 1 of those whose `bytes` fit. Raises ConfigError naming the smallest where none does."""
    fitting = [one for one in candidates if one.bytes <= budget]
    if not fitting:
        least = min(candidates, key=lambda one: one.bytes)
        raise ConfigError(
            f"--budget {_size(budget)}: the smallest store would have {_size(least.bytes)} ({least.name}); give that "
            "much, or dump fewer rows"
        )
    return min(fitting, key=lambda one: (one.kl, one.bytes))


def position_bytes(fields: Sequence[FieldSpec], entries: float) -> float:
    """Bytes of one position in fields of shape ("S", ...) or ("P", ...); entries: kept where their number varies."""
    total = 0.0
    for spec in fields:
        for part in parts_of(spec):
            each = part.numpy_dtype.itemsize
            total += part.sizes(entries) * each if schema.is_ragged(part.shape) else part.entry_bytes
    return total


class _Exact(NamedTuple):
    """top: float64 [N, K], the largest logits relative to the largest; logsumexp and negentropy: [N] at T = 1 and 2."""

    top: Tensor
    logsumexp: dict[int, Tensor]
    negentropy: dict[int, Tensor]  # Σ p log p
    vocabulary: int


def _exact(relative: Tensor, most: int) -> _Exact:
    wide, logsumexp, negentropy = relative.double(), {}, {}
    for temperature in (1, 2):
        logsumexp[temperature] = torch.logsumexp(wide / temperature, dim=-1)
        logprobs = wide / temperature - logsumexp[temperature][:, None]
        negentropy[temperature] = (logprobs.exp() * logprobs).sum(dim=-1)
    return _Exact(wide.topk(most, dim=-1).values, logsumexp, negentropy, relative.shape[1])


def _dense(logits: Tensor, dtype: str) -> Loss:
    stored = _coded(logits, FieldSpec(schema.LOGITS, ("S", logits.shape[1]), dtype))
    found = []
    for temperature in (1, 2):
        own = torch.log_softmax(logits.double() / temperature, dim=-1)
        other = torch.log_softmax(stored / temperature, dim=-1)
        found.append((own.exp() * (own - other)).sum(dim=-1))
    ones = torch.ones_like(found[0])
    return Loss(ones * logits.shape[1], ones, found[0], found[1], found[1])


def _top_k(exact: _Exact, kept: TokenLogits) -> Loss:
    top = exact.top[:, : kept.k]
    there = torch.ones_like(top, dtype=torch.bool)
    if kept.top_p is not None:
        counts = top_p_counts(top, exact.logsumexp[1], kept.top_p)
        there = torch.arange(kept.k, device=top.device) < counts[:, None]
    spec = next(one for one in kept.fields("S") if one.name == schema.TOP_K_LOGITS)
    decoded = _coded(top.where(there, 0), spec).where(there, -math.inf)
    entries = there.sum(dim=-1).double()
    others = exact.vocabulary - entries

    def kl(temperature: int, logsumexp: Tensor) -> Tensor:
        p = (top / temperature - exact.logsumexp[temperature][:, None]).exp().where(there, 0)
        return _divergence(exact.negentropy[temperature], p, decoded / temperature - logsumexp[:, None], others)

    mass = (top - exact.logsumexp[1][:, None]).exp().where(there, 0).sum(dim=-1)
    q = (decoded - exact.logsumexp[1][:, None]).exp().sum(dim=-1)
    rest = ((1 - q).clamp(min=_LEAST) / others.clamp(min=1)).log() + exact.logsumexp[1]  # logit of each other id
    guessed = torch.cat([decoded / 2, (rest / 2 + others.log())[:, None]], dim=-1).logsumexp(dim=-1)
    return Loss(entries, mass, kl(1, exact.logsumexp[1]), kl(2, guessed), kl(2, exact.logsumexp[2]))


def _drawn(exact: _Exact, relative: Tensor, drawn: dict[str, Tensor], draws: int) -> Loss:
    counts = drawn[schema.SAMPLE_COUNTS].double()
    there = counts > 0
    weights = counts * drawn[schema.SAMPLE_RATIOS].double() if schema.SAMPLE_RATIOS in drawn else counts
    logprobs = relative.gather(1, drawn[schema.SAMPLE_INDICES].long()).double() - exact.logsumexp[1][:, None]
    p = logprobs.exp().where(there, 0)
    q = weights / weights.sum(dim=-1, keepdim=True) * (draws / (draws + 1))
    entries = there.sum(dim=-1).double()
    kl = _divergence(exact.negentropy[1], p, q.log(), exact.vocabulary - entries)
    none = torch.full_like(kl, math.nan)
    return Loss(entries, p.sum(dim=-1), kl, none, none)


def _divergence(negentropy: Tensor, p: Tensor, logq: Tensor, others: Tensor) -> Tensor:
    """[N]: KL of a distribution with Σ p log p = negentropy, of which p [N, K] are some entries, to one with logq
    [N, K] (-inf: none) there and the rest of its mass spread evenly over `others` [N] ids."""
    q = logq.exp()
    rest = torch.where(others > 0, (1 - q.sum(dim=-1)).clamp(min=_LEAST), 0)
    total = (q.sum(dim=-1) + rest).log()  # above 0 where rounding made the kept entries more than all
    kept = (p * logq.where(p > 0, 0)).sum(dim=-1)
    tail = (1 - p.sum(dim=-1)).clamp(min=0)
    even = torch.where(others > 0, tail * (rest / others.clamp(min=1)).clamp(min=1e-300).log(), 0)
    return negentropy - kept - even + total


def _coded(values: Tensor, spec: FieldSpec) -> Tensor:
    """values [N, K] as a reader gets them, float64."""
    codec = codec_of(spec)
    with np.errstate(over="ignore"):  # all logits, absolute, in float16: such a candidate is left out
        decoded = codec.decode(codec.encode(values.float().cpu().numpy(), spec), spec)
    return torch.from_numpy(decoded.astype(np.float64)).to(values.device)


def _candidate(way: TokenLogits, sums: Loss, count: int) -> Candidate:
    entries, mass, kl, *at_2 = (total / count for total in sums)
    kl_at_2, with_logsumexp = (None if math.isnan(one) else one for one in at_2)
    settings = {name: value for name, value in way.settings.items() if name in CHOSEN_BY_BUDGET}
    size = position_bytes(way.fields("S"), entries)
    return Candidate(settings, _name(way), size, entries, mass, kl, kl_at_2, with_logsumexp)


def _name(way: TokenLogits) -> str:
    if way.kind == DENSE:
        return f"all, {way.dtype}"
    if way.kind == SAMPLED:
        return f"{way.draws} draws" + (f" at T = {way.proposal:g}" if way.proposal != 1 else "")
    return f"top {way.k}" + (f" up to p = {way.top_p:g}" if way.top_p is not None else "") + f", {way.dtype}"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
