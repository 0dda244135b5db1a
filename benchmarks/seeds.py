"""Students of several arms and seeds, each a process of one thread, two at a time; earlier runs are read."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from predistill.benchmarks.measure import note


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
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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
