"""Do the teacher's hidden states and attentions help where its logits alone do not? SST-2, three seeds.

The teacher (teachers.py) is an all-MiniLM-L6 fine-tuned on SST-2: 6 blocks, 384 wide, 12 heads. The student has random
weights, 3 blocks, 192 wide, 12 heads, so that all it knows of language is what it learns here. One store of logits,
embeddings, hidden states and attentions serves all arms, each trained by one `train()`:

    labels       the labels alone
    logits       KL at T 2 to the teacher's logits, alpha 0.9
    tinybert     --preset tinybert: hidden states and attentions first, then logits
    haystack     --preset haystack: the same on probabilities, then logits and labels

32 rows a step, AdamW, linear warm-up over 10 % and decay, clip 1.0. Every arm has the epochs that `--tune` found
best for it, on training rows that were held out; the validation split is never looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from predistill.benchmarks.measure import WORK, note, options, quiet, table
from predistill.benchmarks.seeds import all_measured, seed_cells

SEEDS = (1, 2, 3)
HELD_OUT = 2000  # rows
LAYERS = "0,2,4,6"
STUDENT = {"model_type": "bert", "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 12,
           "intermediate_size": 768, "max_position_embeddings": 128}  # fmt: skip


class Arm(NamedTuple):
    """settings: of TrainConfig. epochs: of the last stage; inner: of the one before, where there is one."""

    settings: dict[str, Any]
    epochs: float
    inner: float | None = None
    rate: float = 1e-3


ARMS = {
    "labels": Arm({"alpha": 0.0}, 3, rate=3e-4),
    "logits": Arm({"alpha": 0.9, "temperature": 2.0}, 3),
    "tinybert": Arm({"preset": "tinybert"}, 3, 5),
    "haystack": Arm({"preset": "haystack"}, 3, 5),
}


class Run(NamedTuple):
    arm: str
    seed: int
    epochs: float
    inner: float | None
    rate: float
    tune: bool = False

    @property
    def folder(self) -> Path:
        return WORK / "runs" / ("inside_" + "_".join(map(str, self[:5])) + ("_tune" if self.tune else ""))


def store() -> Path:
    """Logits, embeddings, hidden states and attention probabilities of every second layer, over both splits."""
    from predistill.benchmarks.real import dataset, teacher
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / "sst2-inside"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher("sst2")), dataset=dataset("sst2", held_out=HELD_OUT), max_length=128,
                    task="text-classification", output_dir=str(folder), layers=LAYERS,
                    fields=["logits", "hidden_states", "attentions"],
                )
            )  # fmt: skip
    return folder


def train_student(run: Run) -> float:
    """Accuracy on the validation split (of a tuning run: on the rows held out), in this process."""
    from predistill.benchmarks.teachers import read_rows
    from predistill.student_train.train import train

    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder.parent / "inside-student.json"
    config.write_text(json.dumps(STUDENT))
    arm = ARMS[run.arm]
    stages = {"intermediate": {"num_train_epochs": run.inner}, "prediction": {"num_train_epochs": run.epochs}}
    metrics = train(
        {
            **arm.settings,
            "stages": {} if run.inner is None else stages,
            "stores": [str(store())],
            "student_config": str(config),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "eval_split": "tune" if run.tune else "validation",
            "where": f"source_index < {len(read_rows('sst2')) - HELD_OUT}" if run.tune else None,
            "training_arguments": {
                **({} if run.inner is not None else {"num_train_epochs": run.epochs}),
                "learning_rate": run.rate,
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


def all_of(runs: list[Run]) -> list[float]:
    store()
    return all_measured(__file__, "eval_accuracy", runs)


def teacher_accuracy() -> float:
    """Asked of the index."""
    from predistill.store import TeacherStore

    with TeacherStore.open(store()) as opened:
        query = "SELECT avg((teacher_prediction = label)::INT) FROM samples WHERE split = 'validation'"
        return float(opened.sql(query).fetchall()[0][0])


def report(names: list[str], seeds: tuple[int, ...]) -> None:
    runs = [Run(name, seed, ARMS[name].epochs, ARMS[name].inner, ARMS[name].rate) for seed in seeds for name in names]
    accuracy = dict(zip(runs, all_of(runs), strict=True))
    rows: list[list[object]] = [["the teacher", "", *("" for _ in seeds), f"{100 * teacher_accuracy():.1f}", ""]]
    for name in names:
        found = [100 * value for run, value in accuracy.items() if run.arm == name]
        epochs = " + ".join(f"{one:g}" for one in (ARMS[name].inner, ARMS[name].epochs) if one is not None)
        rows.append([name, epochs, *seed_cells(found, 1)])
    table(["arm", "epochs", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def tune(names: list[str]) -> None:
    """Epochs and learning rates on rows that are held out, one seed."""
    grid: tuple[list[tuple[float, float | None]], ...] = [(1, None), (3, None), (6, None)], [(3, 5)]
    runs = [
        Run(name, 1, epochs, inner, rate, True)
        for name in names for epochs, inner in grid[ARMS[name].inner is not None] for rate in (3e-4, 1e-3)
    ]  # fmt: skip
    found = [[*run[:5], f"{100 * value:.1f}"] for run, value in zip(runs, all_of(runs), strict=True)]
    table(["arm", "seed", "epochs", "epochs before", "learning rate", "accuracy on held-out training rows"], found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--arm", choices=list(ARMS), action="append", help="default: all")
    parser.add_argument("--tune", action="store_true", help="choose epochs and learning rates instead")
    parser.add_argument("--child", help="for itself")
    args = parser.parse_args()
    names = args.arm or list(ARMS)
    if args.child:
        with quiet():
            train_student(Run(*json.loads(args.child)))
    elif args.tune:
        tune(names)
    else:
        report(names, SEEDS[:1] if args.quick else SEEDS)


if __name__ == "__main__":
    main()
