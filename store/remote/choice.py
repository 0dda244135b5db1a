"""Which part of a store is taken: shards by split and SQL, columns by name; and the plan of what that makes.

A part is a store of its own. Its plan is the whole's with fewer shards and fields, and says so in its settings:

    "taken_from": {"fingerprint", "shards_sha256", "shards", "fields", "left_out": {"shards", "fields"}}

`fingerprint` is the whole's, `shards_sha256` the digest of its shards' checksums, `shards` and `fields` how many it
has; left out are so many shards, and the fields of these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import schema
from ..errors import ConfigError
from ..identity import digest
from ..images.views import VIEW_MIX_WITH
from ..manifest import Plan
from ..reader import TeacherStore
from ..schema import FieldSpec
from .config import PullConfig

TAKEN_FROM = "taken_from"


def chosen_fields(plan: Plan, names: Sequence[str]) -> list[FieldSpec]:
    """All that is not the teacher's, and of the teacher's the columns named, with those that they are read by."""
    known = {spec.name: spec for spec in plan.fields}
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"--fields {missing[0]}: the store has {', '.join(known)}")
    if not names:
        return plan.fields
    wanted = {*names, *(known[name].parameters["counts"] for name in names if "K" in known[name].shape)}
    if any(known[name].shape[:1] == ("P",) for name in wanted if name in known):
        wanted.add(schema.POSITIONS)
    return [spec for spec in plan.fields if spec.role != "teacher" or spec.name in wanted]


def chosen_shards(plan: Plan, made: Mapping[str, Any], config: PullConfig, index: TeacherStore | None) -> list[int]:
    """Numbers in the plan, ascending. index: the store's samples, needed where there is a condition."""
    splits = list(dict.fromkeys(shard.split for shard in plan.shards))
    if missing := [name for name in config.split if name not in splits]:
        raise ConfigError(f"--split {missing[0]}: the store has {', '.join(splits)}")
    kept = {at for at, shard in enumerate(plan.shards) if not config.split or shard.split in config.split}
    if config.where is not None:
        assert index is not None
        rows = index.select(where=config.where, fields=[]).sample_ids
        found = set(np.unique(np.searchsorted(index.first_row, rows, side="right") - 1).tolist())
        kept = _with_needed(plan, kept & found, kept)
    if not kept:
        raise ConfigError(f"--where {config.where!r} keeps no row" + (" of those splits" if config.split else ""))
    return sorted(kept)


def _with_needed(plan: Plan, chosen: set[int], allowed: set[int]) -> set[int]:
    """Views of images are made of the file in view 0, and of any other image of the split that is mixed in."""
    names = {spec.name for spec in plan.fields}
    more: set[int] = set()
    for at in chosen:
        shard = plan.shards[at]
        for other in allowed:
            held = plan.shards[other]
            if held.split != shard.split or held.view != 0:
                continue
            overlaps = shard.view != 0 and held.start < shard.stop and shard.start < held.stop
            if VIEW_MIX_WITH in names or overlaps:
                more.add(other)
    return chosen | more


def partial_plan(plan: Plan, made: Mapping[str, Any], shards: Sequence[int], fields: Sequence[FieldSpec]) -> Plan:
    """The plan of a part; the plan itself where that is all of it."""
    if len(shards) == len(plan.shards) and len(fields) == len(plan.fields):
        return plan
    kept = {spec.name for spec in fields}
    origin = {
        "fingerprint": plan.fingerprint,
        "shards_sha256": digest([entry["sha256"] for entry in made["shards"]]),
        "shards": len(plan.shards),
        "fields": len(plan.fields),
        "left_out": {
            "shards": len(plan.shards) - len(shards),
            "fields": [spec.name for spec in plan.fields if spec.name not in kept],
        },
    }
    if TAKEN_FROM in plan.settings:  # a part of a part
        origin[TAKEN_FROM] = plan.settings[TAKEN_FROM]
    settings = {**plan.settings, TAKEN_FROM: origin}
    chosen = [plan.shards[at] for at in shards]
    return Plan(plan.task, settings, plan.identity, list(fields), chosen, plan.label_names)
