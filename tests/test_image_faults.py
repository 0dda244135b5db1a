"""What a dump of images says of images, columns, teachers and settings that cannot be: one line each."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from dump_cases import own_cache  # noqa: F401  a fixture
from image_cases import encoded, levels, processor, settings, table, vit, write
from predistill.cli import cli
from predistill.store import ConfigError, DataError, PredistillError, StoreMismatch, TeacherStore
from predistill.store.verify import rebuild_index, verify
from predistill.teacher_dump.dump import dump
from torch import Tensor, nn

FILES = [encoded(levels(at)) for at in range(4)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("vit") / "vit", id2label={0: "cat", 1: "dog", 2: "hen"})


def refused(config: Any, **given: Any) -> str:
    with pytest.raises(PredistillError) as error:
        dump(config, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"no image", "split train, row 2: column 'image': no image that Pillow can read"),
        (b"", "split train, row 2: column 'image': an image expected; it is empty"),
        (FILES[0][:200], "split train, row 2: column 'image': an image that is damaged"),
        (None, "split train, row 2: column 'image' is null"),
        (encoded(np.full((4, 4), 300, np.uint16)), "row 2: column 'image': an image of 8 bits a channel expected"),
    ],
)
def test_images_that_cannot_be_read(teacher: Path, tmp_path: Path, bad: bytes | None, says: str) -> None:
    pq.write_table(table([*FILES[:2], bad, FILES[3]], [0, 1, 2, 0]), tmp_path / "d.parquet")
    assert says in refused(settings(teacher, tmp_path / "d.parquet", tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_an_image_that_went_away(teacher: Path, tmp_path: Path) -> None:
    held = pa.table({"image": [{"bytes": None, "path": str(tmp_path / "gone.png")}], "label": [0]})
    pq.write_table(held.replace_schema_metadata(table(FILES, [0] * 4).schema.metadata), tmp_path / "paths.parquet")
    said = refused(settings(teacher, tmp_path / "paths.parquet", tmp_path / "other"))
    assert "image gone.png cannot be read: No such file" in said


def test_columns(teacher: Path, tmp_path: Path) -> None:
    image = table(FILES).column("image")
    two = pa.table({"left": image, "right": image, "label": pa.array([0, 1, 2, 0])})
    pq.write_table(two, tmp_path / "two.parquet")
    (tmp_path / "none.jsonl").write_text('{"text": "a", "label": 0}\n')
    said = refused(settings(teacher, tmp_path / "two.parquet", tmp_path / "s"))
    assert said == "the dataset has several columns of images, left, right: name one with --image-column"
    assert dump(settings(teacher, tmp_path / "two.parquet", tmp_path / "s", image_column="right"))["samples"] == 4
    said = refused(settings(teacher, tmp_path / "none.jsonl", tmp_path / "t"))
    assert said == "the dataset has no column of images, only text, label: name one with --image-column"
    said = refused(settings(teacher, tmp_path / "none.jsonl", tmp_path / "t", image_column="text"))
    assert said.startswith("--image-column text: images expected; it holds Value(")
    said = refused(settings(teacher, tmp_path / "none.jsonl", tmp_path / "t", image_column="photo"))
    assert said == "--image-column photo: split train has text, label"


def test_labels(teacher: Path, tmp_path: Path) -> None:
    pq.write_table(table(FILES, [0, 1, 3, 0]), tmp_path / "d.parquet")
    said = refused(settings(teacher, tmp_path / "d.parquet", tmp_path / "s"))
    assert said.startswith("split train, row 2: column 'label' is 3; the teacher has 3 classes, so 0 to 2 expected")
    for at, name in enumerate(("hen", "dog", "cat", "fox")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "0.png").write_bytes(FILES[at])
    said = refused(settings(teacher, tmp_path / "folder", tmp_path / "s"))
    assert "the teacher has 3 classes" in said or "fox" in said
    (tmp_path / "folder" / "fox" / "0.png").unlink()
    (tmp_path / "folder" / "fox").rmdir()
    (tmp_path / "folder" / "hen").rename(tmp_path / "folder" / "HEN")
    said = refused(settings(teacher, tmp_path / "folder", tmp_path / "s"))
    assert said.startswith("class 0 is 'HEN' in the dataset and 'cat' in the teacher's id2label: give --label-order by")
    dump(settings(teacher, tmp_path / "folder", tmp_path / "s", label_order="by-name"))
    with TeacherStore.open(tmp_path / "s") as store:
        batch = store.select()[:]
        assert batch["labels"].tolist() == [2 - FILES.index(file) for file in batch["image"]]


def test_no_rows(teacher: Path, tmp_path: Path) -> None:
    pq.write_table(table([], []), tmp_path / "d.parquet")
    assert "has no rows; at least one expected" in refused(settings(teacher, tmp_path / "d.parquet", tmp_path / "s"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"views": 0}, "--views is a whole number from 1; got 0"),
        ({"views": 2, "view_transforms": ["rotate"]}, "--view-transforms: of crop, flip, mixup, cutmix expected"),
        ({"views": 2, "crop_scale": [0.5]}, "--crop-scale: two shares expected, as 0.08,1.0; got [0.5]"),
        ({"views": 2, "crop_scale": [0.5, 0.2]}, "--crop-scale: 0 < least <= largest <= 1 expected; got 0.5,0.2"),
        ({"batch_size": 0}, "--batch-size is a whole number from 1; got 0"),
        ({"tokens_per_batch": 5, "batch_size": 4}, "--tokens-per-batch is about text, and image-classification reads"),
        ({"text_column": "text"}, "--text-column is about text, and image-classification reads images; leave it away"),
        ({"max_length": 5}, "--max-length is about text"),
        ({"fields": ["attentions"]}, "image-classification keeps logits, hidden_states, pooled"),
        ({"fields": ["pooled"]}, "--fields pooled: ViTForImageClassification gives none"),
        ({"capture": ["vit.layer.0"]}, "--capture vit.layer.0: the name of a module of ViTForImageClassification"),
        ({"doc_stride": 3}, "--doc-stride is nothing that image-classification knows; leave it away"),
    ],
)
def test_settings(teacher: Path, tmp_path: Path, more: dict[str, Any], says: str) -> None:
    data = write(tmp_path / "d.parquet", 4)
    with pytest.raises(ConfigError) as error:
        dump(settings(teacher, data, tmp_path / "s", **more))
    assert says in str(error.value) and not (tmp_path / "s").exists()


def test_settings_of_images_are_refused_elsewhere(teacher: Path, tmp_path: Path) -> None:
    for more, flag in (({"views": 2}, "--views"), ({"image_column": "image"}, "--image-column")):
        with pytest.raises(ConfigError, match=f"{flag} is nothing that text-classification knows"):
            settings(teacher, "x", tmp_path / "s", task="text-classification", batch_size=None, **more)


def test_views_need_a_split_named_train(teacher: Path, tmp_path: Path) -> None:
    data = f"test={write(tmp_path / 'd.parquet', 4)}"
    assert "--views are of the split train, and there is test alone" in refused(
        settings(teacher, data, tmp_path / "s", views=2)
    )


def test_teachers_without_a_processor_or_with_another_task(
    teacher: Path, tmp_path: Path, tiny_teacher_dir: Path
) -> None:
    data = write(tmp_path / "d.parquet", 4)
    bare = vit(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    assert refused(settings(bare, data, tmp_path / "s")).startswith(f"--teacher {bare} cannot be loaded: ")
    said = refused(settings(tiny_teacher_dir, data, tmp_path / "s"))
    assert said.startswith(f"--teacher {tiny_teacher_dir}")
    said = refused(settings(processor(vit(tmp_path / "v"), size={"shortest_edge": 8}), data, tmp_path / "s"))
    assert "the processor gives each image a size of its own" in said


def test_given_modules_that_do_not_suit(teacher: Path, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left

    class Maps(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    config = settings(teacher, write(tmp_path / "d.parquet", 4), tmp_path / "s")
    assert refused(config, model=Two()) == (
        "a model whose forward takes pixel_values by name expected; Two.forward takes left, right: wrap it in a module "
        "that takes pixel_values"
    )
    assert "Maps: logits [B, C] expected, here of 2 images of [3, 16, 16]; they have shape [2, 3, 16, 16]" in refused(
        config, model=Maps()
    )


def test_another_seed_or_processor_is_another_store(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.parquet", 6)
    dump(settings(teacher, data, tmp_path / "s", views=2))
    said = refused(settings(teacher, data, tmp_path / "s", views=2, view_seed=1))
    assert "settings.view_seed differs: the store has 0, this run has 1" in said
    other = processor(vit(tmp_path / "vit"), image_std=[0.3, 0.3, 0.3])
    with pytest.raises(StoreMismatch, match="processing|processor"):
        dump(settings(other, data, tmp_path / "s", views=2))
    moved = processor(vit(tmp_path / "moved", id2label={0: "cat", 1: "dog", 2: "hen"}))
    assert dump(settings(moved, data, tmp_path / "s", views=2))["complete"]


def test_verify_finds_other_pixels(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(settings(teacher, write(tmp_path / "d.parquet", 6), tmp_path / "s", views=2))
    rebuild_index(tmp_path / "s")
    assert verify(tmp_path / "s")["ok"]
    from predistill.store.images import pixels

    honest = pixels.Processing.values
    monkeypatch.setattr(pixels.Processing, "values", lambda self, levels: honest(self, levels // 2 * 2))
    [problem] = verify(tmp_path / "s")["problems"]
    assert problem["kind"] == "pixels" and "12 of 12 rows that were looked at, such as row 0" in problem["detail"]
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert verify(tmp_path / "s")["ok"]


def test_commands(teacher: Path, tmp_path: Path) -> None:
    data, store = write(tmp_path / "d.parquet", 6), tmp_path / "s"
    run = partial(CliRunner().invoke, prog_name="predistill")
    given = ["--teacher", str(teacher), "--dataset", str(data), "--task", "image-classification", "--device", "cpu"]
    done = run(cli, ["dump", *given, "--output-dir", str(store), "--views", "2", "--crop-scale", "0.3,1",
                      "--view-transforms", "crop,cutmix", "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["crop_scale"] == [0.3, 1.0]
    shown = run(cli, ["info", str(store)])
    assert shown.exit_code == 0 and "processor" in shown.stdout and "tokens" not in shown.stdout
    assert run(cli, ["verify", str(store)]).stdout.startswith("ok: 2 shards, 12 samples")
    asked = run(cli, ["query", str(store), "SELECT count(*) FROM samples WHERE view = 1"])
    assert asked.exit_code == 0 and "6" in asked.stdout
    planned = run(cli, ["plan", *given, "--output-dir", str(tmp_path / "t"), "--json"])
    assert json.loads(planned.stdout)["samples"] == 6
    with TeacherStore.open(store) as opened:
        assert "image-classification" in (store / "README.md").read_text() and opened.tokenizer_dir is None


def test_without_pillow(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.parquet", 4)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises((ConfigError, DataError), match=r"pip install predistill\[images\]"):
        dump(settings(teacher, data, tmp_path / "s"))
