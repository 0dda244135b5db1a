"""Small stores of images and their views, written through StoreWriter; pixels and logits are made here, by other means
than the package's."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, TeacherStore, content_hash
from predistill.store.images.processing import Processing
from predistill.store.images.views import VIEW_FIELDS, Recipe, draw, plain
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

SIDE, CLASSES, MEAN, STD = 20, 3, 0.4, 0.25
NAMES = ["round", "square", "none"]
SUMMARIES = (FieldSpec("teacher_prediction", (), "int64", role="summary"),
             FieldSpec("teacher_confidence", (), "float32", role="summary"))  # fmt: skip


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[STD] * 3)


def convnet(seed: int = 0, widths: tuple[int, ...] = (8, 12)) -> ResNetForImageClassification:
    """Random, in evaluation mode, with batch-norm statistics that are not those of a new model."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3, embedding_size=widths[0], hidden_sizes=list(widths), depths=[1] * len(widths),
        layer_type="basic", id2label=dict(enumerate(NAMES)), label2id={name: at for at, name in enumerate(NAMES)},
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return model.eval()


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """PNG files of different sizes: noise, smoothed by enlarging it."""
    generator, made = np.random.default_rng(seed), []
    for _ in range(count):
        small = generator.integers(0, 256, (5, 6, 3), np.uint8)
        wide, high = generator.integers(18, 40, 2).tolist()
        file = io.BytesIO()
        Image.fromarray(small).resize((wide, high), Image.Resampling.BICUBIC).save(file, "PNG")
        made.append(file.getvalue())
    return made


def pixels_of(files: list[bytes], row: int, view: Mapping[str, np.ndarray], at: int) -> np.ndarray:
    """float32 [3, SIDE, SIDE] of a row, made step by step."""

    def one(file: bytes, crop: np.ndarray, flip: bool) -> np.ndarray:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        if crop[2]:
            top, left, height, width = crop.tolist()
            image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        levels = np.asarray(image).astype(np.float64) * (1 / 255)
        values = (levels.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    own = one(files[row], view["view_crop"][at], view["view_flip"][at])
    partner = view["view_mix_with"][at]
    if partner >= 0:
        other = one(files[partner], view["view_mix_with_crop"][at], view["view_mix_with_flip"][at])
        ratio, (top, left, height, width) = view["view_mix_ratio"][at], view["view_mix_box"][at]
        if ratio < 1:
            own = ratio * own + (np.float32(1) - ratio) * other
        own[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
    return own


def hash_of(pixels: np.ndarray) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(pixels, "<f4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def write_images(
    path: Path, teacher: torch.nn.Module, files: Mapping[str, list[bytes]], labels: Mapping[str, Any], *,
    views: int = 1, transforms: tuple[str, ...] = ("crop", "flip"), dtype: str = "float32", shard_rows: int = 8,
    more: Mapping[str, Any] | None = None, hash_shift: int = 0, versions: Mapping[str, str] | None = None,
    inside: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None, said: Mapping[str, Any] | None = None,
) -> TeacherStore:  # fmt: skip
    """views: of the train split; 1: no view columns. more: settings; hash_shift: added to every hash, to spoil them.
    inside: more columns of some pixels, in float32, and `said`, their parameters. labels: a number an image, or its
    mask, a file, for a teacher that marks every pixel."""
    recipe = Recipe(transforms, (0.3, 1.0), 7, (SIDE, SIDE))
    own = processor()
    masks = isinstance(labels["train"][0], bytes)
    with torch.no_grad():
        shape = tuple(teacher(pixel_values=torch.zeros(1, 3, SIDE, SIDE)).logits.shape[1:])
    mask = FieldSpec("mask", (), "binary", "bytes", "label")
    label = FieldSpec("labels", (), "int64", role="label")
    fields = [FieldSpec("image", (), "binary", codec="bytes", role="input"), *(VIEW_FIELDS if views > 1 else ()),
              FieldSpec("pixel_hash", (), "int64", role="input"), mask if masks else label,
              FieldSpec("teacher_logits", shape, dtype),
              *(() if masks else SUMMARIES)]  # fmt: skip
    kept = inside(torch.zeros(1, 3, SIDE, SIDE)) if inside else {}
    fields += [FieldSpec(name, tuple(value.shape[1:]), "float32", parameters=dict(said or {}))
               for name, value in kept.items()]  # fmt: skip
    shards = []
    for split, rows in files.items():
        places = [(view, start) for view in range(views if split == "train" else 1)
                  for start in range(0, len(rows), shard_rows)]  # fmt: skip
        shards += [ShardPlan(split, number, start, min(start + shard_rows, len(rows)), view)
                   for number, (view, start) in enumerate(places)]  # fmt: skip
    settings = {"processing": Processing.of(own, 3).to_json(), "problem_type": "single_label_classification"}
    identity = {"versions": dict(versions or {})}
    task = "semantic-segmentation" if masks else "image-classification"
    plan = Plan(task, {**settings, **(more or {})}, identity, fields, shards, NAMES)
    folder = path.parent / f"{path.name}-processor"
    own.save_pretrained(folder)
    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            rows, source = files[shard.split], range(shard.start, shard.stop)
            sizes = [Image.open(io.BytesIO(one)).size[::-1] for one in rows]
            random = views > 1 and shard.split == "train"
            view = draw(recipe, shard.split, source, shard.view, len(rows), sizes.__getitem__) if random else plain(
                len(source)
            )  # fmt: skip
            pixels = np.stack([pixels_of(rows, row, view, at) for at, row in enumerate(source)])
            with torch.no_grad():
                logits = teacher(pixel_values=torch.from_numpy(pixels)).logits.numpy()
            builder, every = writer.open_shard(shard, len(source), {}), np.arange(len(source))
            shown = [rows[row] if shard.view == 0 else b"" for row in source]
            builder.put_column("image", pa.array(shown, pa.large_binary()))
            for name, values in view.items() if views > 1 else ():
                builder.put(name, every, values)
            builder.put("pixel_hash", every, np.asarray([hash_of(one) + hash_shift for one in pixels], np.int64))
            builder.put("teacher_logits", every, logits)
            for name, found in inside(torch.from_numpy(pixels)).items() if inside else ():
                builder.put(name, every, found.numpy())
            if masks:
                own_masks = [labels[shard.split][row] if shard.view == 0 else b"" for row in source]
                builder.put_column("mask", pa.array(own_masks, pa.large_binary()))
            else:
                builder.put("labels", every, labels[shard.split][shard.start : shard.stop])
                builder.put("teacher_prediction", every, logits.argmax(1))
                builder.put("teacher_confidence", every, torch.from_numpy(logits).softmax(1).amax(1).numpy())
            builder.put_addresses(np.stack([np.frombuffer(content_hash([rows[row]]), np.uint8) for row in source]))
            writer.commit(builder)
        writer.finish(folders={"processor": folder})
    return TeacherStore.open(path)
