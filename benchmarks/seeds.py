"""Students of several arms and seeds, each a process of one thread, two at a time; earlier runs are read."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from predistill.benchmarks.measure import note, options, quiet

SEEDS = (1, 2, 3)
TRAINING = {  # of every run here; evaluated at the end alone
    "warmup_steps": 0.1, "eval_strategy": "steps", "eval_steps": 10**6, "save_strategy": "no", "report_to": [],
    "use_cpu": True,
}  # fmt: skip


class Run(Protocol):
    """A tuple of JSON values, from which `script --child` makes the same run and trains it into `folder`."""

    @property
    def folder(self) -> Path: ...


def measured(script: str, metric: str, run: Run) -> float:
    """`metric` of a run's metrics.json."""
    metrics = run.folder / "metrics.json"
    if not metrics.exists():
        note(f"{run.folder.name} …")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, "--child", json.dumps(run)]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{run.folder.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found = float(json.loads(metrics.read_text())[metric])
    note(f"{run.folder.name}: {found:.4f}")
    return found


def all_measured(script: str, metric: str, runs: Sequence[Run]) -> list[float]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(partial(measured, script, metric), runs))


def seed_cells(values: Sequence[float], digits: int) -> list[str]:
    """Each seed's value, their mean and standard deviation, as cells of a table."""
    spread = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "-"
    return [*(f"{value:.{digits}f}" for value in values), f"{statistics.mean(values):.{digits}f}", spread]


def arguments(
    doc: str | None, arms: Iterable[str], kind: type[Any], train: Callable[[Any], object], **flags: str
) -> argparse.Namespace:
    """What a script was asked for: arm (default: all), seeds, quick, and further `flags` with their help.

    In a child of `measured`, trains its run, a `kind`, by `train`, and ends.
    """
    parser, known = options(doc), list(arms)
    parser.add_argument("--arm", choices=known, action="append", help="default: all")
    parser.add_argument("--child", help="for itself")
    for name, told in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=told)
    args = parser.parse_args()
    if args.child:
        with quiet():
            train(kind(*json.loads(args.child)))
        sys.exit()
    args.arm, args.seeds = args.arm or known, SEEDS[:1] if args.quick else SEEDS
    return args
