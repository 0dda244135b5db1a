"""Is training from the store the same mathematics as training beside the teacher?

Relative differences, smaller is better, of the distillation loss (T 2, alpha 0.7) and of the gradient of
all of the student's weights (norm of the difference over norm): the batch read from the store, against the
teacher run on the very same batch by hand, with the loss written out in plain torch. Student weights are
equal, dropout off, float32.

What is left in a float32 store is the teacher's own rounding: the dump ran it in batches of other sizes.
In a float16 store it is the rounding of the logits. `teacher` is the largest difference between stored and
online logits, relative to the largest logit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from predistill.benchmarks.measure import note, options, quiet, table
from predistill.benchmarks.real import dumped, teacher
from predistill.benchmarks.teachers import TASKS, backbone
from predistill.store import TeacherStore
from predistill.student_train.collator import DataCollatorForDistillation
from predistill.student_train.config import DistillationConfig
from predistill.student_train.trainer import DistillationTrainer
from transformers import AutoModelForSequenceClassification

TEMPERATURE, ALPHA = 2.0, 0.7


def online_loss(student: Any, guide: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """alpha T² KL(teacher || student) + (1 - alpha) cross entropy, means over rows (Hinton et al. 2015)."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with torch.no_grad():
        wanted = guide(**inputs).logits / TEMPERATURE
    logits = student(**inputs).logits
    softened = torch.log_softmax(logits / TEMPERATURE, -1)
    divergence = (wanted.softmax(-1) * (wanted.log_softmax(-1) - softened)).sum(-1).mean() * TEMPERATURE**2
    hard = torch.nn.functional.cross_entropy(logits, batch["labels"])
    return ALPHA * divergence + (1 - ALPHA) * hard


def gradient(student: Any, loss: torch.Tensor) -> torch.Tensor:
    student.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([one.grad.flatten().double() for one in student.parameters() if one.grad is not None])


def measure(task: str, dtype: str, batches: int) -> list[object]:
    names = TASKS[task][2]
    torch.manual_seed(0)
    student = AutoModelForSequenceClassification.from_pretrained(
        backbone(), num_hidden_layers=2, num_labels=len(names), dtype=torch.float32
    ).eval()
    guide = AutoModelForSequenceClassification.from_pretrained(teacher(task), dtype=torch.float32).eval()
    rows = TeacherStore.open(dumped(task, dtype=dtype)).select(split="train")
    args = DistillationConfig(output_dir="unused", temperature=TEMPERATURE, alpha=ALPHA, report_to=[], use_cpu=True)
    trainer = DistillationTrainer(model=student, args=args, train_dataset=rows)
    worst = {"loss": 0.0, "gradient": 0.0, "teacher": 0.0}
    for ids in np.random.default_rng(0).choice(len(rows), (batches, 32), replace=False):
        batch = DataCollatorForDistillation()(rows[ids])
        with torch.no_grad():
            live = guide(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
        stored = batch["teacher_logits"].float()
        offline, online = trainer.compute_loss(student, dict(batch)), online_loss(student, guide, batch)
        ours, theirs = gradient(student, offline), gradient(student, online)
        worst["loss"] = max(worst["loss"], abs(offline.item() / online.item() - 1))
        worst["gradient"] = max(worst["gradient"], ((ours - theirs).norm() / theirs.norm()).item())
        worst["teacher"] = max(worst["teacher"], ((stored - live).abs().max() / live.abs().max()).item())
    return [task, dtype, *(f"{value:.1e}" for value in worst.values())]


def main() -> None:
    args = options(__doc__).parse_args()
    found = []
    for task in ("sst2",) if args.quick else ("sst2", "ag_news"):
        for dtype in ("float32", "float16"):
            note(f"exactness {task} {dtype}")
            with quiet():
                found.append(measure(task, dtype, 3 if args.quick else 10))
    table(["data", "store", "loss (reach 1e-6 in float32)", "gradient (the same)", "teacher"], found)


if __name__ == "__main__":
    main()
