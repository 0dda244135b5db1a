"""Does distillation from a store help a real student? SST-2 and AG News, three seeds, mean and spread.

The teacher (teachers.py) is fine-tuned on the labels of all training rows. The student has the pretrained
backbone's blocks 2 and 5 and a new head: it has never seen the teacher's fine-tuning. Arms, all trained by
`train()`:

    few            labels of a few rows only
    few + teacher  the labels of those few, and the teacher's stored logits on all rows
    all            labels of all rows
    all + teacher  the same, and the teacher's stored logits

32 rows a step, AdamW, linear warm-up over 10 % and decay, clip 1.0, batches grouped by length. Temperature
and alpha come from `--tune`, which trains on all but the last 2,000 training rows and looks at those; the
evaluation split is never looked at. Each run is a process of one thread; two run at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from predistill.benchmarks.measure import WORK, options, quiet, table
from predistill.benchmarks.seeds import all_measured, seed_cells

SEEDS = (1, 2, 3)
HELD_OUT = 2000  # rows
STUDENT = "from-teacher-layers:2,5"


class Setting(NamedTuple):
    """How one data set is trained. few: labelled rows; epochs by arm; temperature and alpha by labels."""

    few: int
    epochs: dict[str, float]
    temperature: float
    alpha: dict[str, float]
    learning_rate: float = 1e-4


TASKS = {
    "sst2": Setting(2000, {"few": 8, "few + teacher": 3, "all": 3, "all + teacher": 3}, 2.0,
                    {"few + teacher": 0.9, "all + teacher": 0.7}),
    "ag_news": Setting(300, {"few": 12, "few + teacher": 2, "all": 2, "all + teacher": 2}, 2.0,
                       {"few + teacher": 0.9, "all + teacher": 0.7}),
}  # fmt: skip


class Run(NamedTuple):
    task: str
    arm: str
    seed: int
    temperature: float
    alpha: float
    epochs: float
    learning_rate: float
    tune: bool = False

    @property
    def folder(self) -> Path:
        parts = (self.task, self.arm.replace(" + ", "-"), self.seed, self.temperature, self.alpha, self.epochs,
                 self.learning_rate, "tune" if self.tune else "")  # fmt: skip
        return WORK / "runs" / "_".join(map(str, parts)).strip("_")


def runs_of(task: str, arms: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    setting = TASKS[task]
    return [Run(task, arm, seed, setting.temperature, setting.alpha.get(arm, 0.0), setting.epochs[arm],
                setting.learning_rate) for seed in seeds for arm in arms]  # fmt: skip


def store_of(run: Run) -> Path:
    from predistill.benchmarks.real import dumped

    return dumped(run.task, TASKS[run.task].few if run.arm.startswith("few") else None, held_out=HELD_OUT)


def train_student(run: Run) -> float:
    """Accuracy on the evaluation split (of a tuning run: on the rows held out), in this process."""
    from predistill.benchmarks.teachers import backbone
    from predistill.student_train.train import train

    split = "tune" if run.tune else "test" if run.task == "ag_news" else "validation"
    metrics = train(
        {
            "stores": [str(store_of(run))],
            "student": STUDENT,
            "teacher": str(backbone()),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": run.temperature,
            "alpha": run.alpha,
            "eval_split": split,
            "where": before_held_out(run) if run.tune else None,
            "training_arguments": {
                "num_train_epochs": run.epochs,
                "learning_rate": run.learning_rate,
                "per_device_train_batch_size": 32,
                "warmup_steps": 0.1,
                "seed": run.seed,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
            },
        }
    )
    return float(metrics["eval_accuracy"])


def before_held_out(run: Run) -> str:
    from predistill.benchmarks.teachers import read_rows

    return f"source_index < {len(read_rows(run.task)) - HELD_OUT}"


def all_of(runs: list[Run]) -> list[float]:
    for run in runs:
        store_of(run)  # stores first, and one at a time
    return all_measured(__file__, "eval_accuracy", runs)


def teacher_accuracy(task: str) -> float:
    """The teacher on the evaluation split, asked of the index."""
    from predistill.store import TeacherStore

    split = "test" if task == "ag_news" else "validation"
    with TeacherStore.open(store_of(runs_of(task, ["all"], [1])[0])) as store:
        query = f"SELECT avg((teacher_prediction = label)::INT) FROM samples WHERE split = '{split}'"
        return float(store.sql(query).fetchall()[0][0])


def report(task: str, arms: list[str], seeds: tuple[int, ...]) -> None:
    runs = runs_of(task, arms, seeds)
    accuracy = dict(zip(runs, all_of(runs), strict=True))
    rows: list[list[object]] = [["teacher, 6 blocks", *("" for _ in seeds), f"{100 * teacher_accuracy(task):.1f}", ""]]
    for arm in arms:
        found = [100 * value for run, value in accuracy.items() if run.arm == arm]
        rows.append([arm, *seed_cells(found, 1)])
    setting = TASKS[task]
    print(f"{task}: few = {setting.few} labels, T {setting.temperature:g}, alpha {setting.alpha}\n")
    table(["arm", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def tune(task: str) -> None:
    """Temperature and alpha on held-out training rows: one seed, one epoch of few + teacher."""
    grid = [(temperature, alpha) for temperature in (1.0, 2.0, 4.0) for alpha in (0.7, 0.9, 1.0)]
    rate = TASKS[task].learning_rate
    runs = [Run(task, "few + teacher", 1, temperature, alpha, 1, rate, True) for temperature, alpha in grid]
    found = [[run.temperature, run.alpha, f"{100 * value:.1f}"] for run, value in zip(runs, all_of(runs), strict=True)]
    table([f"{task}: temperature", "alpha", "accuracy on held-out training rows"], found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="default: both")
    parser.add_argument("--arm", choices=list(TASKS["sst2"].epochs), action="append", help="default: all four")
    parser.add_argument("--tune", action="store_true", help="choose temperature and alpha instead")
    parser.add_argument("--child", help="for itself")
    args = parser.parse_args()
    if args.child:
        with quiet():
            train_student(Run(*json.loads(args.child)))
        return
    for task in args.task or list(TASKS):
        if args.tune:
            tune(task)
        elif args.quick:
            report(task, args.arm or ["few", "few + teacher"], SEEDS[:1])
        else:
            report(task, args.arm or list(TASKS[task].epochs), SEEDS)


if __name__ == "__main__":
    main()
