"""What is settled before the teacher runs over all rows: what it is asked, which rows, how and where they are kept."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..store import ConfigError, FieldSpec, Plan, ShardPlan, manifest, schema
from ..store.writer import check_folder
from . import budget, planning
from .budget import Choice
from .capture import Capture
from .config import DumpConfig
from .data import SourceData, load_rows
from .inside import inner
from .inside.fidelity import Cost
from .inside.inner import Inner, Way
from .inside.pilot import InnerPilot
from .inside.task import InnerTask, is_of_logits
from .progress import say
from .shards import carried_fields
from .streaming import Stream, open_stream
from .survey import Survey, survey
from .tasks import Task, task_class
from .teachers.given import teacher_of
from .teachers.teacher import Teacher

_TAKEN = ("sample_id", "split", "shard", "row", "num_tokens", "label", *schema.ADDRESS_COLUMNS, schema.ATTENTION_MASK)


@dataclass(frozen=True)
class Job:
    """Everything known before the teacher runs."""

    source: SourceData
    teacher: Teacher
    task: Task
    pilot: planning.Pilot
    plan: Plan
    tokens_per_batch: int
    choice: Choice
    capture: Capture | None  # where the plan could not be made without it
    codecs: Sequence[dict[str, Any]] = ()  # ways of keeping what is inside the teacher, where they were measured


def prepare_job(config: DumpConfig, model: torch.nn.Module | None, compare: bool = False) -> Job:
    """Rows loaded, checked and hashed, the teacher identified, shards planned; compare: ways of keeping it all too."""
    folder = Path(config.output_dir).expanduser()
    check_folder(folder)
    stored = _stored_plan(config, folder)
    source = open_stream(config, stored) if config.streaming else load_rows(config)
    rows, kind = source.expected or 0, task_class(config.task)
    kept = None if compare else inner.earlier(config, folder)
    teacher = teacher_of(inner.implementation(config, kept), kind.model_class, model)
    choice = None if compare else budget.earlier(config, folder)
    task: Task = kind(choice.config if choice else config, teacher, source)
    checked = survey(source, task, config.keep_columns)
    for line in task.notices:
        say(f"note: {line}")
    _check_kept(config.keep_columns, task)
    pilot = planning.look(source, task, checked.carried_bytes)
    carried = carried_fields(source, config.keep_columns)
    capture: Capture | None = None
    costs: list[Cost] = []
    if config.keeps_inner and kept is None:
        capture = Capture(teacher, task)
        kept, costs = _look_inside(config, task, capture, pilot, carried, rows, compare)
        if inner.implementation(config, kept).attention != config.attention and config.budget is not None:
            teacher = teacher_of(inner.implementation(config, kept), kind.model_class, model)
            capture = Capture(teacher, task)  # in the way that was chosen
    own = list(kept.specs) if kept else []
    per_batch = planning.tokens_per_batch(config, teacher, own, pilot)
    if stored and config.tokens_per_batch is None:
        per_batch = stored.settings.get("tokens_per_batch", per_batch)
    if budget.is_about_logits(config) and (compare or (choice is None and budget.must_measure(config, task.fields))):
        capture = capture or Capture(teacher, task)
        choice = budget.settle(config, task, capture, pilot, [*task.fields, *own, *carried], rows, per_batch)
        if config.budget is not None:
            say(f"note: {choice.line()}")
            task = kind(choice.config, teacher, source)
    choice = choice or Choice(config)
    if kept:
        task = InnerTask(task, config, kept)
        _check_kept(config.keep_columns, task)
    capture = capture.running(task) if capture else None
    fields = [*task.fields, *carried]
    pilot = planning.sized(pilot, fields, choice.entries)
    identity = _identity(source, teacher, checked, config.max_samples)
    settings = {
        **task.settings, "splits": list(source.splits), "keep_columns": config.keep_columns,
        "tokens_per_batch": per_batch, "shard_size": config.shard_size, **choice.settings(config.budget),
    }  # fmt: skip
    shards, grows_by = _shards(config, source, pilot, teacher, stored, identity)
    made = Plan(config.task, settings, identity, fields, shards, task.label_names, grows_by)
    codecs = [cost.to_json(kept.way) for cost in costs] if kept else []
    return Job(source, teacher, task, pilot, made, per_batch, choice, capture, codecs)


def _stored_plan(config: DumpConfig, folder: Path) -> Plan | None:
    """What was resolved once, for whoever goes on with it or joins it, on whatever device."""
    return None if config.overwrite or not (folder / manifest.PLAN).exists() else manifest.read_plan(folder)


def _shards(
    config: DumpConfig, source: SourceData, pilot: planning.Pilot, teacher: Teacher, stored: Plan | None,
    identity: dict[str, Any],
) -> tuple[list[ShardPlan], int | None]:  # fmt: skip
    """(shards, rows by which the plan of a stream grows): of those who planned first, as other devices would plan
    otherwise."""
    if stored and stored.settings.get("shard_size") != config.shard_size:
        stored = None
    if config.streaming:
        before = stored.grows_by if stored else None
        return [], before or planning.rows_per_shard(pilot, config.shard_size, teacher)
    if stored and stored.identity.get("dataset", {}).get("rows_sha256") == identity["dataset"]["rows_sha256"]:
        return stored.shards, None
    return planning.plan_shards(source, pilot, config.shard_size, teacher), None


def _look_inside(
    config: DumpConfig, task: Task, capture: Capture, pilot: planning.Pilot, carried: list[FieldSpec], rows: int,
    compare: bool,
) -> tuple[Inner, list[Cost]]:  # fmt: skip
    """Which columns the teacher's inside gets, looked at on pilot rows; measured where it is compared or chosen."""
    looked, way = InnerPilot(config, capture, pilot), Way(config.attention_storage, config.dtype)
    costs: list[Cost] = []
    if config.budget is not None:
        shared = budget.is_about_logits(config)
        others = [spec for spec in task.fields if not (shared and is_of_logits(spec))]
        way, costs = budget.settle_inner(looked, [*others, *carried], rows, config.budget, shared)
        say(f"note: {budget.inner_line(way, costs)}")
    kept = looked.inner(way)
    looked.check_held(kept)
    looked.check_recomputed(kept)
    return kept, looked.costs() if compare else costs


def _identity(source: SourceData, teacher: Teacher, checked: Survey, most: int | None) -> dict[str, Any]:
    found = teacher.identity()
    first = "first_" if isinstance(source, Stream) else ""
    rows = {split: len(rows) for split, rows in source.splits.items()} if first else source.rows
    found["dataset"] = {
        "name": source.name, "revision": source.revision, f"{first}rows": rows,
        f"{first}rows_sha256": checked.rows_sha256,
        **({} if first or most is None else {"max_samples": most}),
    }  # fmt: skip
    found["versions"]["predistill"] = importlib.import_module(__name__.split(".")[0]).__version__  # installed or not
    return found


def _check_kept(kept: list[str], task: Task) -> None:
    taken = {*_TAKEN, *(spec.name for spec in task.fields)}
    for name in kept:
        if name in taken:
            raise ConfigError(f"--keep-columns {name}: the store has a column of that name; rename it in the dataset")
