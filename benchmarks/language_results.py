"""Does a stored teacher help a small language model? Tiny Shakespeare, three seeds, mean and spread.

The teacher is that of language_teacher.py. The student is a GPT-2 of 2 layers, 96 wide, random at the start. Arms, all
trained by `predistill.student_train.train.train` for the same steps over the same rows in the same order:

    labels            cross entropy to the next token
    teacher           the same and the teacher's stored top 64 logits
    teacher, k = 8    with 8 of them
    teacher, samples  with 50 draws a position instead

Loss is nats a token on the validation rows, against their labels. Temperature, alpha and the number of epochs come
from `--tune`, which trains on all but the last 500 training rows and looks at those; the validation rows are never
looked at. Each run is a process of one thread; two run at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from predistill.benchmarks.language_teacher import gpt2, teacher, texts
from predistill.benchmarks.measure import DATA, WORK, note, options, quiet, table
from predistill.benchmarks.seeds import all_measured, seed_cells

SEEDS = (1, 2, 3)
HELD_OUT = 500  # rows
STORES: dict[str, dict[str, Any]] = {
    "top64": {"top_k_logits": 64},
    "top8": {"top_k_logits": 8},
    "draws50": {"sampled_logits": 50},
}
ARMS = {"labels": "top64", "teacher": "top64", "teacher, k = 8": "top8", "teacher, samples": "draws50"}
EPOCHS, TEMPERATURE, ALPHA = 8.0, 1.0, 0.9


class Run(NamedTuple):
    arm: str
    seed: int
    temperature: float = TEMPERATURE
    alpha: float = ALPHA
    epochs: float = EPOCHS
    tune: bool = False

    @property
    def folder(self) -> Path:
        parts = (self.arm.replace(", ", "-").replace(" = ", ""), *self[1:5], "tune" if self.tune else "")
        return WORK / "runs" / ("shakespeare_" + "_".join(map(str, parts)).strip("_"))


def store_of(kind: str) -> Path:
    """The teacher's outputs over both splits, kept in the work folder; `tune` is the end of train once more."""
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"shakespeare-{kind}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        held = WORK / "data" / "shakespeare-tune.jsonl"
        held.parent.mkdir(parents=True, exist_ok=True)
        held.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("train")[-HELD_OUT:]))
        paths = {split: DATA / "tiny_shakespeare" / f"{split}.jsonl.gz" for split in ("train", "validation")}
        dataset = ",".join(f"{split}={path}" for split, path in {**paths, "tune": held}.items())
        with quiet():
            dump(DumpConfig(teacher=str(teacher()), dataset=dataset, task="causal-lm", output_dir=str(folder),
                            **STORES[kind]))  # fmt: skip
    return folder


def train_student(run: Run) -> float:
    """Nats a token on the validation rows (of a tuning run: on those held out), in this process."""
    from predistill.student_train.train import train

    config = WORK / "data" / "shakespeare-student.json"
    gpt2(96, 2, dropout=0.0).to_json_file(config)
    metrics = train(
        {
            "stores": [str(store_of(ARMS[run.arm]))],
            "student_config": str(config),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": run.temperature,
            "alpha": 0.0 if run.arm == "labels" else run.alpha,
            "eval_split": "tune" if run.tune else "validation",
            "where": f"source_index < {len(texts('train')) - HELD_OUT}" if run.tune else None,
            "training_arguments": {
                "num_train_epochs": run.epochs,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "cosine",
                "weight_decay": 0.1,
                "per_device_train_batch_size": 32,
                "warmup_steps": 0.05,
                "seed": run.seed,
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
            },
        }
    )
    return float(metrics["eval_loss_labels"])


def all_of(runs: list[Run]) -> list[float]:
    for arm in {run.arm for run in runs}:
        store_of(ARMS[arm])  # stores first, and one at a time
    return all_measured(__file__, "eval_loss_labels", runs)


def teacher_loss() -> float:
    """The teacher on the validation rows, exactly, asked of the index."""
    from predistill.store import TeacherStore

    with TeacherStore.open(store_of("top64")) as store:
        query = "SELECT sum(teacher_loss * (num_tokens - 1)) / sum(num_tokens - 1) FROM samples"
        return float(store.sql(f"{query} WHERE split = 'validation'").fetchall()[0][0])


def report(arms: list[str], seeds: tuple[int, ...]) -> None:
    runs = [Run(arm, seed) for seed in seeds for arm in arms]
    loss = dict(zip(runs, all_of(runs), strict=True))
    rows: list[list[object]] = [["the teacher", *("" for _ in seeds), f"{teacher_loss():.3f}", ""]]
    for arm in arms:
        found = [value for run, value in loss.items() if run.arm == arm]
        rows.append([arm, *seed_cells(found, 3)])
    print(f"{EPOCHS:g} epochs, T {TEMPERATURE:g}, alpha {ALPHA:g}; nats a token, less is better\n")
    table(["arm", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def tune() -> None:
    """The epochs that suit the labels alone; temperature and alpha over 3 epochs; on rows held out, one seed."""
    runs = [Run("labels", 1, epochs=epochs, tune=True) for epochs in (3.0, 5.0, 8.0)]
    grid = [(temperature, alpha) for temperature in (1.0, 2.0) for alpha in (0.5, 0.9)]
    runs += [Run("teacher", 1, temperature, alpha, 3.0, tune=True) for temperature, alpha in grid]
    found = [[*run[:1], *run[2:5], f"{value:.4f}"] for run, value in zip(runs, all_of(runs), strict=True)]
    table(["arm", "temperature", "alpha", "epochs", "loss on held-out training rows"], found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--arm", choices=list(ARMS), action="append", help="default: all")
    parser.add_argument("--tune", action="store_true", help="choose temperature, alpha and epochs instead")
    parser.add_argument("--child", help="for itself")
    args = parser.parse_args()
    if args.child:
        with quiet():
            train_student(Run(*json.loads(args.child)))
    elif args.tune:
        tune()
    else:
        report(args.arm or list(ARMS), SEEDS[:1] if args.quick else SEEDS)


if __name__ == "__main__":
    main()
