"""How large, how many shards, how long: from a few rows spread over the data."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..store import FieldSpec, ShardPlan, bytes_per_row
from ..store.schema import LABELS, entries_per_row, entry_width
from .capture import Capture, token_batches
from .config import DumpConfig
from .data import SourceData, read
from .disk import free_bytes
from .rows.label_names import disagreement
from .tasks import Samples, Task
from .teachers.teacher import Teacher

PILOT_ROWS = 1000  # tokenised to learn how long rows are
INDEX_BYTES = 150  # a row of index.duckdb and samples.parquet, kept columns aside
PILOT_SECONDS = 1.0  # of the teacher's time
# With a MiniLM, 1024 to 4096 are within 15 % of each other on one core, 16384 is 35 to 50 % slower; two cores like 4096
TOKENS_PER_BATCH = {"cpu": 4096}
TOKENS_ON_DEVICES = 32768
PIXELS_PER_BATCH = {"cpu": 2**20}  # 20 images of 224 x 224
PIXELS_ON_DEVICES = 2**23
MOST_IMAGES = 512
INNER_BYTES = {"cpu": 2**28}  # float32 of one batch, of which some wait to be written
INNER_BYTES_ON_DEVICES = 2**31
SHARD_WORK = {"cpu": 2e13}  # floating-point operations: some ten minutes, which is what a kill can lose
SHARD_WORK_ON_DEVICES = 2e16


@dataclass(frozen=True)
class Pilot:
    """What a few source rows tell of all. samples: those of the largest split, as they are stored.

    tokens, bytes, carried bytes and stored rows: of one source row, on average. lengths: of one stored row; "SS" is the
    mean of S². views: by split, how often all of this is stored; first: bytes that only the first view has; each: views
    of a source row, on average.
    """

    split: str
    samples: Samples
    tokens: float
    bytes: float
    carried: float
    stored: float = 1.0
    lengths: Mapping[str, float] = field(default_factory=dict)
    views: Mapping[str, int] = field(default_factory=dict)
    first: float = 0.0
    each: float = 1.0

    @property
    def mean_bytes(self) -> float:
        """Of a source row in one view, on average over the views."""
        return self.bytes - self.first * (1 - 1 / self.each)


def tokens_per_batch(config: DumpConfig, teacher: Teacher, inner: Sequence[FieldSpec], pilot: Pilot) -> int:
    """As asked for, or as the device likes it; at most as many, and one row's at least, as give INNER_BYTES of what is
    inside the teacher, where rows are as long as the pilot's longest."""
    kind = teacher.device.type
    usual = TOKENS_PER_BATCH.get(kind, TOKENS_ON_DEVICES)
    if (processing := getattr(teacher, "processing", None)) is not None:  # images, which count as one token each
        most = PIXELS_PER_BATCH.get(kind, PIXELS_ON_DEVICES)
        usual = min(max(most // math.prod(processing.output), 1), MOST_IMAGES)
    longest = int(pilot.samples.lengths["S"].max())
    entries = [entries_per_row(spec.shape, {"S": longest}) * entry_width(spec.shape) for spec in inner]
    most = INNER_BYTES.get(kind, INNER_BYTES_ON_DEVICES) // max(4 * sum(entries), 1)  # rows
    return config.tokens_per_batch or (min(usual, max(most, 1) * longest) if inner else usual)


def look(source: SourceData, task: Task, carried_bytes: float) -> Pilot:
    """Tokenise rows spread evenly over each split; the same rows for the same data. Bytes are told by `sized`."""
    made, looked, largest = {}, 0, max(source.splits, key=lambda split: len(source.splits[split]))
    for split, rows in source.splits.items():
        count = min(len(rows), max(1, PILOT_ROWS * len(rows) // source.rows))
        at = np.linspace(0, len(rows) - 1, count).astype(np.int64)
        made[split] = task.prepare(split, at, read(rows, task.columns, at.tolist()))
        looked += count
    totals = {name: sum(int(one.lengths[name].sum()) for one in made.values()) for name in made[largest].lengths}
    stored = sum(map(len, made.values()))
    lengths = {name: total / stored for name, total in totals.items()}
    lengths["SS"] = sum(int((one.lengths["S"] ** 2).sum()) for one in made.values()) / stored
    each = stored / looked
    views = dict(getattr(task, "views", {}))
    mean = sum(views.get(split, 1) * len(rows) for split, rows in source.splits.items()) / source.rows
    own = sum(one.nbytes for samples in made.values() for one in samples.values.values() if isinstance(one, pa.Array))
    carried = carried_bytes * each + own / looked
    return Pilot(largest, made[largest], totals["S"] / looked, 0.0, carried, each, lengths, views,
                 own / looked if views else 0.0, mean)  # fmt: skip


def sized(pilot: Pilot, fields: list[FieldSpec], entries: float = 0.0) -> Pilot:
    """With the bytes that these fields take; entries: of a position, where fields keep a number of them that varies."""
    row = bytes_per_row(fields, {"*": 1, "K": entries, **pilot.lengths})
    return replace(pilot, bytes=pilot.stored * row + pilot.carried)


def plan_shards(source: SourceData, pilot: Pilot, shard_size: int, teacher: Teacher) -> list[ShardPlan]:
    """Contiguous ranges of rows, near-equal within a split, of at most `shard_size` bytes and some minutes' work; the
    same for every view of a split, the first view before the others."""
    limit = rows_per_shard(pilot, shard_size, teacher)
    shards = []
    for split, rows in source.splits.items():
        count = math.ceil(len(rows) / limit)
        bounds = [len(rows) * at // count for at in range(count + 1)]
        shards += [
            ShardPlan(split, view * count + at, bounds[at], bounds[at + 1], view)
            for view in range(pilot.views.get(split, 1))
            for at in range(count)
        ]
    return shards


def rows_per_shard(pilot: Pilot, shard_size: int, teacher: Teacher) -> int:
    """At most."""
    work = SHARD_WORK.get(teacher.device.type, SHARD_WORK_ON_DEVICES)
    return max(1, int(min(shard_size / pilot.bytes, work / (2 * teacher.parameters * pilot.tokens))))


def room(pilot: Pilot, left: int, rows: int) -> int:
    """Bytes that `left` source rows still to be dumped, one for each view, and an index of all `rows` take."""
    index = INDEX_BYTES * pilot.stored + pilot.carried - pilot.first
    return round(left * pilot.mean_bytes + rows * pilot.each * index)


def time_teacher(capture: Capture, pilot: Pilot, per_batch: int, rows: int) -> tuple[float, str | None]:
    """(seconds a token, a line on labels or None) from at most `rows` stored pilot rows, in batches that double until
    PILOT_SECONDS are spent. The first batch warms up and does not count."""
    samples, rows = pilot.samples, min(rows, len(pilot.samples))
    order = shuffled(samples)[:rows]
    spent, tokens, logits, taken, size = 0.0, 0, [], 0, 8
    while taken < rows and spent < PILOT_SECONDS:
        chosen = order[taken : taken + size]
        began = time.perf_counter()
        for batch in token_batches(samples.lengths["S"][chosen], per_batch):
            found = capture(samples, chosen[batch]).arrays()
            if "logits" in found:  # one prediction a row
                logits.append((chosen[batch], found["logits"]))
        if taken:
            spent, tokens = time.perf_counter() - began, int(samples.lengths["S"][chosen].sum())
        taken, size = taken + size, size * 2
    return spent / max(tokens, 1), _agreement(samples, logits) if logits else None


def shuffled(samples: Samples) -> np.ndarray:
    """int64 [n]: the pilot's rows in an order of which any stretch is a fair sample."""
    return np.random.default_rng(0).permutation(len(samples))


def _agreement(samples: Samples, logits: list[tuple[np.ndarray, np.ndarray]]) -> str | None:
    labels = samples.values.get(LABELS)
    if labels is None or labels.dtype != np.int64 or labels.ndim != 1:
        return None
    rows = np.concatenate([at for at, _ in logits])
    predictions = np.concatenate([values.argmax(axis=1) for _, values in logits])
    return disagreement(labels[rows], predictions, logits[0][1].shape[1])


def figures(
    pilot: Pilot, rows: int | None, shards: int | None, seconds_per_token: float, folder: Path
) -> dict[str, Any]:
    """What `predistill plan --json` says of `rows` source rows: bytes of the shards, stored rows, seconds of the
    teacher; None where nobody knows how many will come."""
    found: dict[str, Any] = dict.fromkeys(("bytes", "bytes_per_sample", "shards", "samples", "tokens", "seconds"))
    found |= {"bytes_per_sample": round(pilot.mean_bytes / pilot.stored, 2), "free_bytes": free_bytes(folder)}
    if rows is None:
        return found
    rows = round(rows * pilot.each)
    return found | {
        "bytes": round(pilot.mean_bytes * rows),
        "shards": shards,
        "samples": round(rows * pilot.stored),
        "tokens": round(pilot.tokens * rows),
        "seconds": round(seconds_per_token * pilot.tokens * rows, 3),
    }
