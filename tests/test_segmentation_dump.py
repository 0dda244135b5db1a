"""What a dump of masked images holds: the teacher's logits of each pixel, and masks that follow their images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from dump_cases import own_cache  # noqa: F401  a fixture
from image_cases import encoded, levels, processor, settings, table
from PIL import Image
from predistill.cli import cli
from predistill.store import ConfigError, PredistillError, TeacherStore
from predistill.store.images.files import Files
from predistill.store.images.pixels import Processing, decode_mask, pixel_hash, replay, replay_masks
from predistill.store.images.views import VIEW_FIELDS
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

SIZE, CLASSES, ROWS = 32, 4, 8
TASK = "semantic-segmentation"


def segformer(folder: Path, **more: Any) -> Path:
    """A random SegFormer whose logits are of 8 x 8 pixels."""
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=CLASSES, initializer_range=0.5,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
    made = {"image_processor_type": "SegformerImageProcessor", "do_reduce_labels": False, **more}
    return processor(folder, size={"height": SIZE, "width": SIZE}, **made)


def mask(seed: int, height: int = 40, width: int = 44) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, CLASSES, (5, 4), np.uint8)
    found = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).copy()
    found[:3] = 255
    return found


def write(path: Path, masks: list[np.ndarray] | None = None, rows: int = ROWS) -> Path:
    made = [mask(at) for at in range(rows)] if masks is None else masks
    held = table([encoded(levels(at, *one.shape)) for at, one in enumerate(made)])
    about = json.loads(held.schema.metadata[b"huggingface"])
    about["info"]["features"]["mask"] = {"_type": "Image"}
    column = table([encoded(one) for one in made]).column("image")
    pq.write_table(
        held.append_column("mask", column).replace_schema_metadata({b"huggingface": json.dumps(about).encode()}), path
    )
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segformer(tmp_path_factory.mktemp("segformer") / "teacher")


def test_plain_views_have_the_teachers_own_logits(teacher: Path, tmp_path: Path) -> None:
    data = f"train={write(tmp_path / 'a.parquet')},test={write(tmp_path / 'b.parquet', rows=3)}"
    found = dump(settings(teacher, data, tmp_path / "store", task=TASK))
    assert found["fields"]["teacher_logits"]["shape"] == [CLASSES, 8, 8] and found["settings"]["mask_column"] == "mask"
    reader = AutoImageProcessor.from_pretrained(teacher, backend="pil")
    model = AutoModelForSemanticSegmentation.from_pretrained(teacher).eval()
    with TeacherStore.open(tmp_path / "store") as store:
        processing = Processing.from_json(store.settings["processing"])
        batch = store.select(split="train")[:]
        images = [Image.open(io.BytesIO(file)) for file in batch["image"]]
        with torch.no_grad():  # in the batches of the dump
            said = [model(**reader(images[at : at + 4], return_tensors="pt")).logits for at in range(0, ROWS, 4)]
        for row in range(ROWS):
            truth, logits = mask(row), torch.cat(said)[row]
            made = reader(images[row], Image.fromarray(truth), return_tensors="pt")
            assert pixel_hash(made["pixel_values"])[0] == batch["pixel_hash"][row]
            assert np.array_equal(decode_mask(batch["mask"][row]), truth)
            assert np.array_equal(replay_masks([batch["mask"][row]], {}, processing)[0], made["labels"][0])
            assert np.abs(batch["teacher_logits"][row] - logits.numpy()).max() < 1e-6 * max(
                1, float(logits.abs().max())
            )
            small = made["labels"][:, 2::4, 2::4]  # the pixel in the middle of each that has logits
            loss = nn.functional.cross_entropy(logits[None], small, ignore_index=255)
            assert abs(batch["teacher_loss"][row] - float(loss)) < 1e-4
            confidence = logits.softmax(0).amax(0).mean()
            assert abs(batch["teacher_confidence"][row] - float(confidence)) < 1e-5
    assert verify(tmp_path / "store")["ok"]


def test_masks_follow_the_views(teacher: Path, tmp_path: Path) -> None:
    """Images that are their own masks: wherever a pixel goes, its class goes too."""
    shapes = [mask(at) for at in range(ROWS)]
    for one in shapes:
        one[one == 255] = 0
    data = write(tmp_path / "d.parquet", shapes)
    held = pq.read_table(data)
    as_images = table([encoded(np.repeat(one[..., None], 3, axis=2)) for one in shapes]).column("image")
    pq.write_table(held.set_column(0, "image", as_images).replace_schema_metadata(held.schema.metadata), data)
    nearest = segformer(tmp_path / "nearest", resample=0, do_normalize=False, do_rescale=False)
    dump(settings(nearest, data, tmp_path / "store", task=TASK, views=3))
    with TeacherStore.open(tmp_path / "store") as store:
        rows, files = store.select(), Files(store)
        batch = rows[:]
        assert [len(one) > 0 for one in batch["mask"]] == [True] * ROWS + [False] * 2 * ROWS
        assert "view_mix_with" not in batch and len({tuple(one) for one in batch["view_crop"].tolist()}) > ROWS
        views = {spec.name: batch[spec.name] for spec in VIEW_FIELDS if spec.name in batch}
        processing = Processing.from_json(store.settings["processing"])
        pixels = replay(files.of(rows.sample_ids), [], views, processing)
        masks = replay_masks([batch["mask"][at % ROWS] for at in range(3 * ROWS)], views, processing)
        assert np.array_equal(pixels[:, 0].numpy().astype(int), masks)
        assert np.array_equal(pixel_hash(pixels), batch["pixel_hash"])
    assert verify(tmp_path / "store")["ok"]


def test_a_given_network_and_rows_without_masks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, CLASSES, 1))

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.body(pixel_values)

    reader = processor(tmp_path / "reader")
    config = settings(
        reader, write(tmp_path / "d.parquet"), tmp_path / "store", task=TASK, mask_column="none", capture=["body.0"]
    )
    found = dump(config, model=Given())
    assert "mask" not in found["fields"] and found["fields"]["teacher_module_body_0"]["shape"] == [6, 8, 8]
    assert found["fields"]["teacher_logits"]["shape"] == [CLASSES, 8, 8]
    with TeacherStore.open(tmp_path / "store") as store:
        assert np.isnan(store.select()[:]["teacher_loss"]).all()


def refused(config: Any) -> str:
    with pytest.raises(PredistillError) as error:
        dump(config)
    return str(error.value)


def test_masks_that_cannot_be(teacher: Path, tmp_path: Path) -> None:
    wrong = mask(1)
    wrong[20, 20] = 9
    data = write(tmp_path / "d.parquet", [mask(0), wrong])
    assert refused(settings(teacher, data, tmp_path / "s", task=TASK)) == (
        "split train, row 1: column 'mask': class 9 in the mask; the teacher has 4, so 0 to 3 expected, or 255 where "
        "there is none (--ignore-index); mend it or drop the row"
    )
    other = write(tmp_path / "e.parquet", [mask(0)])
    said = refused(settings(teacher, other, tmp_path / "s", task=TASK, ignore_index=7))
    assert "class 255 in the mask; the teacher has 4, so 0 to 3 expected, or 7" in said
    said = refused(settings(teacher, other, tmp_path / "s", task=TASK, views=2, view_transforms=["mixup"]))
    assert said == "--view-transforms mixup: semantic-segmentation knows crop and flip; leave mixup and cutmix away"
    said = refused(settings(teacher, other, tmp_path / "s", task=TASK, mask_column="image", image_column="image"))
    assert said == "--mask-column image is the column of the images too; name another"
    coloured = table([encoded(levels(0))]).append_column("mask", table([encoded(levels(1))]).column("image"))
    pq.write_table(coloured, tmp_path / "f.parquet")
    said = refused(settings(teacher, tmp_path / "f.parquet", tmp_path / "s", task=TASK))
    assert "column 'mask': a mask of one whole number a pixel expected (mode L, P or I); it is of mode RGB" in said


def test_what_is_not_supported(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--top-k-logits is nothing that semantic-segmentation knows"):
        settings(teacher, "x", tmp_path / "s", task=TASK, top_k_logits=2)
    with pytest.raises(ConfigError, match="--task: object-detection is not supported: detectors match"):
        settings(teacher, "x", tmp_path / "s", task="object-detection")
    given = ["dump", "--teacher", "x", "--dataset", "y", "--output-dir", "z", "--task", "object-detection"]
    done = CliRunner().invoke(cli, given, prog_name="predistill")
    assert done.exit_code == 2 and "object-detection is not supported: detectors match" in done.stderr
