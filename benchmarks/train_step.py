"""What does a training step from the store cost, compared with plain fine-tuning and with a teacher in memory?

Ratios, smaller is better. `÷ plain`: seconds of a DistillationTrainer step over seconds of a plain
transformers.Trainer step that fine-tunes the same student on the same rows' labels. `÷ online`: the same
over a Trainer whose compute_loss runs the teacher on the batch. Beside it the floor that arithmetic sets:
student FLOPs (forward and backward) over student and teacher-forward FLOPs, counted by torch on one batch.
`memory`: largest resident size of the process over that of the plain one.

Fair: every run is a new process with the same student, rows, order, batch size and padding (rows stand in
source order in all of them, so step k is the same batch everywhere); a step is timed from the end of the
step before, so reading and collating count. Processes take turns; of each step the fastest round counts,
and the first ten are left out. The plain Trainer reads a tokenised datasets.Dataset with
DataCollatorWithPadding, as its documentation shows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from predistill.benchmarks.exactness import ALPHA, TEMPERATURE, online_loss
from predistill.benchmarks.measure import note, options, quiet, table
from predistill.benchmarks.real import dumped, teacher
from predistill.benchmarks.teachers import MAX_LENGTH, TASKS, backbone, encode, read_rows
from predistill.store import TeacherStore
from predistill.student_train.config import DistillationConfig
from predistill.student_train.trainer import DistillationTrainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

ARMS = ("plain", "store", "online")
BATCH, WARM = 32, 10  # rows a step, steps that are not timed


class Clock(transformers.TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


class OnlineTrainer(Trainer):
    """The teacher beside the student."""

    guide: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return online_loss(model, self.guide, inputs)


def student(task: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        backbone(), num_hidden_layers=2, num_labels=len(TASKS[task][2]), dtype=torch.float32
    )


def run(arm: str, task: str, steps: int) -> dict[str, Any]:
    """Train so many steps; seconds of each, and the process's largest resident size in bytes."""
    store = TeacherStore.open(dumped(task))
    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-4,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": [],
            "logging_steps": 100,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        clock = Clock()
        if arm == "store":
            rows = store.select(split="train", fields=["teacher_logits"])
            args = DistillationConfig(temperature=TEMPERATURE, alpha=ALPHA, **more)
            trainer: Trainer = DistillationTrainer(model=student(task), args=args, train_dataset=rows)
        else:
            trainer = by_hand(arm, task, transformers.TrainingArguments(**more))
        trainer.add_callback(clock)
        trainer.train()
    return {"seconds": np.diff(clock.ends)[WARM:].tolist(),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # fmt: skip


def by_hand(arm: str, task: str, args: Any) -> Trainer:
    import datasets

    tokenizer = AutoTokenizer.from_pretrained(teacher(task), model_max_length=MAX_LENGTH)
    rows = datasets.Dataset.from_list(encode(tokenizer, read_rows(task)))
    kind = Trainer if arm == "plain" else OnlineTrainer
    padding = DataCollatorWithPadding(tokenizer)
    trainer = kind(model=student(task), args=args, train_dataset=rows, data_collator=padding)
    if isinstance(trainer, OnlineTrainer):
        trainer.guide = AutoModelForSequenceClassification.from_pretrained(teacher(task), dtype=torch.float32).eval()
    return trainer


def flops(task: str) -> float:
    """Student FLOPs ÷ (student + teacher forward) of one batch, backward included for the student."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = TeacherStore.open(dumped(task)).select(split="train", fields=[])
    batch = {name: torch.as_tensor(value) for name, value in rows[np.arange(BATCH)].items()}
    labels = batch.pop("labels")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    guide, pupil = AutoModelForSequenceClassification.from_pretrained(teacher(task)).eval(), student(task)
    with FlopCounterMode(display=False) as own:
        torch.nn.functional.cross_entropy(pupil(**inputs).logits, labels).backward()
    with FlopCounterMode(display=False) as teaching, torch.no_grad():
        guide(**inputs)
    return own.get_total_flops() / (own.get_total_flops() + teaching.get_total_flops())


def child(arm: str, task: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--child", arm, task, str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(task: str, steps: int, rounds: int) -> list[object]:
    dumped(task)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            note(f"{task}: round {number + 1} of {rounds}, {arm}")
            runs[arm].append(child(arm, task, steps))
    seconds = {arm: np.min([one["seconds"] for one in runs[arm]], axis=0).sum() for arm in ARMS}
    memory = {arm: min(one["memory"] for one in runs[arm]) for arm in ARMS}
    return [task, f"{seconds['store'] / seconds['plain']:.3f}", f"{seconds['store'] / seconds['online']:.3f}",
            f"{flops(task):.3f}", f"{memory['store'] / memory['plain']:.2f}",
            f"{memory['store'] / memory['online']:.2f}", 1000 * seconds["store"] / (steps - WARM - 1)]  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--child", nargs=3, metavar=("ARM", "TASK", "STEPS"), help="for itself")
    args = parser.parse_args()
    if args.child:
        with quiet():
            found = run(args.child[0], args.child[1], int(args.child[2]))
        print(json.dumps(found))
        return
    sizes = (40, 2) if args.quick else (110, 5)
    rows = [measure(task, *sizes) for task in (("sst2",) if args.quick else ("sst2", "ag_news"))]
    table(["data", "step ÷ plain (reach 1.05)", "step ÷ online", "FLOP ratio (reach: + 5 %)", "memory ÷ plain (1.05)",
           "memory ÷ online", "ms a step"], rows)  # fmt: skip


if __name__ == "__main__":
    main()
