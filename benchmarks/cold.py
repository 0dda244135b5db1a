"""How fast is the first epoch, when nothing of the store is in memory yet?

Ratios, larger is better. `cold`: rows a second of `rows.batches(...)` over random batches of 32 after the
kernel was told to drop the files' pages (`posix_fadvise(DONTNEED)`), over the same for memory-mapped rows
copied in a loop, where each page fault waits for the disk. `first`: the same with pages in the page cache,
but not yet mapped.

Fair: every measurement is a new process that opens its file, reads so many batches and stops; store and
plain file hold the same rows and read the same index lists; processes take turns, and the median of the
rounds' ratios is reported. The pages of the process's own libraries stay warm in both. What the disk's
host caches is not known to us.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from predistill.benchmarks.measure import WORK, note, options, ratio, seconds, table
from predistill.benchmarks.plain import PlainRows
from predistill.benchmarks.reader import BATCH, drain, index_lists
from predistill.benchmarks.synthetic import LAYERS, ROW_BYTES, Synthetic
from predistill.store import TeacherStore

FIELDS = {"narrow": ("teacher_logits",), "map": ("teacher_feature_map",), "tokens": LAYERS}


def drop(path: Path) -> None:
    """Ask the kernel to forget a file's pages; they must be clean and mapped by nobody."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def read(what: str, made: Synthetic, folder: Path, batches: int) -> float:
    """Seconds from open to the last batch, in this process."""
    lists = index_lists(made.rows, batches)
    name = f"{made.kind}-{made.rows}-{made.shards}"
    if what == "store":

        def work() -> None:
            store = TeacherStore.open(folder / name)
            drain(store.select(split="train", fields=list(FIELDS[made.kind])).batches(lists))
    else:
        path = folder / f"{name}-{len(FIELDS[made.kind])}.bin"
        starts = made.write_plain(path)  # there already: only the starts are made

        def work() -> None:
            PlainRows(path, starts, BATCH).copy(lists)

    return seconds(work)


def child(what: str, made: Synthetic, folder: Path, batches: int, cold: bool) -> float:
    name = f"{made.kind}-{made.rows}-{made.shards}"
    plain = folder / f"{name}-{len(FIELDS[made.kind])}.bin"
    files = [plain] if what == "plain" else sorted((folder / name / "shards").glob("*.arrow"))
    for path in files:
        (drop if cold else warm)(path)
    command = [sys.executable, __file__, "--child", what, made.kind, str(made.rows), str(made.shards), str(batches)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(made: Synthetic, folder: Path, batches: int, rounds: int) -> list[object]:
    note(f"cold {made.kind}")
    name = f"{made.kind}-{made.rows}-{made.shards}"
    made.write_store(folder / name)
    made.write_plain(folder / f"{name}-{len(FIELDS[made.kind])}.bin")
    times: dict[tuple[str, bool], list[float]] = {}
    for number in range(rounds):
        for what in ("store", "plain") if number % 2 else ("plain", "store"):
            for cold in (True, False):
                times.setdefault((what, cold), []).append(child(what, made, folder, batches, cold))
    megabytes = batches * BATCH * ROW_BYTES[made.kind] / 1e6
    return [
        made.kind,
        20 if made.kind != "narrow" else "-",
        ratio(times["plain", True], times["store", True]),
        megabytes / float(np.median(times["store", True])),
        megabytes / float(np.median(times["plain", True])),
        ratio(times["plain", False], times["store", False]),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", nargs=5, metavar=("WHAT", "KIND", "ROWS", "SHARDS", "BATCHES"), help="for itself")
    args = parser.parse_args()
    folder = WORK / "stores"
    if args.child:
        what, kind, *numbers = args.child
        rows, shards, batches = map(int, numbers)
        print(read(what, Synthetic(kind, rows, shards), folder, batches))
        return
    shards = 2 if args.quick else 4
    found = [
        measure(Synthetic("map", 1300 * shards, shards), folder, 40 if args.quick else 80, 3 if args.quick else 5),
        measure(Synthetic("tokens", 1050 * shards, shards), folder, 40 if args.quick else 80, 3 if args.quick else 5),
        measure(Synthetic("narrow", 200_000 if args.quick else 2_000_000), folder, 400, 3),
    ]
    table(
        ["rows", "reach", "cold ÷ plain faults", "store MB/s", "plain MB/s", "first epoch ÷ plain, page cache warm"],
        found,
    )


if __name__ == "__main__":
    main()
