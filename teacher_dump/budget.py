"""How logits, and what is inside the teacher, are kept, settled before the plan is made: as asked for, as a budget
allows, as an earlier run settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..store import ConfigError, FieldSpec, manifest
from . import planning
from .capture import Capture, token_batches
from .config import CHOSEN_BY_BUDGET, DumpConfig
from .inside.fidelity import Cost
from .inside.inner import Way
from .inside.layers import EXACT, HEAD_MEAN, QUERIES_KEYS, SQUARE
from .inside.pilot import InnerPilot
from .logits.fidelity import Candidate, Distributions, choose
from .logits.tokens import TokenLogits
from .tasks import TASKS, Task

_ROWS = 8  # of the pilot at a time
_LADDER = tuple(  # of what is inside the teacher, the best first: heads are lost last
    Way(storage, dtype)
    for storages in ((EXACT, QUERIES_KEYS), (HEAD_MEAN,))
    for dtype in ("float16", "int8")
    for storage in storages
)
_INNER_SHARE = 0.5  # of a budget that is shared with the logits of a language model, where some way needs no more
ENTRIES = "entries_per_token"  # setting of a plan: measured, and taken over by the runs that continue it


@dataclass(frozen=True)
class Choice:
    """config: with a way of keeping logits in it, and no budget. entries: that a token keeps on average, where their
    number varies. candidates: what was measured, and what of it is chosen."""

    config: DumpConfig
    entries: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None

    def to_json(self) -> dict[str, Any]:
        if not self.candidates:
            return {}
        chosen = self.chosen.name if self.chosen else None
        return {"candidates": [one.to_json() for one in self.candidates], "chosen": chosen}

    def line(self) -> str:
        """What was chosen, and what it costs."""
        one = self.chosen
        assert one is not None
        return (
            f"the budget allows {one.name}: {one.bytes / 1e6:.1f} MB in all, {one.bytes_per_token:.0f} bytes a token, "
            f"KL to the exact distribution {one.kl:.2g} nats, {one.mass:.2%} of the mass kept"
        )

    def settings(self, budget: int | None) -> dict[str, Any]:
        """What the plan says of it beside the task's own settings."""
        return {**({"budget": budget} if budget else {}), **({ENTRIES: self.entries} if self.entries else {})}


def earlier(config: DumpConfig, folder: Path) -> Choice | None:
    """What the dump that `config` continues came to; None where it continues none."""
    if config.overwrite or not (folder / manifest.PLAN).exists():
        return None
    said = manifest.read_plan(folder).settings
    needed = {ENTRIES} if config.budget is None else set(CHOSEN_BY_BUDGET)
    if said.get("budget") != config.budget or not needed <= said.keys():
        return None
    if config.budget is not None:
        chosen: dict[str, Any] = {name: said[name] for name in CHOSEN_BY_BUDGET}
        config = replace(config, budget=None, **chosen)
    return Choice(config, float(said.get(ENTRIES, 0)))


def is_about_logits(config: DumpConfig) -> bool:
    """Are there ways of keeping these logits to choose from?"""
    return "logits" in config.fields and "top_k_logits" in TASKS[config.task].settings


def must_measure(config: DumpConfig, fields: Sequence[FieldSpec]) -> bool:
    """Does the size of the store depend on what the teacher says?"""
    return config.budget is not None or any("K" in spec.shape for spec in fields)


def settle(
    config: DumpConfig, task: Task, capture: Capture, pilot: planning.Pilot, fields: list[FieldSpec], rows: int,
    per_batch: int,
) -> Choice:  # fmt: skip
    """Measure the candidates on pilot rows, and take the one that is asked for, or the best within the budget.

    fields: the whole store's, with those of the task's own way of keeping logits. rows: of the source.
    Raises ConfigError where nothing fits, DataError where the teacher's logits are not finite.
    """
    kept: TokenLogits = task.token_logits  # type: ignore[attr-defined]
    own = {spec.name for spec in kept.fields("S")}
    others = [spec for spec in fields if spec.name not in own]
    symbol = next(str(spec.shape[0]) for spec in fields if spec.name in own)
    found = []
    for one in _measure(config, kept.vocabulary, capture, pilot, per_batch):
        way = TokenLogits(_with(config, one), kept.vocabulary).fields(symbol)
        size = planning.sized(pilot, [*others, *way], one.entries)
        found.append(replace(one, bytes=planning.room(size, rows, rows)))
    chosen = _asked_for(kept, found) if config.budget is None else choose(found, config.budget)
    if chosen is None:
        return Choice(config, 0.0, tuple(found))
    varies = any("K" in spec.shape for spec in TokenLogits(_with(config, chosen), kept.vocabulary).fields(symbol))
    return Choice(_with(config, chosen), float(f"{chosen.entries:.3g}") if varies else 0.0, tuple(found), chosen)


def settle_inner(
    inside: InnerPilot, fields: Sequence[FieldSpec], rows: int, budget: int, share: bool
) -> tuple[Way, list[Cost]]:
    """The first way of the ladder that a budget (half of it, where it is to `share`) has room for, or the smallest; and
    what was measured.

    fields: the others of the store; rows: of the source. float16 is passed over where it cannot hold the pilot rows.
    Raises ConfigError where nothing fits.
    """
    inside.check_held(inside.inner(Way(EXACT, "int8")))  # which holds all that is finite
    costs, sizes = inside.costs(("float16", "int8")), {}
    overflown = {cost.way.dtype for cost in costs if not cost.fits}
    for way in _LADDER:
        if way.storage in inside.storages and way.dtype not in overflown:
            size = planning.sized(inside.pilot, [*fields, *inside.inner(way).specs])
            sizes[way] = planning.room(size, rows, rows)
    smallest = min(sizes, key=lambda way: sizes[way])
    if sizes[smallest] > budget:
        named = smallest.name if inside.square else smallest.dtype
        raise ConfigError(
            f"--budget {budget / 1e6:.3g} MB: the smallest store would have {sizes[smallest] / 1e6:.3g} MB ({named}); "
            f"give that much, fewer --layers or fewer --fields"
        )
    allowed = budget * (_INNER_SHARE if share else 1)
    return next((way for way in sizes if sizes[way] <= allowed), smallest), costs


def inner_line(way: Way, costs: Sequence[Cost]) -> str:
    """What was chosen of what is inside, and what it costs."""
    own = [cost for cost in costs if cost.way.dtype == way.dtype and cost.way.storage in (way.storage, EXACT)]
    chosen = {cost.field: cost for cost in own if cost.way.storage == way.storage or cost.field not in SQUARE}
    told = [
        f"{cost.field} as {cost.codec}, {cost.bytes_per_token:.0f} bytes a token, relative error {cost.relative_l2:.1g}"
        for cost in chosen.values()
    ]
    return "the budget allows " + "; ".join(told)


def _asked_for(kept: TokenLogits, found: list[Candidate]) -> Candidate | None:
    """None where it cannot hold the pilot's logits, which the dump itself will say of the row."""
    wanted = {name: kept.settings[name] for name in CHOSEN_BY_BUDGET}
    return next((one for one in found if one.settings == wanted), None)


def _with(config: DumpConfig, candidate: Candidate) -> DumpConfig:
    return replace(config, budget=None, **candidate.settings)


def _measure(
    config: DumpConfig, vocabulary: int, capture: Capture, pilot: planning.Pilot, per_batch: int
) -> list[Candidate]:
    samples, seen = pilot.samples, Distributions(config, vocabulary)
    order = planning.shuffled(samples)
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        for batch in token_batches(samples.lengths["S"][chosen], per_batch):
            capture(samples, chosen[batch], kept=seen)
            if seen.full:
                return seen.candidates()
    return seen.candidates()
