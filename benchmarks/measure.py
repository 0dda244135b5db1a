"""What every benchmark shares: where data and teachers are, fair timing, and a small markdown table."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PREDISTILL_DATA", ROOT / "../shared/data"))
WORK = Path(os.environ.get("PREDISTILL_BENCH", ROOT / "benchmarks/work"))  # teachers, stores and runs that scripts make


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --quick, whose help begins with the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: minutes become seconds")
    return parser


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(rounds: int, **works: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each work, round by round, forwards then backwards, so that a slow minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        order = list(works) if number % 2 == 0 else list(reversed(works))
        for name in order:
            times[name].append(seconds(works[name]))
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a markdown table to stdout."""
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    print(flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def anonymous_bytes() -> int:
    """Anonymous memory of this process: heap and private pages, not mapped files."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line `Anonymous:`; a Linux of 4.14 or later is needed")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library prints out of stdout, which is for the table."""
    saved, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = saved
