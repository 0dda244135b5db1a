"""What does a store cost to write, compared with bytes alone?

Ratio, larger is better: bytes a second of `StoreWriter` (put in batches of 32 rows, narrow ones 16,384, commit with
sha256, fsync, rename, fsync of the folder, sidecar) over bytes a second of appending the same arrays to
one file and fsyncing it. `finish` (index, parquet, manifest) is shown apart, for it grows with rows and
not with bytes.

Fair: values are made before the clock starts; both write to the same disk and take turns; every round
writes to new files, and the page cache is synced between them. The median of the rounds' own ratios is
reported.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from predistill.benchmarks.measure import WORK, note, options, ratio, seconds, table
from predistill.benchmarks.synthetic import Synthetic
from predistill.store import Plan, StoreWriter

BATCH = 32  # rows
Pieces = list[tuple[np.ndarray, dict[str, np.ndarray]]]  # rows of the shard, values by field


def pieces(made: Synthetic) -> Pieces:
    """One shard's values in batches as a dump puts them: rows of like length together, not in source order."""
    shard = made.plans()[0]
    order = np.random.default_rng(0).permutation(made.rows)
    batch = BATCH if made.kind != "narrow" else 16_384
    lengths = made.lengths(shard).get("S")
    if lengths is not None:
        order = np.argsort(lengths, kind="stable")
    source = next(iter(Synthetic(made.kind, min(made.rows, 256)).values(shard)))[1]
    found: Pieces = []
    for start in range(0, made.rows, batch):
        rows = order[start : start + batch]
        count = len(rows) if lengths is None else int(lengths[rows].sum())
        found.append((rows, {name: np.resize(value, (count, *value.shape[1:])) for name, value in source.items()}))
    return found


def write_store(folder: Path, made: Synthetic, values: Pieces, written: list[StoreWriter]) -> None:
    plan = Plan("benchmark", {"rows": made.rows}, {"kind": made.kind}, made.specs, made.plans())
    shard = plan.shards[0]
    with StoreWriter.begin(folder, plan) as writer:
        builder = writer.open_shard(shard, rows=made.rows, lengths=made.lengths(shard))
        for rows, fields in values:
            for name, value in fields.items():
                builder.put(name, rows, value)
        builder.put_addresses(np.zeros((made.rows, 16), np.uint8))
        writer.commit(builder)
    written.append(writer)


def append(path: Path, values: Pieces) -> None:
    with open(path, "wb") as file:
        for _, fields in values:
            for value in fields.values():
                file.write(value.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def measure(made: Synthetic, folder: Path, rounds: int) -> list[object]:
    values = pieces(made)
    size = sum(value.nbytes for _, fields in values for value in fields.values())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    times: dict[str, list[float]] = {"store": [], "plain": [], "finish": []}
    for number in range(rounds):
        written: list[StoreWriter] = []
        for name in ("store", "plain") if number % 2 else ("plain", "store"):
            os.sync()
            if name == "plain":
                times[name].append(seconds(partial(append, folder / "plain", values)))
            else:
                times[name].append(seconds(partial(write_store, folder / "store", made, values, written)))
        times["finish"].append(seconds(written[0].finish))
        shutil.rmtree(folder / "store")
        (folder / "plain").unlink()
    middle = {name: sorted(found)[rounds // 2] for name, found in times.items()}
    return [made.kind, f"{size / 1e6:.0f}", 0.6, ratio(times["plain"], times["store"]), size / middle["store"] / 1e6,
            size / middle["plain"] / 1e6, middle["finish"]]  # fmt: skip


def main() -> None:
    args = options(__doc__).parse_args()
    quick = args.quick
    found = []
    for made in (Synthetic("tokens", 500 if quick else 1100), Synthetic("map", 600 if quick else 1360),
                 Synthetic("narrow", 500_000 if quick else 4_000_000)):  # fmt: skip
        note(f"writing {made.kind}")
        found.append(measure(made, WORK / "writer", rounds=3 if quick else 7))
    table(["rows", "MB", "reach", "store ÷ append", "store MB/s", "append MB/s", "finish s"], found)


if __name__ == "__main__":
    main()
