"""Small images, teachers of images and their dumps, for the tests of dumping."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from predistill.teacher_dump.config import DumpConfig
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

SIZE, CLASSES = 16, 3  # pixels a side, classes


def levels(seed: int, height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    """uint8 [height, width] or [height, width, channels]: a smooth picture, unlike any other seed's."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, channels), np.uint8)
    wide = Image.fromarray(coarse if channels > 1 else coarse[..., 0]).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(wide)


def encoded(array: np.ndarray, form: str = "PNG", **more: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, form, **more)
    return sink.getvalue()


def table(files: Sequence[bytes | None], labels: list[Any] | None = None, **columns: list[Any]) -> pa.Table:
    """As datasets writes its Image feature."""
    made: dict[str, Any] = {"image": [None if one is None else {"bytes": one, "path": None} for one in files]}
    made |= columns if labels is None else {"label": labels, **columns}
    image = datasets.Features({"image": datasets.Image()}).arrow_schema.field("image").type
    arrays = {name: pa.array(values, image if name == "image" else None) for name, values in made.items()}
    found = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    features = datasets.Features({**found, "image": datasets.Image()})
    return pa.table(arrays).replace_schema_metadata(features.arrow_schema.metadata)


def write(path: Path, count: int = 30, first: int = 0, channels: int = 3, **columns: list[Any]) -> Path:
    """Images of several sizes, PNG and JPEG in turn, with labels."""
    files = [
        encoded(levels(first + at, 18 + at % 5, 20 + at % 7, channels), "JPEG" if at % 2 else "PNG")
        for at in range(count)
    ]
    pq.write_table(table(files, [at % CLASSES for at in range(count)], **columns), path)
    return path


def processor(folder: Path, **more: Any) -> Path:
    """Saved as transformers saves one: a ViT's, of SIZE x SIZE."""
    made = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}, "resample": 2,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(made))
    return folder


def vit(folder: Path, **more: Any) -> Path:
    """A random ViT of two blocks, 8 wide, 4 x 4 patches: 17 tokens."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4,
        "image_size": SIZE, "num_labels": CLASSES, "initializer_range": 0.5, **more,
    }  # fmt: skip
    ViTForImageClassification(ViTConfig(**settings)).eval().save_pretrained(folder)
    return processor(folder)


def resnet(folder: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    settings = {
        "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": CLASSES,
        **more,
    }  # fmt: skip
    ResNetForImageClassification(ResNetConfig(**settings)).eval().save_pretrained(folder)
    return processor(folder)


def settings(teacher: Path, dataset: Path | str, folder: Path, **more: Any) -> DumpConfig:
    defaults: dict[str, Any] = {
        "task": "image-classification", "batch_size": 4, "dtype": "float32", "device": "cpu", "keep_columns": [],
    }  # fmt: skip
    return DumpConfig(teacher=str(teacher), dataset=str(dataset), output_dir=str(folder), **{**defaults, **more})
