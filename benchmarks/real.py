"""Real teachers and the stores that `dump` makes of them: made once, kept in the work folder, used by many
scripts.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from predistill.benchmarks.measure import DATA, WORK, note, quiet
from predistill.benchmarks.teachers import TASKS, fine_tune, read_rows
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump


def teacher(task: str) -> Path:
    """Folder of the fine-tuned teacher; trains it (10 minutes on two cores) where it is not there yet."""
    folder = WORK / "teachers" / task
    if not (folder / "config.json").exists():
        note(f"training a teacher for {task}")
        fine_tune(task, folder, epochs=TASKS[task][3], learning_rate=5e-5, batch_size=32, seed=0)
    return folder


def dataset(task: str, labelled: int | None = None, held_out: int = 0) -> str:
    """What --dataset takes: train and the evaluation split.

    labelled: keep the labels of so many rows, drawn once, and drop all others.
    held_out: the last so many rows of train once more as the split `tune`.
    """
    train, evaluation = (DATA / task / name for name in TASKS[task][:2])
    split = "test" if evaluation.name.startswith("test") else "validation"
    parts = {"train": train, split: evaluation}
    rows = read_rows(task)
    if labelled is not None:
        kept = set(np.random.default_rng(0).choice(len(rows), labelled, replace=False).tolist())
        masked = [{**row, "label": row["label"] if at in kept else None} for at, row in enumerate(rows)]
        parts["train"] = write_rows(WORK / "data" / f"{task}-{labelled}.jsonl.gz", masked)
    if held_out:
        parts["tune"] = write_rows(WORK / "data" / f"{task}-tune.jsonl.gz", rows[-held_out:])
    return ",".join(f"{name}={path}" for name, path in parts.items())


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def dumped(task: str, labelled: int | None = None, dtype: str = "float32", held_out: int = 0) -> Path:
    """A store of the teacher's logits; the same arguments give the same folder."""
    folder = WORK / "stores" / "-".join(map(str, (task, labelled or "all", dtype, held_out)))
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher(task)), dataset=dataset(task, labelled, held_out), dtype=dtype,
                    task="text-classification", output_dir=str(folder), max_length=128,
                )
            )  # fmt: skip
    return folder
