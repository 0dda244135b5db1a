"""What grows with the store? Neither the reader's own memory nor the time to its first batch should.

`anonymous MB`: the most anonymous memory (heap; not mapped files) that reading 200 random batches of 32
adds to a process, over a small store and one ten times as large; the ratio of the two should be 1. `open`:
seconds from `TeacherStore.open` to the first batch, for 10 million samples, page cache warm and dropped.

Fair: every line is a new process; /proc/self/smaps_rollup is read after imports and after every tenth
batch.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from predistill.benchmarks.cold import drop
from predistill.benchmarks.measure import WORK, anonymous_bytes, note, options, table
from predistill.benchmarks.reader import BATCH
from predistill.benchmarks.synthetic import ROW_BYTES, Synthetic
from predistill.store import TeacherStore


def read(path: Path, rows: int) -> tuple[float, float]:
    """(most anonymous bytes added, seconds to the first batch)."""
    lists = np.random.default_rng(0).integers(0, rows, (200, BATCH))
    before = peak = anonymous_bytes()
    start = time.perf_counter()
    first = 0.0
    for number, _ in enumerate(TeacherStore.open(path).select(split="train").batches(lists)):
        first = first or time.perf_counter() - start
        if number % 10 == 9:
            peak = max(peak, anonymous_bytes())
    return peak - before, first


def child(path: Path, rows: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", str(path), str(rows)]
    memory, first = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(memory), float(first)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", nargs=2, metavar=("PATH", "ROWS"), help="for itself")
    args = parser.parse_args()
    if args.child:
        print(*read(Path(args.child[0]), int(args.child[1])))
        return
    folder, small = WORK / "stores", 0.1e9 if args.quick else 1e9
    grown = []
    for kind in ("tokens", "map"):
        found = []
        for size in (small, 10 * small):
            made = Synthetic(kind, int(size / ROW_BYTES[kind]), max(1, round(size / 256e6)))
            note(f"{kind}: {size / 1e9:g} GB")
            path = made.write_store(folder / f"{kind}-{made.rows}-{made.shards}")
            found.append(child(path, made.rows)[0] / 1e6)
        grown.append([kind, f"{small / 1e9:g} and {small / 1e8:g} GB", *found, found[1] / found[0]])
    table(["rows", "stores", "small: anonymous MB", "large: anonymous MB", "large ÷ small"], grown)

    made = Synthetic("narrow", 1_000_000 if args.quick else 10_000_000)
    note(f"{made.rows:,} samples")
    path = made.write_store(folder / f"narrow-{made.rows}-1")
    warm = min(child(path, made.rows)[1] for _ in range(3))
    for file in [*path.glob("shards/*"), path / "store.json", path / "index.duckdb"]:
        drop(file)
    memory, cold = child(path, made.rows)
    table(["samples", "reach s", "open to first batch, s", "the same, files dropped from memory", "anonymous MB"],
          [[f"{made.rows:,}", 1.0, warm, cold, memory / 1e6]])  # fmt: skip


if __name__ == "__main__":
    main()
