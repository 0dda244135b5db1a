"""Phase 1, top to bottom: rows, teacher, plan, shards, index. Run once; the same call again continues it."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..store import ConfigError, ShardPlan, StoreWriter, describe, manifest
from ..store.growing import GrowingWriter
from ..store.shared import SharedWriter
from . import planning
from .background import Ahead, Background
from .capture import Capture, token_batches
from .config import DumpConfig
from .disk import check_room
from .job import Job, prepare_job
from .progress import DumpProgress, say
from .shards import Prepared, ShardKeeper, Tally, prepare
from .streaming import Stream
from .tasks import TASKS
from .teachers.given import lent
from .teachers.teacher import slow_dtype
from .teachers.tensor_parallel import on_all_ranks

_PILOT_SHARE = 50  # a dump gives its pilot at most one row in this many


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
    ranks = 1 if config.tp_plan else int(os.environ.get("WORLD_SIZE", "1"))
    if config.overwrite and max(ranks, config.ray_workers or 1) > 1:
        raise ConfigError("--overwrite by several at once would empty what one of them began; give a new folder")
    if config.ray_workers:
        if model is not None:
            raise ConfigError("--ray-workers load the teacher themselves; a given model is dumped by one process")
        from .on_ray import dump_on_ray

        return dump_on_ray(config)
    return on_all_ranks(config, partial(_dump, config, model))


def _dump(config: DumpConfig, model: torch.nn.Module | None) -> dict[str, Any]:
    """One worker, top to bottom."""
    began, folder, tally = time.perf_counter(), Path(config.output_dir).expanduser(), Tally()
    with lent(config, model):
        job = prepare_job(config, model)
        done = _committed(folder)
        overwrite = config.overwrite or not done  # a plan of which nothing is committed yet holds nobody to it
        rows = sum(shard.stop - shard.start for shard in job.plan.shards if overwrite or shard.name not in done)
        check_room(folder, planning.room(job.pilot, rows, job.source.rows) - (sum(done.values()) if overwrite else 0))
        kind = SharedWriter if job.plan.grows_by is None else GrowingWriter
        with kind.begin(folder, job.plan, config.overwrite, config.lease, config.lease_timeout) as writer:
            left = bool(writer.missing()) or job.plan.grows_by is not None  # of a stream, rows may have come
            while left:  # again where a lease was lost on the way
                _run_shards(config, job, writer, tally)
                left = bool(writer.missing())
            _finish(job, writer)
    seconds = time.perf_counter() - began
    return {
        **describe(folder), "seconds": round(seconds, 3), "teacher_seconds": round(tally.teacher_seconds, 3),
        "tokens_per_second": round(tally.tokens / seconds, 1),
    }  # fmt: skip


def plan(config: DumpConfig, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Size and time of a dump, measured on a few rows; writes nothing. model: as `dump` takes it.

    Returns {"bytes", "bytes_per_sample", "shards", "samples", "tokens", "seconds", "free_bytes"}, of a stream None
    where nobody knows how many rows will come, with max_samples the most that there can be; for language models also
    "candidates", a list of fidelity.Candidate as dicts, and "chosen", the name of one; where something inside the
    teacher is kept, "codecs", what each way of it takes and loses (inner_fidelity.Cost).
    """
    return on_all_ranks(config, partial(_plan, config, model))


def _plan(config: DumpConfig, model: torch.nn.Module | None) -> dict[str, Any]:
    with lent(config, model):
        job = prepare_job(config, model, compare=True)
        capture = job.capture or Capture(job.teacher, job.task)
        found = {**_measure(config, job, capture, planning.PILOT_ROWS, job.plan.shards), **job.choice.to_json()}
    if found["bytes"] is None and "candidates" in found:
        found["candidates"] = [{**one, "bytes": None} for one in found["candidates"]]
    return {**found, "codecs": job.codecs} if job.codecs else found


def _run_shards(config: DumpConfig, job: Job, writer: SharedWriter, tally: Tally) -> None:
    """Tokenising the next shard, and encoding and writing what came, go on beside the teacher."""
    missing, kept = writer.missing(), config.keep_columns
    rows = _rows_left(job, writer, missing)
    if isinstance(writer, GrowingWriter) and isinstance(job.source, Stream):
        shards = job.source.claim(writer, job.task, kept, _tell_of_others)
    else:
        shards = writer.claim(_tell_of_others)
    claimed = Ahead(partial(prepare, job.source, job.task, kept), shards)
    if isinstance(job.source, Stream) and not claimed.any():
        return
    with Background() as background:
        capture = job.capture or Capture(job.teacher, job.task)
        if claimed.any():  # tokenising beside it would slow the pilot down
            pilot = planning.PILOT_ROWS if rows is None else round(rows * job.pilot.stored) // _PILOT_SHARE
            _measure(config, job, capture, pilot, missing)
        unit = "images" if TASKS[config.task].of_images else "tokens"
        totals = (None, None) if rows is None else (rows * job.pilot.stored, rows * job.pilot.tokens)
        with DumpProgress(totals[0], totals[1], tally, unit) as progress:
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


def _rows_left(job: Job, writer: SharedWriter, missing: list[ShardPlan]) -> int | None:
    """Rows of the shards that are missing; of a stream, of those too that are yet to come, None where nobody knows."""
    rows, known = (sum(shard.stop - shard.start for shard in shards) for shards in (missing, writer.plan.shards))
    if job.plan.grows_by is None:
        return rows
    return None if job.source.expected is None else round(job.source.expected * job.pilot.each) - known + rows


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
    source, grows_by = job.source, job.plan.grows_by
    count = source.shards(grows_by or 1, job.pilot.views) if isinstance(source, Stream) else len(job.plan.shards)
    found = planning.figures(job.pilot, job.source.expected, count, seconds_per_token, folder)
    say(_size_line(job, found, shards, TASKS[config.task].of_images))
    return found


def _size_line(job: Job, found: dict[str, Any], missing: list[ShardPlan], of_images: bool) -> str:
    what = "rows" if of_images else f"rows of {job.pilot.tokens / job.pilot.stored:.1f} tokens"
    free, each = f"{found['free_bytes'] / 1e9:.1f} GB free", f"{found['bytes_per_sample']:.0f} bytes a row"
    if found["samples"] is None:
        return f"{what}, nobody knows how many: {each}, {job.plan.grows_by} source rows a shard; {free}"
    plural = "s" if found["shards"] > 1 else ""
    size = f"{found['samples']} {what}: {found['bytes'] / 1e6:.1f} MB in {found['shards']} shard{plural} ({each})"
    if job.plan.grows_by is not None:
        return f"at most {size}; {free}"
    share = sum(one.stop - one.start for one in missing) / sum(one.stop - one.start for one in job.plan.shards)
    time_left = f", about {found['seconds'] * share:.0f} s" if found["seconds"] else ""
    return f"{size}, {len(missing)} to do{time_left}; {free}"


def _finish(job: Job, writer: StoreWriter) -> None:
    """Index, tokenizer, card, manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        writer.finish(job.teacher.save_reader(Path(scratch)))


def _committed(folder: Path) -> dict[str, int]:
    """Bytes of the shards that a dump has committed there."""
    if not (folder / manifest.PLAN).exists():
        return {}
    return {name: entry["bytes"] for name, entry in manifest.committed(folder, manifest.read_plan(folder)).items()}
