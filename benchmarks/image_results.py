"""Does a stored teacher help a small student of images, and do its answers for many views of each? MNIST, three seeds.

The teacher is that of image_teacher.py, a ResNet trained on all labels. The student is a ResNet of three blocks, 30
times smaller, random at the start. Arms, all trained by `predistill.student_train.train.train` for the same steps:

    few                    the labels of 100 images, each as it is
    few, views             the same labels, 10 random crops of each image
    few + teacher          the labels of those 100, and the teacher's stored logits of all images
    few + teacher, views   the same, with the teacher's logits for 10 random crops of every image
    500 + teacher          the teacher's logits of the first 500 images alone, and the few labels among them
    500 + teacher, views   the same, for 10 random crops of each

64 rows a step, AdamW 3e-3, linear warm-up over 10 % and cosine decay. Accuracy on the evaluation rows at the end of the
run. Temperature, alpha and the learning rate were not searched. Each run is a process of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from predistill.benchmarks.image_teacher import SLIM, images, resnet, teacher
from predistill.benchmarks.measure import DATA, WORK, alternate, note, quiet, ratio, table
from predistill.benchmarks.seeds import TRAINING, all_measured, arguments, seed_cells

FEW, VIEWS, STEPS = 100, 10, 1000
ARMS = {  # views of each image
    "few": 1, "few, views": VIEWS, "few + teacher": 1, "few + teacher, views": VIEWS, "500 + teacher": 1,
    "500 + teacher, views": VIEWS,
}  # fmt: skip
TEMPERATURE, ALPHA = 2.0, 0.9


class Run(NamedTuple):
    arm: str
    seed: int
    steps: int = STEPS

    @property
    def folder(self) -> Path:
        return WORK / "runs" / f"mnist_{self.arm.replace(' + ', '-').replace(', ', '-')}_{self.seed}_{self.steps}"


def few_labels() -> Path:
    """The training images with the labels of FEW of them, drawn once."""
    path = WORK / "data" / f"mnist-{FEW}.parquet"
    if not path.exists():
        rows = pq.read_table(DATA / "mnist" / "train.parquet")
        kept = np.isin(np.arange(len(rows)), np.random.default_rng(0).choice(len(rows), FEW, replace=False))
        labels = pa.array(rows.column("label").to_numpy(), pa.int64(), mask=~kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.set_column(rows.schema.get_field_index("label"), rows.schema.field("label"), labels), path)
    return path


def store_of(views: int) -> Path:
    """The teacher's logits over both splits; of the training images for so many views of each."""
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"mnist-{FEW}-{views}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        more: dict[str, Any] = {"views": views, "view_transforms": ["crop"], "crop_scale": [0.5, 1.0]}
        with quiet():
            dump(
                DumpConfig(
                    teacher=str(teacher()), dataset=f"train={few_labels()},test={DATA / 'mnist' / 'test.parquet'}",
                    task="image-classification", output_dir=str(folder), batch_size=64, **(more if views > 1 else {}),
                )
            )  # fmt: skip
    return folder


def train_student(run: Run) -> float:
    """Accuracy on the evaluation rows, in this process."""
    from predistill.student_train.train import train

    config = WORK / "data" / "mnist-student.json"
    resnet(SLIM, 1).to_json_file(config)
    metrics = train(
        {
            "stores": [str(store_of(ARMS[run.arm]))],
            "student_config": str(config),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": TEMPERATURE,
            "where": "source_index < 500" if run.arm.startswith("500") else None,
            "alpha": ALPHA if "teacher" in run.arm else 0.0,
            "training_arguments": {
                **TRAINING,
                "max_steps": run.steps,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "cosine",
                "per_device_train_batch_size": 64,
                "per_device_eval_batch_size": 250,
                "seed": run.seed,
                "logging_steps": 250,
            },
        }
    )
    return float(metrics["eval_accuracy"])


def teacher_accuracy() -> float:
    """The teacher on the evaluation rows, asked of the index."""
    from predistill.store import TeacherStore

    with TeacherStore.open(store_of(1)) as store:
        query = "SELECT avg((teacher_prediction = label)::INT) FROM samples WHERE split = 'test'"
        return float(store.sql(query).fetchall()[0][0])


def report(arms: list[str], seeds: tuple[int, ...], steps: int) -> None:
    runs = [Run(arm, seed, steps) for seed in seeds for arm in arms]
    for arm in arms:
        store_of(ARMS[arm])  # stores first, and one at a time
    accuracy = dict(zip(runs, all_measured(__file__, "eval_accuracy", runs), strict=True))
    rows: list[list[object]] = [["the teacher", *("" for _ in seeds), f"{100 * teacher_accuracy():.1f}", ""]]
    for arm in arms:
        rows.append([arm, *seed_cells([100 * value for run, value in accuracy.items() if run.arm == arm], 1)])
    print(f"MNIST, {FEW} labels, {VIEWS} views, {steps} steps, T {TEMPERATURE:g}, alpha {ALPHA:g}\n")
    table(["arm", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"], rows)


def sizes() -> None:
    """Parameters and speed of teacher and student, one thread, batches of 64, forward passes alone."""
    import torch
    from transformers import AutoModelForImageClassification, ResNetForImageClassification

    torch.set_num_threads(1)
    models = {"teacher": AutoModelForImageClassification.from_pretrained(teacher()),
              "student": ResNetForImageClassification(resnet(SLIM, 1))}  # fmt: skip
    pixels = images("test")[0][:640].split(64)
    with torch.inference_mode():
        times = alternate(7, **{name: partial(passes, model.eval(), pixels) for name, model in models.items()})
    counts = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    rows = [[name, f"{counts[name]:,}", f"{640 / sorted(times[name])[3]:,.0f}"] for name in models]
    print(f"the student is {counts['teacher'] / counts['student']:.0f} times smaller and "
          f"{ratio(times['teacher'], times['student']):.1f} times faster\n")  # fmt: skip
    table(["model", "parameters", "images a second"], rows)


def passes(model: Any, batches: Sequence[Any]) -> None:
    for batch in batches:
        model(pixel_values=batch)


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student)
    sizes()
    report(args.arm, args.seeds, STEPS // 10 if args.quick else STEPS)


if __name__ == "__main__":
    main()
