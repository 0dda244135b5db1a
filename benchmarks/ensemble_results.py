"""Is a student of three teachers better than one of the best of them? SST-2, three seeds, mean and spread.

The teachers (ensemble_teachers.py) have each seen a third of the labels, and one reads other tokens. Stores hold their
logits on 4,000 training rows, whose labels are dropped, on 1,000 rows that no teacher has seen (`tune`, for learnt
weights) and on validation. The student has the pretrained backbone's blocks 2 and 5 and a new head, and learns from
stored logits alone (alpha 1, temperature 2): from the store of the teacher that is best on `tune`, or from all three.

Prints what teachers and averages reach on validation by themselves, then the students. 32 rows a step, AdamW, linear
warm-up over 10 % and decay; each run is a process of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from predistill.benchmarks.ensemble_teachers import HELD_OUT, MEMBERS, member
from predistill.benchmarks.measure import WORK, note, quiet, table
from predistill.benchmarks.seeds import TRAINING, all_measured, arguments, seed_cells

TRAIN, TUNE = 4000, 1000  # rows
STUDENT, EPOCHS, RATE, TEMPERATURE = "from-teacher-layers:2,5", 2, 1e-4, 2.0
ARMS = {"best single teacher": "", "ensemble, equal weights": "equal", "ensemble, learned weights": "learned",
        "ensemble, weights by confidence": "confidence"}  # fmt: skip


class Run(NamedTuple):
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        name = self.arm.replace(", ", "-").replace(" ", "-")
        return WORK / "runs" / f"ensemble_{name}_{self.seed}_{TRAIN}_{EPOCHS}_{RATE}"


def dataset() -> str:
    from predistill.benchmarks.real import DATA, write_rows
    from predistill.benchmarks.teachers import TASKS, read_rows

    rows = read_rows("sst2")
    chosen = np.sort(np.random.default_rng(0).choice(len(rows) - HELD_OUT, TRAIN, replace=False))
    unlabelled = [{**rows[at], "label": None} for at in chosen]
    parts = {
        "train": write_rows(WORK / "data" / f"ensemble-{TRAIN}.jsonl.gz", unlabelled),
        "tune": write_rows(WORK / "data" / f"ensemble-tune-{TUNE}.jsonl.gz", rows[-TUNE:]),
        "validation": DATA / "sst2" / TASKS["sst2"][1],
    }
    return ",".join(f"{name}={path}" for name, path in parts.items())


def store_of(number: int) -> Path:
    """The store of teacher number 0, 1 or 2; dumped where it is not there yet."""
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"ensemble-{MEMBERS[number]}-{TRAIN}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        with quiet():
            dump(DumpConfig(teacher=str(member(number)), dataset=dataset(), task="text-classification",
                            dtype="float32", output_dir=str(folder), max_length=128))  # fmt: skip
    return folder


def stored(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float64 [K, N, C] of all teachers, labels int64 [N])."""
    from predistill.store import TeacherStore

    logits, labels = [], None
    for number in range(len(MEMBERS)):
        with TeacherStore.open(store_of(number)) as store:
            rows = store.select(split)
            logits.append(torch.from_numpy(np.array(rows.column("teacher_logits"), np.float64)))
            labels = torch.from_numpy(np.array(rows.column("labels"), np.int64))
    assert labels is not None
    return torch.stack(logits), labels


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).double().mean())


def best() -> int:
    """The teacher that is best on `tune`."""
    return int(np.argmax([accuracy(one, stored("tune")[1]) for one in stored("tune")[0]]))


def teachers() -> None:
    """Teachers and averages, without any student."""
    from predistill.student_train.ensembles.formulas import combined, confidence_weights, fixed_weights, learned_weights

    (tune, tune_labels), (logits, labels) = stored("tune"), stored("validation")
    rows: list[list[object]] = [
        [f"teacher `{name}`", f"{accuracy(a, tune_labels):.1f}", f"{accuracy(b, labels):.1f}", ""]
        for name, a, b in zip(MEMBERS, tune, logits, strict=True)
    ]
    for average in ("probabilities", "logits"):
        learned = learned_weights(tune, tune_labels, average)
        shown = ", ".join(f"{one:.2f}" for one in learned.tolist())
        for name, weights, told in (
            ("equal", lambda _: fixed_weights([1.0] * len(MEMBERS)), ""),
            ("learned on tune", lambda _, found=learned: found, shown),
            ("by confidence", confidence_weights, ""),
        ):
            cells = [f"{accuracy(combined(z, weights(z), average), y):.1f}"
                     for z, y in ((tune, tune_labels), (logits, labels))]  # fmt: skip
            rows.append([f"{average} averaged, weights {name}", *cells, told])
    table(["accuracy of", "tune", "validation", "weights"], rows)


def train_student(run: Run) -> None:
    from predistill.benchmarks.teachers import backbone
    from predistill.student_train.train import train

    weights = ARMS[run.arm]
    numbers = range(len(MEMBERS)) if weights else [best()]
    more: dict[str, Any] = {"ensemble_weights": weights} if weights else {}
    if weights == "learned":
        more["ensemble_split"] = "tune"
    train(
        {
            "stores": [str(store_of(number)) for number in numbers],
            "student": STUDENT,
            "teacher": str(backbone()),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": TEMPERATURE,
            "alpha": 1.0,
            "eval_split": "validation",
            **more,
            "training_arguments": {
                **TRAINING,
                "num_train_epochs": EPOCHS,
                "learning_rate": RATE,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 32,
                "train_sampling_strategy": "group_by_length",
                "seed": run.seed,
            },
        }
    )


def report(arms: Sequence[str], seeds: Sequence[int]) -> None:
    teachers()
    runs = [Run(arm, seed) for seed in seeds for arm in arms]
    found = dict(zip(runs, all_measured(__file__, "eval_accuracy", runs), strict=True))
    rows = [[f"student of the {arm}", *seed_cells([100 * found[Run(arm, seed)] for seed in seeds], 1)] for arm in arms]
    table(["accuracy on validation", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student)
    report(args.arm, args.seeds)


if __name__ == "__main__":
    main()
