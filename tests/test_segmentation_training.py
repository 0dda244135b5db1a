"""Students that mark every pixel: masks follow their views, offline as online, mean IoU, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_store import CLASSES, SIDE, pictures, pixels_of, write_images
from PIL import Image
from predistill.store import TeacherStore
from predistill.store.errors import ConfigError, DataError
from predistill.store.images.views import VIEW_FIELDS
from predistill.student_train.config import DistillationConfig
from predistill.student_train.dataset import readable
from predistill.student_train.losses.terms import Term
from predistill.student_train.tasks import task_of
from predistill.student_train.train import train
from predistill.student_train.trainer import DistillationTrainer
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

FAST = {"per_device_train_batch_size": 6, "max_steps": 2, "use_cpu": True, "save_strategy": "no"}
FILES = {"train": pictures(6), "validation": pictures(5, 1)}
VOID = 255  # of masks


def masks(files: list[bytes], seed: int) -> list[bytes]:
    """Of each image's size, in patches, some of them void."""
    generator, made = np.random.default_rng(seed), []
    for file in files:
        small = generator.choice([0, 1, 2, VOID], (4, 4)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize(Image.open(io.BytesIO(file)).size, Image.Resampling.NEAREST).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


MASKS = {"train": [b"", *masks(FILES["train"][1:], 3)], "validation": masks(FILES["validation"], 4)}
SIZES = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1], "hidden_sizes": [8, 8], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1], "decoder_hidden_size": 8,
    "classifier_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip


def segformer(seed: int, **more) -> SegformerForSemanticSegmentation:
    torch.manual_seed(seed)
    config = SegformerConfig(**{**SIZES, "num_labels": CLASSES, "initializer_range": 0.3, **more})
    return SegformerForSemanticSegmentation(config).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TeacherStore:
    """12 training rows, two views of 6 images; logits of 10 x 10 of pixels of 20 x 20."""
    return write_images(tmp_path_factory.mktemp("masks") / "store", segformer(1), FILES, MASKS, views=2)


@pytest.fixture(scope="module")
def student_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("students") / "tiny.json"
    path.write_text(json.dumps({"model_type": "segformer", **SIZES, "hidden_sizes": [4, 4], "strides": [4, 2]}))
    return str(path)


def by_hand(store: TeacherStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [12, 3, H, W] and masks [12, H, W] of the train split, by the columns that the store keeps."""
    rows, pixels, labels = store.select(split="train"), [], []
    columns = {spec.name: rows.column(spec.name) for spec in VIEW_FIELDS}
    for at in range(12):
        pixels.append(pixels_of(FILES["train"], at % 6, columns, at))
        if not MASKS["train"][at % 6]:  # an image without a mask
            labels.append(np.full((SIDE, SIDE), VOID))
            continue
        top, left, height, width = columns["view_crop"][at].tolist()
        mask = Image.open(io.BytesIO(MASKS["train"][at % 6])).crop((left, top, left + width, top + height))
        mask = mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if columns["view_flip"][at] else mask
        labels.append(np.asarray(mask).astype(np.int64))
    made = torch.from_numpy(np.stack(labels))
    return torch.from_numpy(np.stack(pixels)), torch.where(made == VOID, -100, made)


def test_masks_follow_the_views_of_their_images(store) -> None:
    pixels, labels = by_hand(store)
    order = [7, 0, 11, 3, 3]
    for batch in readable(store.select(split="train")).batches([order]):
        np.testing.assert_array_equal(batch["pixel_values"], pixels[order])
        np.testing.assert_array_equal(batch["labels"], labels[order])
    assert (labels == -100).any() and set(labels.unique().tolist()) == {-100, 0, 1, 2}


def test_a_step_from_the_store_is_a_step_with_the_teacher(store, tmp_path) -> None:
    """Student of 5 x 5; KL a pixel of the teacher's 10 x 10, labels at 20 x 20."""
    student, teacher, alpha, temperature = segformer(2, strides=[4, 2]), segformer(1), 0.6, 3.0
    pixels, labels = by_hand(store)
    logits = student(pixel_values=pixels).logits
    with torch.no_grad():
        theirs = teacher(pixel_values=pixels).logits
    assert logits.shape[2:] == (5, 5) and theirs.shape[2:] == (10, 10)
    own = F.interpolate(logits, size=(10, 10), mode="bilinear", align_corners=False) / temperature
    soft = F.kl_div(own.log_softmax(1), (theirs / temperature).softmax(1), reduction="none").sum(1).mean()
    large = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    loss = (1 - alpha) * F.cross_entropy(large, labels) + alpha * temperature**2 * soft
    loss.backward()
    online = [one.grad.clone() for one in student.parameters() if one.grad is not None]
    student.zero_grad()
    terms = [Term("labels", weight=1 - alpha), Term("logits", weight=alpha, temperature=temperature)]
    objective = task_of(store).objective(terms)
    rows = readable(store.select(split="train")).narrowed(objective.fields)
    batch = {name: torch.from_numpy(np.array(values)) for name, values in rows[:].items()}
    counts = objective.counts(batch)
    assert counts.tolist() == [int((labels != -100).sum()), 12 * 100]
    made = objective.step(student, {"pixel_values": batch["pixel_values"]}, batch, counts)
    made.loss.backward()
    torch.testing.assert_close(made.loss, loss, rtol=1e-6, atol=0)
    largest = max(float(one.abs().max()) for one in online)
    for parameter, gradient in zip(student.parameters(), online, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6 * largest)


def test_a_run_ends_in_a_folder_that_loads(store, student_config, tmp_path) -> None:
    folder = tmp_path / "student"
    metrics = train({"stores": [str(store.path)], "student_config": student_config, "output_dir": str(folder),
                     "pseudo_labels": 0.5, "training_arguments": FAST})  # fmt: skip
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    rows = readable(store.select(split="validation"))[:]
    pixels, labels = torch.from_numpy(rows["pixel_values"]), torch.from_numpy(rows["labels"])
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    large = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False).argmax(1)
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=-100)
    assert metrics["eval_mean_iou"] == pytest.approx(float(jaccard(large, labels)))
    known = labels != -100
    assert metrics["eval_pixel_accuracy"] == pytest.approx(float((large == labels)[known].float().mean()))
    small = F.interpolate(logits, size=(10, 10), mode="bilinear", align_corners=False).argmax(1)
    theirs = torch.from_numpy(rows["teacher_logits"]).argmax(1)
    assert metrics["eval_teacher_agreement"] == pytest.approx(float((small == theirs).float().mean()))
    assert "Classes: `round`, `square`, `none`." in (folder / "README.md").read_text()


def test_what_is_refused(store, tmp_path, student_config) -> None:
    segformer(0, num_labels=5).save_pretrained(tmp_path / "five")
    settings = {"stores": [str(store.path)], "output_dir": str(tmp_path / "out"), "training_arguments": FAST}
    with pytest.raises(DataError, match="has a head of 5 labels, the store's teacher has 3"):
        train({**settings, "student": str(tmp_path / "five")})
    with pytest.raises(ConfigError, match="--max-answer-length is nothing that semantic-segmentation knows"):
        train({**settings, "student_config": student_config, "max_answer_length": 5})
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, CLASSES, SIDE), torch.nn.Flatten())
    flat.forward = lambda pixel_values: torch.nn.Sequential.forward(flat, pixel_values)  # type: ignore[method-assign]
    arguments = DistillationConfig(output_dir=str(tmp_path / "flat"), max_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = DistillationTrainer(model=flat, args=arguments, train_dataset=store.select(split="train"))
    with pytest.raises(DataError, match=r"logits have shape \[8, 3\], \[B, 3, h, w\] expected"):
        trainer.train()


def test_masks_need_not_be_there(tmp_path) -> None:
    """A store without masks teaches by the teacher alone, and by nothing at alpha 0."""
    from predistill.student_train.tasks.semantic_segmentation import SemanticSegmentation

    store = write_images(Path(tmp_path) / "store", segformer(1), FILES, MASKS)
    bare = dict(store.fields)
    del bare["mask"]
    store.fields = bare
    task = SemanticSegmentation(store)
    rows = readable(store.select(split="train")).narrowed(["teacher_logits"])
    batch = {name: torch.from_numpy(np.array(values)) for name, values in rows[:].items()}
    objective = task.objective([Term("labels", weight=0.5), Term("logits", weight=0.5)])
    assert "labels" not in batch and objective.counts(batch).tolist() == [0, 600]
    made = objective.step(segformer(2), {"pixel_values": batch["pixel_values"]}, batch, objective.counts(batch))
    assert made.loss > 0 and made.sums[0] == 0
    with pytest.raises(ConfigError, match="has no masks to train on"):
        task.learnable(rows, task.objective([Term("labels")]))
