"""Phase 1, top to bottom: rows, teacher, plan, shards, index. Run once; the same call again continues it."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..store import ConfigError, FieldSpec, Plan, ShardPlan, StoreWriter, describe, manifest, schema
from ..store.shared import SharedWriter
from ..store.writer import check_folder
from . import budget, planning
from .background import Ahead, Background
from .budget import Choice
from .capture import Capture, token_batches
from .card import dataset_card
from .config import DumpConfig
from .data import SourceData, load_rows
from .disk import check_room
from .inside import inner
from .inside.fidelity import Cost
from .inside.inner import Inner, Way
from .inside.pilot import InnerPilot
from .inside.task import InnerTask, is_of_logits
from .progress import DumpProgress, say
from .shards import Prepared, ShardKeeper, Tally, carried_fields, prepare
from .survey import Survey, survey
from .tasks import TASKS, Task, task_class
from .teachers.given import lent, teacher_of
from .teachers.teacher import Teacher, slow_dtype

_TAKEN = ("sample_id", "split", "shard", "row", "num_tokens", "label", *schema.ADDRESS_COLUMNS, schema.ATTENTION_MASK)
_PILOT_SHARE = 50  # a dump gives its pilot at most one row in this many


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


def dump(config: DumpConfig, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Run the teacher over the rows and keep what it says in `config.output_dir`.

    model: the teacher, where it is not to be loaded: any module that takes `input_ids` and `attention_mask` (and
    `token_type_ids`, if it names them) and gives logits; then `config.teacher` is where its tokenizer is. It runs where
    it is, or on `config.device`, and is afterwards as it was.
    Any number of processes may dump the same into one folder, from one machine or several: each makes the shards that
    nobody else makes (store/shared.py), and all return when the store is finished.
    Returns what `describe` says of the store, and seconds, teacher_seconds and tokens_per_second of this run; with
    `dry_run`, what `plan` returns. Raises ConfigError, DataError, StoreMismatch (the folder holds a dump of other
    settings), StoreError (somebody writes there who must be alone), OutOfSpace. Whatever stops it, committed shards
    stay.
    """
    if config.dry_run:
        return plan(config, model)
    if config.overwrite and max(int(os.environ.get("WORLD_SIZE", "1")), config.ray_workers or 1) > 1:
        raise ConfigError("--overwrite by several at once would empty what one of them began; give a new folder")
    if config.ray_workers:
        if model is not None:
            raise ConfigError("--ray-workers load the teacher themselves; a given model is dumped by one process")
        from .on_ray import dump_on_ray

        return dump_on_ray(config)
    began, folder, tally = time.perf_counter(), Path(config.output_dir).expanduser(), Tally()
    with lent(config, model):
        job = _prepare(config, model)
        done = _committed(folder)
        overwrite = config.overwrite or not done  # a plan of which nothing is committed yet holds nobody to it
        left = sum(shard.stop - shard.start for shard in job.plan.shards if overwrite or shard.name not in done)
        check_room(folder, planning.room(job.pilot, left, job.source.rows) - (sum(done.values()) if overwrite else 0))
        with SharedWriter.begin(folder, job.plan, config.overwrite, config.lease, config.lease_timeout) as writer:
            unfinished = bool(writer.missing()) or not (folder / manifest.MANIFEST).exists()
            while writer.missing():  # again where a lease was lost on the way
                _run_shards(config, job, writer, tally)
            if unfinished:
                _finish(job, writer)
    seconds = time.perf_counter() - began
    return {
        **describe(folder), "seconds": round(seconds, 3), "teacher_seconds": round(tally.teacher_seconds, 3),
        "tokens_per_second": round(tally.tokens / seconds, 1),
    }  # fmt: skip


def plan(config: DumpConfig, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Size and time of a dump, measured on a few rows; writes nothing. model: as `dump` takes it.

    Returns {"bytes", "bytes_per_sample", "shards", "samples", "tokens", "seconds", "free_bytes"}; for language models
    also "candidates", a list of fidelity.Candidate as dicts, and "chosen", the name of one; where something inside the
    teacher is kept, "codecs", what each way of it takes and loses (inner_fidelity.Cost).
    """
    with lent(config, model):
        job = _prepare(config, model, compare=True)
        capture = job.capture or Capture(job.teacher, job.task)
        found = {**_measure(config, job, capture, planning.PILOT_ROWS, job.plan.shards), **job.choice.to_json()}
    return {**found, "codecs": job.codecs} if job.codecs else found


def _prepare(config: DumpConfig, model: torch.nn.Module | None, compare: bool = False) -> Job:
    """Rows loaded, checked and hashed, the teacher identified, shards planned; compare: ways of keeping it all too."""
    folder = Path(config.output_dir).expanduser()
    check_folder(folder)
    source = load_rows(config)
    kind = task_class(config.task)
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
        kept, costs = _look_inside(config, task, capture, pilot, carried, source.rows, compare)
        if inner.implementation(config, kept).attention != config.attention and config.budget is not None:
            teacher = teacher_of(inner.implementation(config, kept), kind.model_class, model)
            capture = Capture(teacher, task)  # in the way that was chosen
    own = list(kept.specs) if kept else []
    stored = _stored_plan(config, folder)
    per_batch = planning.tokens_per_batch(config, teacher, own, pilot)
    if stored and config.tokens_per_batch is None:
        per_batch = stored.settings.get("tokens_per_batch", per_batch)
    if budget.is_about_logits(config) and (compare or (choice is None and budget.must_measure(config, task.fields))):
        capture = capture or Capture(teacher, task)
        choice = budget.settle(config, task, capture, pilot, [*task.fields, *own, *carried], source.rows, per_batch)
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
    identity = _identity(source, teacher, checked)
    shards = planning.plan_shards(source, pilot, config.shard_size, teacher)
    if stored and _same_rows(stored, identity) and stored.settings.get("shard_size") == config.shard_size:
        shards = stored.shards  # other devices would plan otherwise
    settings = {
        **task.settings, "splits": list(source.splits), "keep_columns": config.keep_columns,
        "tokens_per_batch": per_batch, "shard_size": config.shard_size, **choice.settings(config.budget),
    }  # fmt: skip
    made = Plan(config.task, settings, identity, fields, shards, task.label_names)
    codecs = [cost.to_json(kept.way) for cost in costs] if kept else []
    return Job(source, teacher, task, pilot, made, per_batch, choice, capture, codecs)


def _stored_plan(config: DumpConfig, folder: Path) -> Plan | None:
    """What was resolved once, for whoever goes on with it or joins it, on whatever device."""
    return None if config.overwrite or not (folder / manifest.PLAN).exists() else manifest.read_plan(folder)


def _same_rows(stored: Plan, identity: dict[str, Any]) -> bool:
    rows = [one.get("dataset", {}).get("rows_sha256") for one in (stored.identity, identity)]
    return rows[0] == rows[1]


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


def _run_shards(config: DumpConfig, job: Job, writer: SharedWriter, tally: Tally) -> None:
    """Tokenising the next shard, and encoding and writing what came, go on beside the teacher."""
    missing = writer.missing()
    rows = sum(shard.stop - shard.start for shard in missing)
    claimed = Ahead(partial(prepare, job.source, job.task, config.keep_columns), writer.claim(_tell_of_others))
    with Background() as background:
        capture = job.capture or Capture(job.teacher, job.task)
        if claimed.any():  # tokenising beside it would slow the pilot down
            _measure(config, job, capture, round(rows * job.pilot.stored) // _PILOT_SHARE, missing)
        unit = "images" if TASKS[config.task].of_images else "tokens"
        with DumpProgress(rows * job.pilot.stored, rows * job.pilot.tokens, tally, unit) as progress:
            for shard, ready in claimed:
                planned = shard.stop - shard.start
                progress.expect(len(ready.samples) - planned * job.pilot.stored,
                                int(ready.samples.lengths["S"].sum()) - planned * job.pilot.tokens)  # fmt: skip
                keeper = ShardKeeper(writer, job.task, shard, ready, tally)
                _run_shard(job, ready, capture, keeper, background, progress)
            background.close()
    if cut := tally.notes.get("truncated"):
        say(f"note: {cut} of {tally.rows} rows were longer than {job.plan.settings['max_length']} tokens and were cut")
    if lost := tally.notes.get("words_without_tokens"):
        say(f"note: the tokenizer makes nothing of {lost} words, which have no logits")


def _tell_of_others(shards: int) -> None:
    say(f"note: others are making the last {shards} shard{'s' if shards > 1 else ''}; waiting for them")


def _run_shard(job: Job, ready: Prepared, capture: Capture, keeper: ShardKeeper, background: Background,
               progress: DumpProgress) -> None:  # fmt: skip
    lengths = ready.samples.lengths["S"]
    background.put(keeper.keep_inputs)
    for rows in token_batches(lengths, job.tokens_per_batch):
        background.put(partial(keeper.keep, rows, capture(ready.samples, rows)))
        progress.passed(len(rows), int(lengths[rows].sum()))
    background.put(keeper.commit)


def _measure(config: DumpConfig, job: Job, capture: Capture, rows: int, shards: list[ShardPlan]) -> dict[str, Any]:
    """The pilot: how fast the teacher is here, and whether it agrees with the labels; said before all is run."""
    if line := slow_dtype(capture.dtype, capture.device):
        say(f"note: {line}")
    seconds_per_token, disagrees = planning.time_teacher(capture, job.pilot, job.tokens_per_batch, rows)
    if disagrees:
        say(f"note: {disagrees}")
    folder = Path(config.output_dir).expanduser()
    found = planning.figures(job.pilot, job.source.rows, len(job.plan.shards), seconds_per_token, folder)
    share = sum(shard.stop - shard.start for shard in shards) / sum(one.stop - one.start for one in job.plan.shards)
    time_left = f", about {found['seconds'] * share:.0f} s" if found["seconds"] else ""
    length = found["tokens"] / found["samples"]
    what = "rows" if TASKS[config.task].of_images else f"rows of {length:.1f} tokens"
    say(
        f"{found['samples']} {what}: {found['bytes'] / 1e6:.1f} MB in {found['shards']} "
        f"shard{'s' if found['shards'] > 1 else ''} ({found['bytes_per_sample']:.0f} bytes a row), {len(shards)} to "
        f"do{time_left}; {found['free_bytes'] / 1e9:.1f} GB free"
    )
    return found


def _finish(job: Job, writer: StoreWriter) -> None:
    """Index, tokenizer, card, manifest."""
    committed = manifest.committed(writer.path, writer.plan)
    with tempfile.TemporaryDirectory() as scratch:
        reader = job.teacher.save_reader(Path(scratch))
        writer.finish(dataset_card(writer.plan, committed, writer.path.resolve().name), reader)


def _identity(source: SourceData, teacher: Teacher, checked: Survey) -> dict[str, Any]:
    found = teacher.identity()
    found["dataset"] = {
        "name": source.name, "revision": source.revision, "rows": source.rows, "rows_sha256": checked.rows_sha256,
    }  # fmt: skip
    found["versions"]["predistill"] = importlib.import_module(__name__.split(".")[0]).__version__  # installed or not
    return found


def _check_kept(kept: list[str], task: Task) -> None:
    taken = {*_TAKEN, *(spec.name for spec in task.fields)}
    for name in kept:
        if name in taken:
            raise ConfigError(f"--keep-columns {name}: the store has a column of that name; rename it in the dataset")


def _committed(folder: Path) -> dict[str, int]:
    """Bytes of the shards that a dump has committed there."""
    if not (folder / manifest.PLAN).exists():
        return {}
    return {name: entry["bytes"] for name, entry in manifest.committed(folder, manifest.read_plan(folder)).items()}
