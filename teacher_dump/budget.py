"""How logits are kept, settled before the plan is made: as asked for, as a budget allows, as an earlier run settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..store import FieldSpec, manifest
from . import planning
from .capture import Capture, token_batches
from .config import CHOSEN_BY_BUDGET, DumpConfig
from .fidelity import Candidate, Distributions, choose
from .tasks import Task
from .token_logits import TokenLogits

_ROWS = 8  # of the pilot at a time
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
