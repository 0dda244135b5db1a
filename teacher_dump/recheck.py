"""Is a store what it says it is? A sample of its rows through the live teacher, beside what is stored of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..store import ConfigError, FieldSpec, StoreMismatch, TeacherStore, schema
from ..store.identity import differences, short
from ..store.images.pixels import PIXEL_HASH
from ..store.manifest import SHARDS
from . import planning
from .capture import Capture, token_batches
from .config import DumpConfig
from .importing.config import UNKNOWN
from .inside.inner import implementation
from .inside.task import InnerTask, is_of_logits
from .progress import RowProgress, say
from .rechecking.compare import Deviation, compare, noise_of
from .rechecking.config import RecheckConfig
from .rechecking.member import member_asked
from .rechecking.stored import config_of, inner_of, samples_of, source_of
from .rechecking.tokens import AtStored, stored_ids
from .tasks import TASKS, Samples, task_class
from .teachers.given import lent, teacher_of
from .teachers.teacher import Teacher
from .teachers.tensor_parallel import on_all_ranks

_IDS = (schema.TOP_K_INDICES, schema.SAMPLE_INDICES)
_NOT_COMPARED = (schema.POSITIONS, schema.TOP_K_COUNTS, schema.SAMPLE_SIZES, *_IDS)
_NO_LOGIT = -3e4
_SHORT = 16  # tokens that any teacher takes


@dataclass(frozen=True)
class Job:
    """The live side of the comparison. ids: int64 [n], the sample_ids of `samples`; vocabulary: of language models."""

    store: TeacherStore
    config: DumpConfig
    teacher: Teacher
    task: Any
    capture: Capture
    samples: Samples
    ids: np.ndarray
    columns: list[FieldSpec]
    vocabulary: int | None
    per_batch: int


def recheck(path: str | Path, config: RecheckConfig, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Run `config.sample` rows of a store through a teacher. model: the teacher itself, as `dump` takes it.

    Returns {"teacher", "member": of an ensemble store, else None, "rows", "seed", "fields": {column: a
    rechecking.compare.Deviation as a dict}, "differences": [{"name", "store", "teacher"}] of their identities,
    "problems": as `verify` has them}. Raises ConfigError, StoreMismatch where the teacher cannot be run on what is
    stored.
    """
    with TeacherStore.open(path) as whole:
        store = member_asked(whole, config, model)
        asked = config_of(store, config)
        return on_all_ranks(asked, partial(_recheck, store, config, asked, model))


def _recheck(
    store: TeacherStore, config: RecheckConfig, asked: DumpConfig, model: torch.nn.Module | None
) -> dict[str, Any]:
    with lent(asked, model):
        job = _prepare(store, config, asked, model)
        found = _compare(job)
        identity = job.teacher.identity()
        who = identity["teacher"].get("name") or identity["teacher"]["class"]
        return {
            "teacher": who, "member": store.member, "rows": len(job.ids), "seed": config.seed,
            "fields": {name: one.to_json() for name, one in found.items()},
            "differences": _differences(store, identity), "problems": list(_problems(job, who, found)),
        }  # fmt: skip


def rechecked(path: str | Path, config: RecheckConfig, found: dict[str, Any]) -> dict[str, Any]:
    """What `verify` found, with what the teacher says; nobody is asked of bytes that are not those of the dump."""
    if not found["ok"]:
        say("note: the teacher was not run: mend the store first")
        return found
    said = recheck(path, config)
    problems = [*found["problems"], *said.pop("problems")]
    return {**found, "ok": not problems, "problems": problems, "recheck": said}


def _prepare(store: TeacherStore, config: RecheckConfig, asked: DumpConfig, model: torch.nn.Module | None) -> Job:
    kept, kind = inner_of(store), task_class(store.task)
    asked = implementation(asked, kept)
    teacher = teacher_of(asked, kind.model_class, model)
    _check_classes(store, teacher)
    task = kind(asked, teacher, source_of(store))
    ids = _chosen(store, config)
    samples = samples_of(store, ids, teacher.inputs)
    capture = Capture(teacher, task)
    if schema.INPUT_IDS in store.fields:
        _check_length(store, teacher, int(samples.lengths["S"].max()))
        _check_tokens(store, capture.model, samples)
    if kept is not None:
        task = InnerTask(task, asked, kept)
        capture = capture.running(task)
    columns = [
        spec for spec in store.fields.values()
        if spec.name == PIXEL_HASH
        or (spec.role == "teacher" and spec.name not in _NOT_COMPARED and spec.parameters.get("of") != "kept")
    ]  # fmt: skip
    pilot = planning.Pilot("", samples, 0.0, 0.0, 0.0)
    per_batch = planning.tokens_per_batch(asked, teacher, list(kept.specs) if kept else [], pilot)
    vocabulary = teacher.vocabulary if "top_k_logits" in TASKS[store.task].settings else None
    return Job(store, asked, teacher, task, capture, samples, ids, columns, vocabulary, per_batch)


def _chosen(store: TeacherStore, config: RecheckConfig) -> np.ndarray:
    """int64, ascending sample_ids, each once."""
    count = int(store.first_row[-1])
    if not count:
        raise ConfigError(f"{store.path} has no rows")
    drawn = np.random.default_rng(config.seed).choice(count, min(config.sample, count), replace=False)
    return np.sort(drawn).astype(np.int64)


def _compare(job: Job) -> dict[str, Deviation]:
    found = {spec.name: Deviation() for spec in job.columns}
    extra = [name for name in _IDS if name in job.store.fields]
    rows = job.store.select(fields=[*found, *extra])
    with RowProgress("rows run again", len(job.ids)) as progress:
        for batch in token_batches(job.samples.lengths["S"], job.per_batch):
            stored = rows[job.ids[batch]]
            mask = stored.get(schema.ATTENTION_MASK, np.zeros((0, 0))).astype(bool)  # images have none
            entries = stored.get("teacher_mask", mask)
            given = {} if job.vocabulary is None else {"kept": _at_stored(job, stored_ids(stored, entries))}
            captured = job.capture(job.samples, batch, **given).arrays()
            now = job.task.outputs(job.samples, batch, captured)
            for name, away, bounds, owner in _pairs(job, stored, now, mask, entries, batch):
                found[name].add(away, bounds, owner)
            progress.passed(len(batch))
    return found


def _at_stored(job: Job, ids: np.ndarray | None) -> AtStored:
    assert job.vocabulary is not None
    if ids is not None and ids.size and ids.max() >= job.vocabulary:
        raise StoreMismatch(
            f"{job.store.path} has probabilities of id {ids.max()}, and the teacher has {job.vocabulary} entries"
        )
    return AtStored(job.config, job.vocabulary, ids)


def _pairs(
    job: Job, stored: dict[str, Any], now: dict[str, Any], mask: np.ndarray, entries: np.ndarray, batch: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(column, deviations, bounds, sample_ids) of one batch."""
    peaks = [_peak(now[spec.name]) for spec in job.columns if is_of_logits(spec) and spec.name in now]
    for spec in job.columns:
        if spec.name not in now:
            raise ConfigError(f"{job.store.path}: {spec.name} is nothing that this teacher gives here")
        of_logits = is_of_logits(spec)
        noise = noise_of(job.capture.dtype, max(peaks) if of_logits else _peak(now[spec.name]))
        if spec.shape.count("S") > 1:
            for at, row in enumerate(batch):
                size = int(job.samples.lengths["S"][row])
                cut = (slice(at, at + 1), *(slice(size if one == "S" else None) for one in spec.shape))
                away, bounds = compare(spec, stored[spec.name][cut], now[spec.name][cut], noise)
                yield spec.name, away, bounds, job.ids[[row]]
            continue
        where = entries if spec.shape[:1] == ("P",) else mask
        of_tokens = spec.shape[:1] in (("S",), ("P",))
        left = stored[spec.name][where] if of_tokens else stored[spec.name]
        right = np.asarray(now[spec.name])
        if of_tokens and not (of_logits and job.vocabulary is not None):  # which is without padding already
            right = right[where]
        if left.shape != right.shape:
            raise StoreMismatch(
                f"{job.store.path}: {spec.name} has values of shape {list(left.shape[1:])}, and the teacher gives "
                f"{list(right.shape[1:])}"
            )
        away, bounds = compare(spec, left, right, noise)
        owner = job.ids[batch][np.nonzero(where)[0]] if of_tokens else job.ids[batch]
        if "K" in spec.shape:  # past a position's own entries there is nothing
            real = np.arange(left.shape[-1]) < stored[spec.parameters["counts"]][where][:, None]
            away, bounds, owner = away[real], bounds[real], np.repeat(owner, real.sum(axis=1))
        yield spec.name, away, bounds, owner


def _peak(values: Any) -> float:
    """The largest, of those that the teacher does not rule out."""
    values = np.asarray(values)
    return float(np.abs(values[(values > _NO_LOGIT) & np.isfinite(values)]).max(initial=0))


def _differences(store: TeacherStore, identity: dict[str, Any]) -> list[dict[str, str]]:
    """What the store says of its teacher and tokenizer that is otherwise here; names are information only."""
    found = []
    for part in ("teacher", "tokenizer"):
        ours = {name: value for name, value in store.identity.get(part, {}).items() if value != UNKNOWN}
        theirs = {name: value for name, value in identity.get(part, {}).items() if name in ours}
        found += [(f"{part}.{name}", *pair) for name, *pair in differences(ours, theirs) if name != "name"]
    return [{"name": name, "store": short(left), "teacher": short(right)} for name, left, right in found]


def _problems(job: Job, who: str, found: dict[str, Deviation]) -> Iterator[dict[str, str]]:
    for name, one in found.items():
        if not one.beyond:
            continue
        shard = int(np.searchsorted(job.store.first_row, one.row, side="right")) - 1
        local = one.row - int(job.store.first_row[shard])
        source = job.store.mapped(shard).column(schema.SOURCE_INDEX)[local].as_py()
        yield {
            "path": f"{SHARDS}/{job.store.shards[shard].name}.arrow", "kind": "teacher",
            "detail": f"{name} is not what {who} says: {one.beyond} of {one.values} values are further from it than "
            f"their precision explains, by up to {one.worst:.3g} times; the largest deviation is {one.largest:.4g}, "
            f"where {one.bound:.2g} is; see row {source} of split {job.store.shards[shard].split}",
        }  # fmt: skip


def _check_classes(store: TeacherStore, teacher: Teacher) -> None:
    """Raises StoreMismatch where the teacher has another number of classes."""
    spec = store.fields.get(schema.LOGITS)
    if spec is None or "top_k_logits" in TASKS[store.task].settings:
        return
    classes = spec.shape[0 if len(spec.shape) == 3 else -1]  # of images [C, h, w]
    if classes != teacher.num_labels:
        raise StoreMismatch(
            f"{store.path} has logits of {classes} classes, and the teacher gives {teacher.num_labels}: give "
            "the teacher that it was made with"
        )


def _check_length(store: TeacherStore, teacher: Teacher, longest: int) -> None:
    """Raises StoreMismatch where rows are longer than the teacher takes."""
    try:
        teacher.max_length(max(longest, _SHORT))
    except ConfigError as error:
        if longest > _SHORT:
            reason = str(error).partition(": ")[2]
            raise StoreMismatch(f"{store.path} has rows of {longest} tokens: {reason}") from error


def _check_tokens(store: TeacherStore, model: Any, samples: Samples) -> None:
    """Raises StoreMismatch where the teacher does not know a stored token."""
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return
    largest = int(samples.values[schema.INPUT_IDS].max())
    if known is not None and largest >= known:
        raise StoreMismatch(f"{store.path} has token {largest}, and the teacher knows {known}: give another teacher")
