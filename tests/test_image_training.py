"""Students of images: pixels as the teacher saw them, offline as online, what is refused, folders that load."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_store import CLASSES, NAMES, SIDE, convnet, pictures, pixels_of, write_images
from PIL import Image
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, DataError, StoreCorrupt, StoreMismatch
from predistill.store.images.files import Files
from predistill.store.images.views import VIEW_FIELDS
from predistill.student_train.config import DistillationConfig
from predistill.student_train.dataset import ConcatRows, is_store_rows, narrowed, readable
from predistill.student_train.images.rows import PixelRows
from predistill.student_train.train import train
from predistill.student_train.trainer import DistillationTrainer
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

FAST = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "use_cpu": True, "save_strategy": "no"}
ALL = ("crop", "flip", "mixup", "cutmix")
FILES = {"train": pictures(20), "validation": pictures(9, 1)}
LABELS = {"train": np.arange(20) % CLASSES, "validation": np.arange(9) % CLASSES}


@pytest.fixture(scope="module")
def teacher():
    return convnet()


@pytest.fixture(scope="module")
def store(teacher, tmp_path_factory) -> TeacherStore:
    """60 training rows, three views of 20 images, every second image without a label; 9 rows for validation."""
    labels = {**LABELS, "train": np.where(np.arange(20) % 2, -100, LABELS["train"])}
    return write_images(tmp_path_factory.mktemp("images") / "views", teacher, FILES, labels, views=3, transforms=ALL)


@pytest.fixture(scope="module")
def plain(teacher, tmp_path_factory) -> TeacherStore:
    return write_images(tmp_path_factory.mktemp("images") / "plain", teacher, FILES, LABELS)


@pytest.fixture(scope="module")
def student_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("students") / "tiny.json"
    settings = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1],
                "layer_type": "basic"}  # fmt: skip
    path.write_text(json.dumps(settings))
    return str(path)


def arguments(folder: Path, **more) -> DistillationConfig:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
        "train_sampling_strategy": "sequential", "per_device_train_batch_size": 20,
    }  # fmt: skip
    return DistillationConfig(**{**settings, **more})


def by_hand(store: TeacherStore, split: str = "train", views: int = 3) -> np.ndarray:
    """float32 [rows, 3, H, W] of a whole split, view after view, by the columns that the store keeps."""
    rows, files = store.select(split=split), FILES[split]
    columns = {spec.name: rows.column(spec.name) for spec in VIEW_FIELDS}
    return np.stack([pixels_of(files, at % len(files), columns, at) for at in range(views * len(files))])


# ---- pixels ----


def test_pixels_are_those_of_the_teacher_in_whatever_order(store) -> None:
    expected, rows = by_hand(store), readable(store.select(split="train"))
    assert isinstance(rows, PixelRows) and len(rows) == 60
    assert (store.select(split="train").column("view_mix_with") >= 0).sum() > 20  # partners are there to be found
    np.testing.assert_array_equal(rows[:]["pixel_values"], expected)
    order = np.random.default_rng(3).permutation(60).tolist()
    lists = [order[start : start + 7] for start in range(0, 60, 7)]
    found = [batch["pixel_values"] for batch in rows.batches(lists)]
    np.testing.assert_array_equal(np.concatenate(found), expected[order])
    np.testing.assert_array_equal(rows[-1]["pixel_values"], expected[-1])
    kept = store.select(split="train", where="view = 2 AND source_index < 5")
    np.testing.assert_array_equal(readable(kept)[:]["pixel_values"], expected[40:45])


def test_another_process_makes_the_same_bits(store) -> None:
    """By its hash of every row, beside the one that was stored from pixels made another way."""
    script = f"""
        from predistill.store import TeacherStore
        from predistill.store.images.pixels import pixel_hash
        from predistill.student_train.dataset import readable
        for split in ("train", "validation"):
            rows = readable(TeacherStore.open({str(store.path)!r}).select(split=split))
            for batch in rows.batches([range(at, min(at + 11, len(rows))) for at in range(0, len(rows), 11)]):
                print(*(pixel_hash(batch["pixel_values"]) == batch["pixel_hash"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found == ["True"] * 69


def test_rows_hold_what_a_student_takes_and_no_more(store, plain) -> None:
    rows = narrowed(store.select(split="train"), ["teacher_logits"])
    assert set(rows[[0]]) == {"pixel_values", "labels", "teacher_logits"}
    assert set(narrowed(rows, [])[[0]]) == {"pixel_values", "labels"}
    again = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(again[[3, 50]]["pixel_values"], rows[[3, 50]]["pixel_values"])
    assert rows.nbytes > sum(map(len, FILES["train"])) and is_store_rows(plain.select())
    both = ConcatRows([rows, narrowed(plain.select(split="train"), ["teacher_logits"])])
    mixed = both[[61, 2, 79]]
    np.testing.assert_array_equal(mixed["pixel_values"][1], rows[2]["pixel_values"])
    np.testing.assert_array_equal(
        mixed["pixel_values"][[0, 2]], readable(plain.select(split="train"))[[1, 19]]["pixel_values"]
    )


def test_an_image_that_is_not_there_is_told(store) -> None:
    with pytest.raises(StoreCorrupt, match="an image that its split does not have"):
        Files(store).of(np.asarray([61]), np.asarray([12]))  # of validation, which has 9


# ---- training ----


class Pooled(nn.Module):
    """Any module that takes pixel_values."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.filters, self.head = nn.Conv2d(channels, 6, 5, 3), nn.Linear(6, CLASSES)

    def forward(self, pixel_values):
        return self.head(self.filters(pixel_values).relu().mean((2, 3)))


def test_a_step_from_the_store_is_a_step_with_the_teacher(teacher, store, tmp_path) -> None:
    """Loss and gradient of a batch of one view, any module as student: 1 at SGD's learning rate."""
    student, alpha, temperature = Pooled(), 0.6, 3.0
    pixels = torch.from_numpy(by_hand(store)[20:40])
    labels = torch.from_numpy(np.where(np.arange(20) % 2, -100, LABELS["train"]))
    logits = student(pixels)
    with torch.no_grad():
        theirs = teacher(pixel_values=pixels).logits
    soft = F.kl_div(F.log_softmax(logits / temperature, -1), F.softmax(theirs / temperature, -1), reduction="batchmean")
    loss = (1 - alpha) * F.cross_entropy(logits, labels) + alpha * temperature**2 * soft
    online = torch.autograd.grad(loss, list(student.parameters()))
    before = [one.detach().clone() for one in student.parameters()]

    rows = store.select(split="train", where="view = 1")
    settings = arguments(tmp_path, alpha=alpha, temperature=temperature)
    trainer = DistillationTrainer(model=student, args=settings, train_dataset=rows)
    found = trainer.train().training_loss
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for old, new, gradient in zip(before, student.parameters(), online, strict=True):
        torch.testing.assert_close(
            old - new.detach(), gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-7
        )


def test_a_run_ends_in_a_folder_that_loads(store, student_config, tmp_path) -> None:
    folder = tmp_path / "student"
    metrics = train({"stores": [str(store.path)], "student_config": student_config, "output_dir": str(folder),
                     "training_arguments": FAST})  # fmt: skip
    assert {"eval_accuracy", "eval_macro_f1", "eval_teacher_agreement", "eval_loss_logits"} <= set(metrics)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert list(model.config.id2label.values()) == NAMES
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = Image.open(io.BytesIO(FILES["validation"][0]))
    values = own(image, return_tensors="pt")["pixel_values"]
    stored = readable(store.select(split="validation"))[0]["pixel_values"]
    np.testing.assert_array_equal(values[0].numpy(), stored)
    best = NAMES[int(model(pixel_values=values).logits.argmax())]
    assert pipeline("image-classification", model=str(folder))(image)[0]["label"] == best
    card = (folder / "README.md").read_text()
    assert 'pipeline("image-classification"' in card and "pipeline_tag: image-classification" in card
    agreed = metrics["eval_teacher_agreement"] * 9
    with torch.no_grad():
        pixels = torch.from_numpy(readable(store.select(split="validation"))[:]["pixel_values"])
        same = model(pixel_values=pixels).logits.argmax(-1).numpy() == store.select(split="validation").column(
            "teacher_prediction"
        )
    assert agreed == pytest.approx(same.sum())


def test_labels_alone_are_learnt_from_rows_that_have_one(store, student_config, tmp_path) -> None:
    train({"stores": [str(store.path)], "student_config": student_config, "output_dir": str(tmp_path / "labels"),
           "alpha": 0, "training_arguments": {**FAST, "eval_strategy": "no"}})  # fmt: skip
    assert json.loads((tmp_path / "labels" / "predistill.json").read_text())["rows"] == 30


def test_several_stores_and_a_folder_as_student(store, plain, student_config, tmp_path) -> None:
    first = tmp_path / "first"
    quick = {**FAST, "max_steps": 1, "eval_strategy": "no"}
    train({"stores": [str(plain.path)], "student_config": student_config, "output_dir": str(first),
           "training_arguments": {**quick, "dataloader_num_workers": 1}})  # fmt: skip
    train({"stores": [str(plain.path)], "student": str(first), "output_dir": str(tmp_path / "second"),
           "training_arguments": quick})  # fmt: skip
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "second").config.num_labels == CLASSES


def vit(folder: Path, **more) -> Path:
    torch.manual_seed(0)
    settings = {"image_size": SIDE, "patch_size": 5, "hidden_size": 16, "num_hidden_layers": 3, "num_labels": CLASSES,
                "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip
    ViTForImageClassification(ViTConfig(**{**settings, **more})).save_pretrained(folder)
    return folder


def test_layers_of_a_vision_transformer_are_copied(plain, tmp_path) -> None:
    teacher, folder = vit(tmp_path / "vit"), tmp_path / "student"
    still = {**FAST, "max_steps": 1, "learning_rate": 0.0}
    train({"stores": [str(plain.path)], "student": "from-teacher-layers:1,3", "teacher": str(teacher),
           "output_dir": str(folder), "training_arguments": still})  # fmt: skip
    made = AutoModelForImageClassification.from_pretrained(folder)
    theirs = AutoModelForImageClassification.from_pretrained(teacher)
    blocks, originals = (dict(one.named_parameters()) for one in (made, theirs))
    last = [name for name in blocks if ".1." in name]
    assert made.config.num_hidden_layers == 2 and last
    for name in last:
        torch.testing.assert_close(blocks[name], originals[name.replace(".1.", ".2.", 1)])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"image_size": 32}, r"3 x 20 x 20, which the student does not take \(its config says image_size 32"),
        ({"num_channels": 1}, r"3 x 20 x 20, which the student does not take .*num_channels 1"),
        ({"num_labels": 5}, "has a head of 5 labels, the store's teacher has 3"),
    ],
)
def test_students_that_cannot_take_the_pixels(plain, tmp_path, more, line) -> None:
    settings = {"stores": [str(plain.path)], "student": str(vit(tmp_path / "vit", **more)),
                "output_dir": str(tmp_path / "out"), "training_arguments": FAST}  # fmt: skip
    with pytest.raises(DataError, match=line):
        train(settings)
    assert not (tmp_path / "out").exists()


def test_stores_of_other_pixels_are_not_read_as_one(teacher, plain, student_config, tmp_path) -> None:
    other = dict(plain.settings["processing"], resample=3)
    files = {"train": pictures(20, 2), "validation": pictures(9, 3)}
    second = write_images(tmp_path / "cubic", teacher, files, LABELS, more={"processing": other})
    with pytest.raises(StoreMismatch, match="image processing differs"):
        train({"stores": [str(plain.path), str(second.path)], "student_config": student_config,
               "output_dir": str(tmp_path / "out"), "training_arguments": FAST})  # fmt: skip


def test_pixels_of_another_kind_are_told_or_refused(teacher, student_config, tmp_path, capsys) -> None:
    spoilt = write_images(
        tmp_path / "store", teacher, FILES, LABELS, hash_shift=1, versions={"pillow": "1.0", "numpy": "1.2.3"}
    )
    settings = {"stores": [str(spoilt.path)], "student_config": student_config, "output_dir": str(tmp_path / "out"),
                "overwrite_output_dir": True, "training_arguments": {**FAST, "max_steps": 3}}  # fmt: skip
    train(settings)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "pixels of 8 of 8 rows" in said[0] and "made with pillow 1.0, numpy 1.2.3, here is pillow " in said[0]
    train({**settings, "pixel_check": "off"})
    assert "warning: " not in capsys.readouterr().err
    with pytest.raises(StoreMismatch, match="pixels of 8 of 8 rows are not those .*--pixel-check warn"):
        train({**settings, "pixel_check": "refuse"})
    with pytest.raises(ConfigError, match="--pixel-check is one of warn, refuse, off"):
        train({**settings, "pixel_check": "maybe"})
