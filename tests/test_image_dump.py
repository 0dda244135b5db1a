"""What a dump of images holds: the teacher's own logits, of pixels that can be made again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dump_cases import own_cache, shard_bytes  # noqa: F401  a fixture
from image_cases import CLASSES, SIZE, encoded, levels, processor, resnet, settings, table, vit, write
from PIL import Image
from predistill.store import TeacherStore
from predistill.store.images.files import Files
from predistill.store.images.pixels import Processing, pixel_hash, replay
from predistill.store.images.views import VIEW_FIELDS
from predistill.store.verify import describe, verify
from predistill.teacher_dump.dump import dump, plan
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

MIXED: dict[str, Any] = {"views": 3, "view_transforms": ["crop", "flip", "mixup", "cutmix"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("vit") / "vit", id2label={0: "a", 1: "b", 2: "c"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    return f"train={write(folder / 'train.parquet', 25)},validation={write(folder / 'validation.parquet', 9, 50)}"


def files_of(data: str, split: str) -> list[bytes]:
    path = dict(part.split("=") for part in data.split(","))[split]
    return [row["bytes"] for row in pq.read_table(path).column("image").to_pylist()]


def replayed(store: TeacherStore, split: str) -> tuple[Tensor, dict[str, Any]]:
    """Pixels of all rows of a split, made from what is stored; and the rows."""
    rows, files = store.select(split=split), Files(store)
    batch = rows[:]
    views = {spec.name: batch[spec.name] for spec in VIEW_FIELDS if spec.name in batch}
    mixed = views.get("view_mix_with", np.full(len(rows), -1))
    partners = [files.of(rows.sample_ids[[at]], mixed[[at]])[0] if mixed[at] >= 0 else b"" for at in range(len(rows))]
    processing = Processing.from_json(store.settings["processing"])
    return replay(files.of(rows.sample_ids), partners, views, processing), batch


@pytest.mark.parametrize("make", [vit, resnet])
def test_plain_views_have_the_teachers_own_logits(make: Any, data: str, tmp_path: Path) -> None:
    """Against transformers' own processor and model, one image at a time."""
    folder = make(tmp_path / "teacher")
    found = dump(settings(folder, data, tmp_path / "store"))
    assert found["task"] == "image-classification" and found["complete"] and found["tokenizer"] is None
    assert found["processor"]["name"] == "teacher" and len(found["processor"]["sha256"]) == 64
    reader = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with TeacherStore.open(tmp_path / "store") as store:
        for split, count in (("train", 25), ("validation", 9)):
            batch, files = store.select(split=split)[:], files_of(data, split)
            assert batch["image"] == files and store.splits[split] == {"samples": count, "shards": 1, "tokens": 0}
            assert batch["labels"].tolist() == [at % CLASSES for at in range(count)]
            for row, file in enumerate(files):
                pixels = reader(Image.open(io.BytesIO(file)), return_tensors="pt")
                assert pixel_hash(pixels["pixel_values"])[0] == batch["pixel_hash"][row]
                with torch.no_grad():
                    logits = model(**pixels).logits[0].double()
                assert np.abs(batch["teacher_logits"][row] - logits.numpy()).max() < 1e-6 * max(logits.abs().max(), 1)
                loss = -torch.log_softmax(logits, 0)[row % CLASSES]
                assert abs(batch["teacher_loss"][row] - loss) < 1e-5
        assert (
            AutoImageProcessor.from_pretrained(tmp_path / "store" / "processor", backend="pil").to_dict()
            == reader.to_dict()
        )
        assert store.sql("SELECT count(*) FROM samples WHERE num_tokens IS NULL AND label = 1").fetchall() == [(11,)]
        assert (
            len(store.to_dataset("train")) == 25 and store.to_dataset("train")[3]["image"] == files_of(data, "train")[3]
        )
    assert verify(tmp_path / "store")["ok"]


@pytest.mark.parametrize("batch_size", [1, 100])
def test_views_have_the_logits_of_their_pixels(teacher: Path, data: str, tmp_path: Path, batch_size: int) -> None:
    found = dump(settings(teacher, data, tmp_path / "store", **MIXED, batch_size=batch_size))
    assert found["splits"]["train"]["samples"] == 75 and found["splits"]["validation"]["samples"] == 9
    assert found["settings"]["views"] == 3 and found["settings"]["view_transforms"] == MIXED["view_transforms"]
    model = AutoModelForImageClassification.from_pretrained(teacher).eval()
    with TeacherStore.open(tmp_path / "store") as store:
        pixels, batch = replayed(store, "train")
        assert np.array_equal(pixel_hash(pixels), batch["pixel_hash"]) and len(set(batch["pixel_hash"])) > 70
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits.numpy()
        assert np.abs(batch["teacher_logits"] - logits).max() < 1e-6 * np.abs(logits).max()
        mixed = batch["view_mix_with"] >= 0
        assert 0 < mixed.sum() < 76 and (batch["labels"][mixed] == -100).all() and (batch["labels"][~mixed] >= 0).all()
        assert [len(file) > 0 for file in batch["image"]] == [True] * 25 + [False] * 50
        order = store.sql("SELECT source_index, view FROM samples WHERE split = 'train' ORDER BY sample_id").fetchall()
        assert order == [(at, view) for view in range(3) for at in range(25)]
        hashes = store.sql("SELECT count(DISTINCT content_hash) FROM samples WHERE split = 'train'").fetchall()
        assert hashes == [(25,)]
        pixels, batch = replayed(store, "validation")
        assert not batch["view_crop"].any() and (batch["view_mix_with"] == -1).all() and (batch["labels"] >= 0).all()
        assert np.array_equal(pixel_hash(pixels), batch["pixel_hash"])
    assert verify(tmp_path / "store")["ok"]


def test_the_same_views_whatever_the_shards_and_batches(teacher: Path, data: str, tmp_path: Path) -> None:
    dump(settings(teacher, data, tmp_path / "whole", **MIXED))
    dump(settings(teacher, data, tmp_path / "small", **MIXED, shard_size=4000, batch_size=3))
    with TeacherStore.open(tmp_path / "whole") as whole, TeacherStore.open(tmp_path / "small") as small:
        assert len(small.shards) > 10 and len(whole.shards) == 4
        left, right = whole.select(split="train")[:], small.select(split="train")[:]
        for name in left:
            if name != "image":
                assert np.allclose(left[name], right[name], atol=1e-5, equal_nan=True), name
        assert left["image"] == right["image"] and np.array_equal(left["pixel_hash"], right["pixel_hash"])
    assert verify(tmp_path / "small")["ok"]


def test_other_seeds_and_scales_are_other_views(teacher: Path, data: str, tmp_path: Path) -> None:
    found = {}
    others: dict[str, dict[str, Any]] = {"a": {}, "b": {"view_seed": 1}, "c": {"crop_scale": [0.9, 1.0]}}
    for name, more in others.items():
        dump(settings(teacher, data, tmp_path / name, views=2, split=["train"], **more))
        with TeacherStore.open(tmp_path / name) as store:
            found[name] = store.select()[:]["view_crop"]
    assert (found["a"] != found["b"]).any(axis=1).mean() > 0.9
    areas = {name: (crop[:, 2] * crop[:, 3]).mean() for name, crop in found.items()}
    assert areas["c"] > 1.3 * areas["a"]


def test_the_plan_tells_the_size_of_the_shards(teacher: Path, data: str, tmp_path: Path) -> None:
    flips = {"views": 3, "view_transforms": ["flip"], "fields": ["logits", "hidden_states"]}
    cases: list[dict[str, Any]] = [{}, {"views": 3}, flips]
    for number, more in enumerate(cases):
        config = settings(teacher, data, tmp_path / str(number), dtype="float16", **more)
        said, made = plan(config), dump(config)
        assert said["samples"] == made["samples"] and said["shards"] == (2 if not more else 4)
        held = sum(field["bytes"] for field in made["fields"].values())
        assert 0.85 * held < said["bytes"] < 1.15 * made["bytes"]


KILLED = """
import os, sys
from predistill.teacher_dump import shards
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump
keep, left = shards.ShardKeeper.commit, [int(sys.argv[2])]
def commit(self):
    keep(self)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
shards.ShardKeeper.commit = commit
dump(DumpConfig(**__import__("json").loads(sys.argv[1])))
"""


def test_a_killed_dump_goes_on(teacher: Path, data: str, tmp_path: Path) -> None:
    """Killed after its second and fourth shard, then continued: byte for byte as one that was let alone."""
    told = {"teacher": str(teacher), "dataset": data, "task": "image-classification", "dtype": "float32",
            "device": "cpu", "batch_size": 4, "shard_size": 9000, **MIXED}  # fmt: skip
    dump(settings(teacher, data, tmp_path / "whole", shard_size=9000, **MIXED))
    for after in (2, 2):
        said = json.dumps({**told, "output_dir": str(tmp_path / "killed")})
        done = subprocess.run(
            [sys.executable, "-c", KILLED, said, str(after)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not describe(tmp_path / "killed")["complete"]
    dump(settings(teacher, data, tmp_path / "killed", shard_size=9000, **MIXED))
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert verify(tmp_path / "killed")["ok"]


def test_what_is_inside(teacher: Path, data: str, tmp_path: Path) -> None:
    dump(
        settings(
            teacher,
            data,
            tmp_path / "store",
            fields=["logits", "hidden_states"],
            layers="0,2",
            capture=["vit.layers.0.mlp"],
        )
    )
    model = AutoModelForImageClassification.from_pretrained(teacher).eval()
    seen: list[Tensor] = []
    model.vit.layers[0].mlp.register_forward_hook(lambda *_: seen.append(_[2]))
    with TeacherStore.open(tmp_path / "store") as store:
        pixels, batch = replayed(store, "train")
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert "teacher_hidden_states_01" not in batch
        for name, expected in (
            ("hidden_states_00", states[0]),
            ("hidden_states_02", states[2]),
            ("module_vit_layers_0_mlp", seen[0]),
        ):
            assert store.fields[f"teacher_{name}"].shape == (17, 8)
            assert np.abs(batch[f"teacher_{name}"] - expected.numpy()).max() < 1e-5
        assert store.fields["teacher_hidden_states_02"].parameters == {"layers": 2, "width": 8}


def test_feature_maps(data: str, tmp_path: Path) -> None:
    folder = resnet(tmp_path / "resnet")
    dump(settings(folder, data, tmp_path / "store", fields=["hidden_states", "pooled"], layers="last"))
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with TeacherStore.open(tmp_path / "store") as store:
        pixels, batch = replayed(store, "validation")
        with torch.no_grad():
            found = model.resnet(pixels, output_hidden_states=True)
        assert batch["teacher_hidden_states_02"].shape == (9, 8, 2, 2) and "teacher_logits" not in batch
        assert np.abs(batch["teacher_hidden_states_02"] - found.hidden_states[2].numpy()).max() < 1e-5
        assert np.abs(batch["teacher_pooled"] - found.pooler_output.flatten(1).numpy()).max() < 1e-5
        assert store.fields["teacher_hidden_states_02"].parameters == {"layers": 2, "width": 8}


class Plain(nn.Module):
    """A CNN of nobody's library."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).relu().mean(dim=(2, 3)))


class Named(Plain):
    def forward(self, pixel_values: Tensor, twice: bool = False) -> Tensor:
        return super().forward(pixel_values)


@pytest.mark.parametrize("kind", [Plain, Named])
def test_a_given_network(kind: Any, data: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = kind().train()
    found = dump(
        settings(processor(tmp_path / "reader"), data, tmp_path / "store", capture=["stem"], **MIXED), model=model
    )
    assert model.training and found["teacher"]["class"] == kind.__name__ and found["processor"]["name"] == "reader"
    with TeacherStore.open(tmp_path / "store") as store, torch.no_grad():
        pixels, batch = replayed(store, "train")
        model.eval()
        assert np.abs(batch["teacher_logits"] - model(pixels).numpy()).max() < 1e-5
        assert np.abs(batch["teacher_module_stem"] - model.stem(pixels).numpy()).max() < 1e-5
        assert store.fields["teacher_module_stem"].shape == (4, SIZE // 2, SIZE // 2)


def test_grey_images_and_grey_teachers(tmp_path: Path) -> None:
    """Grey images to a teacher of colours are grey in three channels; coloured ones to a grey teacher lose theirs."""
    for channels, of_images in ((3, 1), (1, 3), (1, 1)):
        folder = tmp_path / f"{channels}{of_images}"
        reader = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
        teacher = processor(vit(folder / "teacher", num_channels=channels), **reader)
        dump(settings(teacher, write(folder / "d.parquet", 6, channels=of_images), folder / "store"))
        with TeacherStore.open(folder / "store") as store:
            assert store.settings["processing"]["mode"] == ("RGB" if channels == 3 else "L")
            assert replayed(store, "train")[0].shape == (6, channels, SIZE, SIZE)


def test_a_folder_of_images(teacher: Path, tmp_path: Path) -> None:
    """Labels are folder names; what is stored is the files, wherever they stand."""
    for place in ("here", "there"):
        for split in ("train", "test"):
            for at in range(6):
                path = tmp_path / place / split / "cba"[at % 3] / f"{at}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(levels(at)))
    found = [dump(settings(teacher, tmp_path / place, tmp_path / f"store-{place}")) for place in ("here", "there")]
    assert found[0]["label_names"] == ["a", "b", "c"]
    assert found[0]["dataset"]["rows_sha256"] == found[1]["dataset"]["rows_sha256"]
    with TeacherStore.open(tmp_path / "store-here") as store:
        batch, files = store.select(split="train")[:], [encoded(levels(at)) for at in range(6)]
        assert sorted(batch["image"]) == sorted(files)
        assert batch["labels"].tolist() == [2 - files.index(file) % 3 for file in batch["image"]]


def test_arrays_of_levels_are_stored_as_png(teacher: Path, tmp_path: Path) -> None:
    arrays = [levels(at, 8, 9, 1) for at in range(4)]
    pq.write_table(
        table([encoded(one) for one in arrays], digits=[one.tolist() for one in arrays]), tmp_path / "d.parquet"
    )
    dump(settings(teacher, tmp_path / "d.parquet", tmp_path / "store", image_column="digits"))
    with TeacherStore.open(tmp_path / "store") as store:
        for array, file in zip(arrays, store.select()[:]["image"], strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), array)


def test_several_labels_and_none(data: str, tmp_path: Path) -> None:
    teacher = vit(tmp_path / "teacher", problem_type="multi_label_classification")
    files = [encoded(levels(at)) for at in range(4)]
    pq.write_table(table(files, tags=[[0, 1, 1], [1, 0, 0], None, [0, 0, 0]]), tmp_path / "d.parquet")
    dump(
        settings(
            teacher, tmp_path / "d.parquet", tmp_path / "store", label_column="tags", views=2, view_transforms=["mixup"]
        )
    )
    with TeacherStore.open(tmp_path / "store") as store:
        assert store.fields["labels"].shape == (3,) and np.isnan(store.select()[:]["labels"]).all()
    found = dump(
        settings(teacher, data, tmp_path / "none", label_column="none", problem_type="single_label_classification")
    )
    assert found["settings"]["label_column"] is None


@pytest.mark.slow
def test_mnist(data_dir: Path, tmp_path: Path) -> None:
    """All 1,500 test images in two views, killed and continued."""
    reader = {"size": {"height": 28, "width": 28}, "image_mean": [0.1307], "image_std": [0.3081]}
    teacher = processor(vit(tmp_path / "teacher", num_channels=1, image_size=28, num_labels=10), **reader)
    config = {"dataset": str(data_dir / "mnist" / "test.parquet"), "views": 2, "shard_size": 100_000, "batch_size": 64}
    dump(settings(teacher, folder=tmp_path / "whole", **config))
    told = {"teacher": str(teacher), "task": "image-classification", "dtype": "float32", "device": "cpu", **config}
    run = [sys.executable, "-c", KILLED, json.dumps({**told, "output_dir": str(tmp_path / "killed")}), "3"]
    assert subprocess.run(run, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}, capture_output=True,
                          check=False).returncode == -signal.SIGKILL  # fmt: skip
    dump(settings(teacher, folder=tmp_path / "killed", **config))
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    with TeacherStore.open(tmp_path / "whole") as store:
        pixels, batch = replayed(store, "train")
        assert np.array_equal(pixel_hash(pixels), batch["pixel_hash"]) and pixels.shape == (3000, 1, 28, 28)
    assert verify(tmp_path / "whole")["ok"]
