"""What does a store of a billion samples in 100,000 shards cost, apart from its tensors? Seconds and memory.

    Plan, commits, index, queries, selections, sampler, first batch and verify's listing, over a store whose manifest,
    sidecars, index and samples.parquet are real and whose shards are hard links to 40 files of random rows: 100,000
    shards of 10,000 rows then take as much disk as 40 do. docs/scale.md has the figures.

    .venv/bin/python benchmarks/scale.py --samples 1e6          # a minute or two, 0.5 GB
    .venv/bin/python benchmarks/scale.py --samples 1e8          # 6 GB
    .venv/bin/python benchmarks/scale.py --samples 1e9 --one-hash --no-verify   # 12 GB

Fair: each group of steps is a new process; `MB` is the most anonymous memory that a step adds to it (looked at every
50 ms), so pages of mapped files do not count. `--one-hash` gives all rows the same content hash, which takes no room in
the index, and summaries of two decimals: 10^9 rows that differ would take 26 GB there.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from predistill.benchmarks.measure import WORK, anonymous_bytes, note, options, quiet, table
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, TeacherStore, index, manifest, verify
from predistill.store.atomic import write_synced
from predistill.store.shard import ShardBuilder

KINDS = 40  # files of random rows
SUMMARIES = ("teacher_confidence", "teacher_entropy", "teacher_loss")
SPECS = [
    FieldSpec("input_ids", ("S",), "int32", role="input"),
    FieldSpec("labels", (), "int64", role="label", pad=-100),
    FieldSpec("teacher_logits", (2,), "float32"),
    FieldSpec("teacher_prediction", (), "int32", role="summary"),
    *(FieldSpec(name, (), "float32", role="summary") for name in SUMMARIES),
]
BATCH = 256
HELD = 2**35  # bytes of memory that windows may hold


def plan_of(samples: int, shards: int) -> Plan:
    """A hundredth of the shards are another split."""
    each, other = samples // shards, max(1, shards // 100)
    made = [ShardPlan("train", n, n * each, (n + 1) * each) for n in range(shards - other)]
    made += [ShardPlan("validation", n, n * each, (n + 1) * each) for n in range(other)]
    settings = {"num_labels": 2, "problem_type": "single_label_classification"}
    return Plan("text-classification", settings, {"teacher": {"name": "none"}}, SPECS, made, ["negative", "positive"])


def random_shard(plan: Plan, kind: int, rows: int, one_hash: bool) -> ShardBuilder:
    """Rows of 8 to 512 tokens, 80 on average; summaries of three decimals."""
    random, at = np.random.default_rng(kind), np.arange(rows)
    lengths = np.clip(random.lognormal(4.2, 0.6, rows), 8, 512).astype(np.int64)
    builder = ShardBuilder(plan.shards[0], SPECS, rows, {"S": lengths})
    logits = random.normal(size=(rows, 2)).astype(np.float32)
    confidence = np.round(random.random(rows) / 2 + 0.5, 3).astype(np.float32)
    builder.put("input_ids", at, random.integers(0, 30_000, int(lengths.sum()), dtype=np.int32))
    builder.put("labels", at, random.integers(0, 2, rows))
    builder.put("teacher_logits", at, logits)
    builder.put("teacher_prediction", at, logits.argmax(1).astype(np.int32))
    for name, values in zip(SUMMARIES, (confidence, 0.7 * (1 - confidence), -np.log(confidence)), strict=True):
        builder.put(name, at, np.round(values, 2 if one_hash else 3).astype(np.float32))
    hashes = random.integers(0, 256, (rows, 16), dtype=np.uint8)
    builder.put_addresses(np.zeros_like(hashes) if one_hash else hashes)
    return builder


def make(path: Path, samples: int, shards: int, one_hash: bool) -> None:
    """All but index, samples.parquet and store.json, which `finish` writes."""
    shutil.rmtree(path, ignore_errors=True)
    plan, rows = plan_of(samples, shards), samples // shards
    with StoreWriter.begin(path, plan):
        kinds = []
        for kind in range(min(KINDS, shards)):
            builder = random_shard(plan, kind, rows, one_hash)
            file = path / manifest.SHARDS / f"kind-{kind}.tmp"
            kinds.append((file, {**write_synced(builder.to_batch(plan.fingerprint), file), "tokens": builder.tokens}))
        for number, shard in enumerate(plan.shards):
            file, written = kinds[number % len(kinds)]
            target = manifest.shard_path(path, shard.name)
            os.link(file, target)
            entry = {**written, "rows": rows, "fingerprint": plan.fingerprint}
            target.with_suffix(".json").write_text(json.dumps(entry))
        for file, _ in kinds:
            file.unlink()


@contextmanager
def step(name: str) -> Iterator[SimpleNamespace]:
    """Prints one line of JSON: what, seconds, MB, and what was found."""
    told, done, before = SimpleNamespace(found=""), threading.Event(), anonymous_bytes()
    most = [before]

    def look() -> None:
        while not done.wait(0.05):
            most.append(max(most.pop(), anonymous_bytes()))

    watcher = threading.Thread(target=look)
    watcher.start()
    start = time.perf_counter()
    yield told
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps([name, seconds, (max(*most, anonymous_bytes()) - before) / 1e6, str(told.found)]), flush=True)


# ---- groups of steps, each in a process of its own ----


def planning(path: Path) -> None:
    with step("read plan.json") as told:
        plan = manifest.read_plan(path)
        told.found = f"{(path / manifest.PLAN).stat().st_size / 1e6:.1f} MB"
    with step("fingerprint of the plan"):
        plan.fingerprint  # noqa: B018  computed once
    copy = path.with_name(f"{path.name}-plan.json")
    with step("write plan.json"):
        manifest.write_json(copy, plan.to_json())
    copy.unlink()
    with step("committed(), missing(): nothing there"):
        manifest.committed(path / "tokenizer", plan)
    with step("committed(), missing(): all sidecars") as told:
        told.found = len(manifest.committed(path, plan))


def finishing(path: Path) -> None:
    plan = manifest.read_plan(path)
    with StoreWriter.begin(path, plan) as writer, step("finish(): index, samples.parquet, store.json") as told:
        writer.finish()
        sizes = ((path / name).stat().st_size for name in (manifest.INDEX, manifest.SAMPLES, manifest.MANIFEST))
        told.found = ", ".join(f"{size / 1e6:,.0f}" for size in sizes) + " MB"


def reading(path: Path) -> None:
    with step("open"):
        store = TeacherStore.open(path)
    with step("select(split)") as told:
        rows = store.select("train")
        told.found = f"{len(rows):,} rows"
    with step("first batch of 32 rows"):
        next(iter(rows.batches([np.random.default_rng(0).integers(0, len(rows), 32)])))
    queries = {
        "count by split": "SELECT split, count(*) FROM samples GROUP BY split",
        "mean loss WHERE teacher_entropy > 0.3": "SELECT avg(teacher_loss) FROM samples WHERE teacher_entropy > 0.3",
        "one sample_id": f"SELECT shard, row FROM samples WHERE sample_id = {len(rows) // 2}",
    }
    for name, query in queries.items():
        with step(f"SQL: {name}") as told:
            told.found = store.sql(query).fetchall()
    with step("select(where='teacher_entropy > 0.3')") as told:
        kept = store.select("train", where="teacher_entropy > 0.3")
        told.found = f"{len(kept):,} rows"
    with step("first batch of 32 of these"):
        next(iter(kept.batches([np.arange(32) * 7919 % len(kept)])))


def training(path: Path) -> None:
    from predistill.student_train.sampler import TrainBatchSampler, window_of

    rows = TeacherStore.open(path).select("train", fields=["teacher_logits"])
    with step("bytes of the rows, and windows of them") as told:
        nbytes = rows.nbytes
        wanted = window_of("auto", nbytes, len(rows), HELD, len(rows.store.shards))
        told.found = f"{nbytes / 1e9:,.1f} GB, {wanted} rows"
    with step("longest row (can the student read it?)") as told:
        told.found = rows.longest[1]
    for name, window in (("global shuffle", None), ("windows", wanted)):
        grouped: dict[str, Any] = {"lengths": rows.lengths_of, "longest": rows.longest[0]}
        for what, more in ((name, dict[str, Any]()), (f"{name}, by length", grouped)):
            batches = iter(TrainBatchSampler(len(rows), BATCH, window=window, **more))
            with step(f"sampler, {what}: first batch"):
                next(batches)
            with step(f"sampler, {what}: 100 more"):
                for _ in itertools.islice(batches, 100):
                    pass
    for name, window in (("global shuffle", None), ("windows", wanted)):
        chosen = itertools.islice(TrainBatchSampler(len(rows), 32, window=window), 500)
        with step(f"reading 500 batches of 32, {name}") as told:
            for _ in rows.batches(chosen):
                pass
            told.found = f"{len(Path('/proc/self/maps').read_text().splitlines()):,} maps"


def verifying(path: Path) -> None:
    made = manifest.read_manifest(path)
    plan = manifest.plan_of(made, str(path))
    with step("verify: listing of the folder"):
        list(verify._extra_problems(path, plan))
    with step("verify: index against shards") as told, index.Index(path) as stored:
        told.found = index.agrees(path, made, stored.connection)


GROUPS = {one.__name__: one for one in (planning, finishing, reading, training, verifying)}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--samples", type=float, help="rows (default: 1e6; with --quick 1e5)")
    parser.add_argument("--shards", type=float, help="shards (default: 1e5; with --quick 1e3)")
    parser.add_argument("--one-hash", action="store_true", help="all rows have the same content hash")
    parser.add_argument("--no-verify", action="store_true", help="leave out verify")
    parser.add_argument("--keep", action="store_true", help="do not delete the store")
    parser.add_argument("--child", nargs=2, metavar=("GROUP", "PATH"), help="for itself")
    args = parser.parse_args()
    if args.child:
        GROUPS[args.child[0]](Path(args.child[1]))
        return
    samples = int(args.samples or (1e5 if args.quick else 1e6))
    shards = int(args.shards or (1e3 if args.quick else 1e5))
    path = WORK / "stores" / f"scale-{samples}-{shards}"
    note(f"{samples:,} samples in {shards:,} shards")
    with quiet():
        make(path, samples, shards, args.one_hash)
    lines = []
    for name in GROUPS:
        if name != "verifying" or not args.no_verify:
            note(name)
            command = [sys.executable, __file__, "--child", name, str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                for line in child.stdout or ():
                    note(line.rstrip())
                    lines.append(json.loads(line))
            if child.returncode:
                sys.exit(f"{name} ended with {child.returncode}")
    table(["step", "seconds", "MB", "found"], lines)
    if not args.keep:
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
