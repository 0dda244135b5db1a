"""Does augmentation help a student of few rows? SST-2, three seeds; of readers, reader_results.py says.

The teacher is that of teachers.py. It marks 250 training rows, or these and ten rewritten ones of each (`augment`, with
the model of masked_lm.py), or as many other training rows, which is what more data of the real kind would give. The
student has blocks 2 and 5 of the pretrained backbone and a new head, as in results.py. All arms have 344 steps of 32
rows: KL at T 2, alpha 0.9, and the labels of the rows; AdamW 1e-4, linear warm-up over 10 % and decay, clip 1.0.
One run after another, each a process of one thread.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import NamedTuple

from predistill.benchmarks.measure import WORK, note, quiet, table
from predistill.benchmarks.seeds import TRAINING, arguments, measured, seed_cells

ROWS, VIEWS, STEPS = 250, 10, 344
ARMS = ("few rows", "few rows, augmented", "as many rows")


class Run(NamedTuple):
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return WORK / "runs" / f"augment_{dashed(self.arm)}_{self.seed}_{ROWS}_{VIEWS}_{STEPS}"


def dashed(arm: str) -> str:
    return arm.replace(" ", "-").replace(",", "")


def few(rows: int) -> Path:
    """So many training rows of SST-2, drawn once; a larger number holds a smaller one's."""
    from predistill.benchmarks.teachers import read_rows

    path = WORK / "data" / f"sst2-few-{rows}.jsonl.gz"
    if not path.exists():
        order = read_rows("sst2")
        random.Random(0).shuffle(order)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in order[:rows])
    return path


def augmented() -> Path:
    from predistill.benchmarks.masked_lm import masked_lm
    from predistill.teacher_dump.augment import augment
    from predistill.teacher_dump.augmentation.config import AugmentConfig

    path = WORK / "data" / f"sst2-few-{ROWS}-augmented-{VIEWS}.jsonl"
    if not path.exists():
        with quiet():
            augment(AugmentConfig(str(few(ROWS)), str(path), masked_lm=str(masked_lm()), multiplication_factor=VIEWS))
    return path


def store(arm: str) -> Path:
    """Logits of the arm's rows and of the validation split."""
    from predistill.benchmarks.measure import DATA
    from predistill.benchmarks.real import teacher
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"sst2-{dashed(arm)}-{ROWS}-{VIEWS}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        train = augmented() if arm == ARMS[1] else few(ROWS if arm == ARMS[0] else ROWS * (1 + VIEWS))
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher("sst2")), task="text-classification", output_dir=str(folder), max_length=128,
                    dataset=f"train={train},validation={DATA / 'sst2/validation.jsonl.gz'}",
                )
            )  # fmt: skip
    return folder


def train_student(run: Run) -> None:
    from predistill.benchmarks.teachers import backbone
    from predistill.student_train.train import train

    train(
        {
            "stores": [str(store(run.arm))],
            "student": "from-teacher-layers:2,5",
            "teacher": str(backbone()),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": 2.0,
            "alpha": 0.9,
            "training_arguments": {
                **TRAINING,
                "max_steps": STEPS,
                "learning_rate": 1e-4,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 32,
                "seed": run.seed,
            },
        }
    )


def report(arms: list[str], seeds: tuple[int, ...]) -> None:
    for arm in arms:
        store(arm)
    runs = [Run(arm, seed) for seed in seeds for arm in arms]
    found = {run: 100 * measured(__file__, "eval_accuracy", run) for run in runs}
    rows: list[list[object]] = [[arm, *seed_cells([found[run] for run in runs if run.arm == arm], 1)] for arm in arms]
    table(["accuracy", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student)
    report(args.arm, args.seeds)


if __name__ == "__main__":
    main()
