"""One store of SST-2, past one person and one machine, through the real command line:

    two workers dump it, one of which is killed  ->  push  ->  another user, in an empty environment, pulls a part
    ->  verify, by checksums and by the live teacher  ->  two ranks train a student from that part

    python benchmarks/shared_store.py --s3

Beside it a single process dumps the same store: all shards must be equal, byte for byte. The teacher is that of
teachers.py (sst2); the store holds its logits and its last hidden states. --s3 pushes to an S3 server that this script
starts (moto), else a folder stands for the remote. What a step prints is kept in WORK/shared/; the table says how long
each took, and what it found. Exits 1 at the first thing that is not as it should be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from predistill.benchmarks.measure import DATA, WORK, note, options, table

PLACE = WORK / "shared"
CONFUSING = "teacher_confidence < 0.95"
KILLED_AFTER = 3  # shards that are committed
PREDISTILL = [sys.executable, "-m", "predistill"]


def dump_command(output: Path, rows: int | None) -> list[str]:
    """rows: of each split; None: all."""
    names = {"train": "train.jsonl.gz", "validation": "validation.jsonl.gz"}
    found = [f"{split}={DATA / 'sst2' / name}" for split, name in names.items()]
    if rows:
        found = [f"{split}={_cut(DATA / 'sst2' / name, rows)}" for split, name in names.items()]
    return [
        *PREDISTILL, "dump", "--teacher", str(WORK / "teachers" / "sst2"), "--dataset", ",".join(found),
        "--task", "text-classification", "--fields", "logits,hidden_states", "--layers", "last",
        "--shard-size", "16MB" if rows is None else "2MB", "--output-dir", str(output), "--device", "cpu", "--json",
    ]  # fmt: skip


def _cut(path: Path, rows: int) -> Path:
    import gzip

    cut = PLACE / path.name.removesuffix(".gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        cut.write_text("".join(line for _, line in zip(range(rows), file, strict=False)), encoding="utf-8")
    return cut


def started(name: str, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A process of one thread; what it prints is in PLACE/NAME.out and NAME.err."""
    with (PLACE / f"{name}.out").open("w") as out, (PLACE / f"{name}.err").open("w") as err:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen(command, env=settings, stdout=out, stderr=err, text=True)


def ended(name: str, process: subprocess.Popen[str]) -> Any:
    """The JSON document that it printed."""
    if code := process.wait():
        sys.exit(f"{name}: exit code {code}\n{(PLACE / f'{name}.err').read_text()[-2000:]}")
    return json.loads((PLACE / f"{name}.out").read_text())


def ran(name: str, command: Sequence[str], **environment: str) -> tuple[Any, float]:
    note(f"{name} …")
    start = time.perf_counter()
    return ended(name, started(name, command, **environment)), time.perf_counter() - start


def committed(store: Path) -> list[Path]:
    return list((store / "shards").glob("*-*.json"))


def two_workers(command: Sequence[str], store: Path) -> tuple[str, float]:
    """Both at once; the second is killed when some shards are there, and the first makes the rest."""
    start = time.perf_counter()
    first, second = (started(f"worker {number}", command) for number in (1, 2))
    while len(committed(store)) < KILLED_AFTER:
        if first.poll() is not None or second.poll() is not None:
            sys.exit("both workers were to be alive when the second is killed: too few shards, or see worker *.err")
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    second.wait()
    at_kill = len(committed(store))
    ended("worker 1", first)
    return f"killed with {at_kill} of {len(committed(store))} shards there", time.perf_counter() - start


def hashes(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.glob("shards/*.arrow")}


@contextlib.contextmanager
def remote(s3: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """(where to push to, what the environment needs for it)."""
    if not s3:
        yield f"file://{PLACE}/remote", {}
        return
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    os.environ.update(found)
    boto3.client("s3").create_bucket(Bucket="stores")
    try:
        yield "s3://stores/sst2", found
    finally:
        server.stop()


def trained(name: str, store: Path, ranks: int, seed: int, elsewhere: dict[str, str], *more: str) -> tuple[Any, float]:
    """A student of two layers, 64 rows a step over all ranks."""
    config = PLACE / "student.json"
    config.write_text(json.dumps({
        "model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512,
    }))  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return ran(name, [
        *(launcher if ranks > 1 else [sys.executable]), "-m", "predistill", "train", str(store),
        "--student-config", str(config), "--output-dir", str(PLACE / name.replace(" ", "-")), "--seed", str(seed),
        "--learning-rate", "5e-4",
        "--num-train-epochs", "2", "--per-device-train-batch-size", str(64 // ranks), "--save-strategy", "no",
        "--eval-strategy", "epoch", "--report-to", "none", "--use-cpu", "--json", *more,
    ], **elsewhere)  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--s3", action="store_true", help="through an S3 server; needs moto[server] and s3fs")
    args = parser.parse_args()
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    rows: list[tuple[str, str, float]] = []
    size = 3000 if args.quick else None
    store, alone, part = (PLACE / name for name in ("store", "alone", "part"))

    found, took = two_workers(dump_command(store, size), store)
    rows.append(("dump, two workers, one killed", found, took))
    told, took = ran("alone", dump_command(alone, size))
    if hashes(store) != hashes(alone):
        sys.exit("the shards of two workers differ from those of one process")
    rows.append(("dump, one process", f"{len(hashes(alone))} shards, equal byte for byte", took))

    with remote(args.s3) as (url, keys):
        sent, took = ran("push", [*PREDISTILL, "push", str(store), url, "--license", "unknown", "--json"], **keys)
        rows.append(("push", f"{sent['bytes'] / 1e6:.0f} MB", took))
        home = PLACE / "home"  # another user's machine: nothing of this one's settings, caches or models
        home.mkdir()
        elsewhere = {"HOME": str(home), "PREDISTILL_CACHE": str(home / "cache"), "HF_HOME": str(home / "hf"), **keys}
        taken, took = ran("pull", [*PREDISTILL, "pull", url, str(part), "--fields", "teacher_logits", "--json"],
                          **elsewhere)  # fmt: skip
        rows.append(("pull, logits alone", f"{taken['fetched'] / 1e6:.1f} MB fetched", took))
        hard, took = ran("pull hard", [*PREDISTILL, "pull", url, str(PLACE / "hard"), "--split", "validation",
                                       "--where", CONFUSING, "--json"], **elsewhere)  # fmt: skip
        rows.append(("pull, validation's hard rows", f"{hard['shards']} shards", took))

    checked, took = ran("verify", [*PREDISTILL, "verify", str(part), "--json"], **elsewhere)
    rows.append(("verify", f"ok, {checked['shards']} shards, {checked['samples']} samples", took))
    live, took = ran("verify teacher", [*PREDISTILL, "verify", str(part), "--teacher", str(WORK / "teachers" / "sst2"),
                                        "--sample", "200", "--json"], **elsewhere)  # fmt: skip
    logits = live["recheck"]["fields"]["teacher_logits"]
    rows.append(("verify --teacher, 200 rows", f"ok, {logits['worst']:.2f} of the bound", took))
    for seed in (1,) if args.quick else (1, 2, 3):
        for name, alpha in (("teacher", "0.9"), ("labels", "0")):
            metrics, took = trained(f"{name} {seed}", part, 2, seed, elsewhere, "--alpha", alpha, "--temperature", "2")
            rows.append((f"train, two ranks, {name}, seed {seed}", f"accuracy {metrics['eval_accuracy']:.4f}", took))
    one, took = trained("one rank", part, 1, 1, elsewhere, "--alpha", "0.9", "--temperature", "2")
    rows.append(("train, one rank, teacher, seed 1", f"accuracy {one['eval_accuracy']:.4f}", took))
    table(("step", "found", "seconds"), rows)


if __name__ == "__main__":
    main()
