"""Does a stored teacher help a small student that marks every pixel? Scenes made of MNIST digits, three seeds.

A scene is 64 x 64 grey pixels with four digits laid down at random, in random brightness, over noise; the mask says of
each pixel which digit it is of, or 0 where it is of none. Digits of training and evaluation scenes are from MNIST's own
two splits. The teacher is a SegFormer trained on the masks of all scenes; the student a smaller one, random at the
start. Arms, all trained by `train()` for the same steps:

    few            the masks of 60 scenes
    few + teacher  the same, and the teacher's stored logits of all scenes

16 scenes a step, AdamW 4e-3, linear warm-up over 10 % and cosine decay. Mean IoU over the 11 classes on the evaluation
scenes at the end. Nothing was searched. Each run is a process of one thread.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from predistill.benchmarks.image_teacher import MEAN
from predistill.benchmarks.measure import DATA, WORK, note, quiet, table
from predistill.benchmarks.seeds import TRAINING, all_measured, arguments, seed_cells

SIZE, DIGITS, CLASSES = 64, 4, 11
SCENES = {"train": 1500, "test": 300}
FEW, STEPS, BATCH, RATE = 60, 2400, 16, 4e-3
TEACHER_STEPS, TEACHER_RATE = 2000, 3e-3  # at 1e-3 nothing but the background is learnt
WIDE, SLIM = (32, 64), (12, 24)  # channels by stage
ARMS = {"few": 0.0, "few + teacher": 0.9}  # alpha
TEMPERATURE = 1.0


class Run(NamedTuple):
    arm: str
    seed: int
    steps: int = STEPS

    @property
    def folder(self) -> Path:
        return WORK / "runs" / f"scenes_{self.arm.replace(' + ', '-')}_{self.seed}_{self.steps}"


# ---- scenes ----


def scenes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and masks, uint8 [N, SIZE, SIZE] each; the same whenever they are made."""
    from PIL import Image

    rows = pq.read_table(DATA / "mnist" / f"{split}.parquet")
    digits = [np.asarray(Image.open(io.BytesIO(one["bytes"]))) for one in rows.column("image").to_pylist()]
    names, rng = rows.column("label").to_numpy(), np.random.default_rng(len(digits))
    pixels = rng.integers(0, 60, (SCENES[split], SIZE, SIZE), np.uint8)
    masks = np.zeros_like(pixels)
    for scene, mask in zip(pixels, masks, strict=True):
        for at in rng.integers(0, len(digits), DIGITS):
            side, (top, left) = digits[at].shape[0], rng.integers(0, SIZE - digits[at].shape[0] + 1, 2)
            window, drawn = (slice(top, top + side), slice(left, left + side)), digits[at] > 100
            scene[window] = np.where(drawn, digits[at] * rng.uniform(0.6, 1), scene[window])
            mask[window] = np.where(drawn, names[at] + 1, mask[window])
    return pixels, masks


def parquet(split: str) -> Path:
    """Scenes and masks as images; of the training scenes FEW have a mask."""
    path = WORK / "data" / f"scenes-{FEW}-{split}.parquet"
    if not path.exists():
        pixels, masks = scenes(split)
        kept = set(np.random.default_rng(0).choice(len(masks), FEW, replace=False).tolist())
        masked = [_png(one) if split != "train" or at in kept else None for at, one in enumerate(masks)]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns: dict[str, list[bytes | None]] = {"image": [_png(one) for one in pixels], "mask": masked}
        arrays = {name: pa.array([one and {"bytes": one, "path": None} for one in column], kind)
                  for name, column in columns.items()}  # fmt: skip
        features = {name: {"_type": "Image"} for name in columns}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(arrays).replace_schema_metadata(about), path)
    return path


def _png(levels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


# ---- teacher, store, students ----


def segformer(widths: tuple[int, ...], depth: int) -> Any:
    """Config of a SegFormer whose logits are of SIZE / 4 pixels a side."""
    from transformers import SegformerConfig

    names = {0: "nothing", **{number + 1: str(number) for number in range(10)}}
    return SegformerConfig(
        num_channels=1, num_encoder_blocks=2, depths=[depth, depth], sr_ratios=[2, 1], hidden_sizes=list(widths),
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[4, 4],
        decoder_hidden_size=2 * widths[0], initializer_range=0.1,
        hidden_dropout_prob=0.0, drop_path_rate=0.0, classifier_dropout_prob=0.0,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip


def teacher() -> Path:
    """Folder of the teacher; trained here, on the masks of all training scenes, where it is not there yet."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessorPil

    folder = WORK / "teachers" / "scenes"
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model, (pixels, masks) = SegformerForSemanticSegmentation(segformer(WIDE, 2)), scenes("train")
    values, classes = (torch.from_numpy(pixels).float() / 255 - MEAN)[:, None] / 0.3, torch.from_numpy(masks).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TEACHER_RATE, total_steps=TEACHER_STEPS, pct_start=0.1
    )
    began = time.perf_counter()
    for step in range(TEACHER_STEPS):
        rows = torch.randint(len(values), (BATCH,))
        model(pixel_values=values[rows], labels=classes[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 249:
            note(f"scenes: step {step + 1} of {TEACHER_STEPS}, {time.perf_counter() - began:.0f} s")
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    SegformerImageProcessorPil(
        size=size, image_mean=[MEAN], image_std=[0.3], do_reduce_labels=False
    ).save_pretrained(folder)  # fmt: skip
    return folder


def store() -> Path:
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = WORK / "stores" / f"scenes-{FEW}"
    if not (folder / "store.json").exists():
        note(f"dumping {folder.name}")
        data = f"train={parquet('train')},test={parquet('test')}"
        with quiet():
            dump(DumpConfig(teacher=str(teacher()), dataset=data, task="semantic-segmentation",
                            output_dir=str(folder), batch_size=32))  # fmt: skip
    return folder


def train_student(run: Run) -> None:
    from predistill.student_train.train import train

    config = WORK / "data" / "scenes-student.json"
    segformer(SLIM, 1).to_json_file(config)
    train(
        {
            "stores": [str(store())],
            "student_config": str(config),
            "output_dir": str(run.folder),
            "overwrite_output_dir": True,
            "temperature": TEMPERATURE,
            "alpha": ARMS[run.arm],
            "where": None if ARMS[run.arm] else "teacher_loss IS NOT NULL AND NOT isnan(teacher_loss)",
            "training_arguments": {
                **TRAINING,
                "max_steps": run.steps,
                "learning_rate": RATE,
                "lr_scheduler_type": "cosine",
                "per_device_train_batch_size": BATCH,
                "per_device_eval_batch_size": 50,
                "seed": run.seed,
                "logging_steps": 100,
            },
        }
    )


# ---- report ----


def teacher_iou() -> tuple[float, int]:
    """Mean IoU of the stored logits on the evaluation scenes, brought to the masks' size; the teacher's parameters."""
    from predistill.store import TeacherStore
    from predistill.student_train.tasks.semantic_segmentation import pixel_scores, resized
    from torchmetrics.functional.classification import multiclass_confusion_matrix
    from transformers import AutoModelForSemanticSegmentation

    with TeacherStore.open(store()) as opened:
        logits = torch.from_numpy(np.array(opened.select("test", fields=["teacher_logits"])[:]["teacher_logits"]))
    predicted = resized(logits.float(), (SIZE, SIZE)).argmax(1)
    confusion = multiclass_confusion_matrix(predicted, torch.from_numpy(scenes("test")[1]).long(), CLASSES)
    parameters = sum(one.numel() for one in AutoModelForSemanticSegmentation.from_pretrained(teacher()).parameters())
    return pixel_scores(confusion)["mean_iou"], parameters


def main() -> None:
    args = arguments(__doc__, ARMS, Run, train_student)
    runs = [Run(arm, seed, STEPS // 10 if args.quick else STEPS) for seed in args.seeds for arm in args.arm]
    (reached, parameters), _ = teacher_iou(), store()
    found = dict(zip(runs, all_measured(__file__, "eval_mean_iou", runs), strict=True))
    rows: list[list[object]] = [["the teacher", *("" for _ in args.seeds), f"{100 * reached:.1f}", ""]]
    for arm in args.arm:
        rows.append([arm, *seed_cells([100 * value for run, value in found.items() if run.arm == arm], 1)])
    student = json.loads((runs[0].folder / "metrics.json").read_text())["student_parameters"]
    print(f"scenes: {FEW} masks of {SCENES['train']}; teacher {parameters:,} parameters, student {student:,}\n")
    table(["mean IoU", *(f"seed {seed}" for seed in args.seeds), "mean", "standard deviation"], rows)


if __name__ == "__main__":
    main()
