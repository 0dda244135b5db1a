"""Train a small ResNet on MNIST, for the benchmarks that need a teacher of images that was really trained.

    python benchmarks/image_teacher.py --output benchmarks/work/teachers/mnist

A plain loop without predistill: AdamW, one cycle to 3e-3, each image randomly cropped to half of its area or more, as
the views are that it will be asked about. Prints accuracy on the evaluation rows, and leaves a folder that
`AutoModelForImageClassification` and `AutoImageProcessor` load.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from predistill.benchmarks.measure import DATA, WORK, note
from torch.nn import functional

EPOCHS, BATCH, LEARNING_RATE, SEED = 20, 64, 3e-3, 0
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's grey values between 0 and 1
WIDE, SLIM = (32, 64, 128), (8, 16, 32)  # channels by stage: of the teacher, of students


def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels float32 [N, 1, 28, 28] and labels int64 [N]."""
    from PIL import Image

    rows = pq.read_table(DATA / "mnist" / f"{split}.parquet")
    files = [one["bytes"] for one in rows.column("image").to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    values = (torch.from_numpy(pixels).float() / 255 - MEAN) / DEVIATION
    return values.unsqueeze(1), torch.as_tensor(rows.column("label").to_pylist())


def resnet(widths: tuple[int, ...], depth: int) -> Any:
    """Config of a ResNet for grey digits, `depth` basic blocks a stage."""
    from transformers import ResNetConfig

    names = {number: str(number) for number in range(10)}
    return ResNetConfig(
        num_channels=1, embedding_size=widths[0], hidden_sizes=list(widths), depths=[depth] * len(widths),
        layer_type="basic", id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip


def cropped(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random square of each image, half of its area or more, at its own size again: [B, 1, 28, 28]."""
    sides = torch.rand(len(pixels), generator=generator).mul(0.5).add(0.5).sqrt()
    places = (torch.rand(len(pixels), 2, generator=generator) * 2 - 1) * (1 - sides[:, None])
    maps = torch.zeros(len(pixels), 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = sides
    maps[:, :, 2] = places
    return functional.grid_sample(pixels, functional.affine_grid(maps, list(pixels.shape), False), align_corners=False)


def train_teacher(output: Path, epochs: int = EPOCHS) -> float:
    """Train, save to `output`, and return accuracy on the evaluation rows."""
    from transformers import ResNetForImageClassification, ViTImageProcessorPil

    torch.manual_seed(SEED)
    model, generator = ResNetForImageClassification(resnet(WIDE, 2)), torch.Generator().manual_seed(SEED)
    pixels, labels = images("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
            model(pixel_values=cropped(pixels[rows], generator), labels=labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        note(f"mnist: epoch {epoch + 1} of {epochs} in {time.perf_counter() - start:.0f} s")
    model.save_pretrained(output)
    size = {"height": pixels.shape[2], "width": pixels.shape[3]}
    ViTImageProcessorPil(size=size, image_mean=[MEAN], image_std=[DEVIATION]).save_pretrained(output)
    return accuracy(model)


@torch.inference_mode()
def accuracy(model: torch.nn.Module) -> float:
    pixels, labels = images("test")
    model.eval()
    found = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in pixels.split(250)])
    return float((found == labels).float().mean())


def teacher() -> Path:
    """Folder of the trained teacher; trains it (some minutes on one core) where it is not there yet."""
    folder = WORK / "teachers" / "mnist"
    if not (folder / "config.json").exists():
        note(f"training a teacher: {train_teacher(folder):.4f} on the evaluation rows")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder to save to (default: benchmarks/work/teachers/mnist)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    output = args.output or WORK / "teachers" / "mnist"
    print(f"mnist: accuracy {train_teacher(output, args.epochs):.4f} on the evaluation rows, saved to {output}")


if __name__ == "__main__":
    main()
