"""Pixels made of stored images: equal to transformers' own, and the same in every process, order and batch."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_cases import encoded, levels
from PIL import Image
from predistill.store import ConfigError, DataError
from predistill.store.images import pixels as made_by
from predistill.store.images.pixels import (
    Processing,
    check,
    decode,
    decode_mask,
    image_size,
    pixel_hash,
    replay,
    replay_masks,
)
from predistill.store.images.views import Recipe, draw, plain, view_seed
from transformers.image_transforms import convert_to_rgb
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 12
RECIPE = Recipe(("crop", "flip", "mixup", "cutmix"), (0.08, 1.0), 0, (SIDE, SIDE))
OURS = Processing("RGB", size=(SIDE, SIDE), scale=1 / 255, normalize=(((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),))

PROCESSORS = [
    ViTImageProcessorPil(size={"height": 21, "width": 30}),
    ViTImageProcessorPil(do_normalize=False, resample=3),
    ViTImageProcessorPil(do_rescale=False, do_normalize=False),
    ConvNextImageProcessorPil(size={"shortest_edge": 50}, crop_pct=0.8),
    ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    DeiTImageProcessorPil(),
    EfficientNetImageProcessorPil(size={"height": 40, "width": 40}, rescale_offset=True, rescale_factor=1 / 127.5),
    LevitImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
    MobileViTImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 34, "width": 34}),
    SegformerImageProcessorPil(size={"height": 24, "width": 24}, do_reduce_labels=True),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("height", "width"), [(60, 80), (7, 9), (1, 1), (33, 20)])
def test_the_plain_view_is_the_processors(processor: Any, height: int, width: int) -> None:
    data = encoded(levels(1, height, width))
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    processing = Processing.from_json(Processing.of(processor).to_json())
    found = replay([data], [], {}, processing)
    assert found.dtype == torch.float32 and tuple(found.shape[1:]) == processing.shape
    assert np.array_equal(found[0].numpy(), np.asarray(expected, np.float32))


def test_the_plain_view_of_grey_images() -> None:
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.3], image_std=[0.7])
    data = encoded(levels(1, channels=1))
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(replay([data], [], {}, Processing.of(processor, 1))[0].numpy(), expected)


def test_processors_that_do_more_are_refused() -> None:
    with pytest.raises(ConfigError, match="DetrImageProcessorPil does what cannot be done again.*longest_edge"):
        Processing.of(DetrImageProcessorPil())
    with pytest.raises(ConfigError, match="PoolFormerImageProcessorPil does what cannot be done again.*its pixels are"):
        Processing.of(PoolFormerImageProcessorPil())
    with pytest.raises(ConfigError, match="images of 1 or 3 channels"):
        Processing.of(ViTImageProcessorPil(), 4)
    with pytest.raises(ConfigError, match="each image a size of its own"):
        _ = Processing.of(ViTImageProcessorPil(size={"shortest_edge": 8})).output


def reference(data: bytes, crop: Any, flip: bool) -> np.ndarray:
    """float32 [C, H, W] by a dense formula: slices of an array, and Pillow's resize alone."""
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    top, left, height, width = crop
    cut = Image.fromarray(np.ascontiguousarray(whole[top : top + height, left : left + width]))
    small = np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float64) / 255
    small = small[:, ::-1] if flip else small
    return ((small - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).transpose(2, 0, 1)


def sizes(files: list[bytes]) -> Any:
    return lambda at: image_size(files[at])


def test_views_are_what_their_columns_say() -> None:
    files = [encoded(levels(at, 20 + at, 30 - at)) for at in range(12)]
    kinds = set()
    for view in range(4):
        columns = draw(RECIPE, "train", np.arange(12), view, 12, sizes(files))
        partners = [files[at] if at >= 0 else b"" for at in columns["view_mix_with"]]
        found = replay(files, partners, columns, OURS).numpy()
        for row in range(12):
            one = {name: values[row] for name, values in columns.items()}
            expected = reference(files[row], one["view_crop"], one["view_flip"])
            if one["view_mix_with"] >= 0:
                other = reference(partners[row], one["view_mix_with_crop"], one["view_mix_with_flip"])
                top, left, height, width = one["view_mix_box"]
                kinds.add("cutmix" if height else "mixup")
                expected = one["view_mix_ratio"] * expected + (1 - one["view_mix_ratio"]) * other
                expected[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
            assert np.abs(found[row] - expected).max() < 1e-5
    assert kinds == {"mixup", "cutmix"}


def test_rows_are_alike_whatever_the_batch_order_and_threads() -> None:
    files = [encoded(levels(at, 25, 30), "JPEG") for at in range(6)]
    columns = draw(RECIPE, "train", np.arange(6), 1, 6, sizes(files))
    partners = [files[at] if at >= 0 else b"" for at in columns["view_mix_with"]]
    whole = replay(files, partners, columns, OURS)
    order = [4, 0, 5]
    some = {name: values[order] for name, values in columns.items()}
    with ThreadPoolExecutor(3) as pool:
        part = replay([files[at] for at in order], [partners[at] for at in order], some, OURS, pool)
    assert torch.equal(whole[order], part)
    assert np.array_equal(pixel_hash(whole)[order], pixel_hash(part))
    digest = hashlib.blake2b(whole[0].numpy().tobytes(), digest_size=8).digest()
    assert pixel_hash(whole)[0] == int.from_bytes(digest, "big", signed=True)


def test_another_process_makes_the_same_pixels(tmp_path: Path) -> None:
    files = [encoded(levels(at, 25, 30), "JPEG" if at % 2 else "PNG") for at in range(4)]
    columns = draw(RECIPE, "train", np.arange(4), 2, 4, sizes(files))
    partners = [files[at] if at >= 0 else b"" for at in columns["view_mix_with"]]
    held = np.array([list(map(bytes.hex, files)), list(map(bytes.hex, partners))])
    arrays: Any = {**columns, "files": held}
    np.savez(tmp_path / "case.npz", **arrays)
    program = (
        "import numpy as np, sys, json; from predistill.store.images.pixels import Processing, pixel_hash, replay;"
        "case = dict(np.load(sys.argv[1])); files, partners = case.pop('files').tolist();"
        "processing = Processing.from_json(json.loads(sys.argv[2]));"
        "made = replay([*map(bytes.fromhex, files)], [*map(bytes.fromhex, partners)], case, processing);"
        "print(*pixel_hash(made))"
    )
    settings = __import__("json").dumps(OURS.to_json())
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "case.npz", settings], capture_output=True, text=True, check=True
    )
    assert [int(one) for one in done.stdout.split()] == pixel_hash(replay(files, partners, columns, OURS)).tolist()


def test_drawing_depends_on_the_address_alone() -> None:
    def size_of(at: int) -> tuple[int, int]:
        return 100, 200

    whole = draw(RECIPE, "train", np.arange(50), 3, 50, size_of)
    part = draw(RECIPE, "train", np.array([17, 3]), 3, 50, size_of)
    for name, values in part.items():
        assert np.array_equal(values, whole[name][[17, 3]]), name
    assert whole["view_seed"][3] == view_seed(0, "train", 3, 3)
    other = draw(RECIPE, "train", np.arange(50), 4, 50, size_of)
    assert len(np.unique(whole["view_seed"])) == 50 and not np.isin(whole["view_seed"], other["view_seed"]).any()
    assert (whole["view_mix_with"] != np.arange(50)).all() and whole["view_mix_with"].max() < 50
    only = draw(Recipe(("flip",), (0.08, 1.0), 0, (SIDE, SIDE)), "train", np.arange(50), 3, 50, size_of)
    assert np.array_equal(only["view_flip"], whole["view_flip"]) and not only["view_crop"].any()


def test_crops_are_spread_as_they_should_be() -> None:
    """Against the distribution itself: areas uniform in the scale, ratios log-uniform, all inside the image."""
    recipe = Recipe(("crop", "flip"), (0.2, 0.5), 7, (SIDE, SIDE))
    found = draw(recipe, "train", np.arange(4000), 0, 4000, lambda _: (300, 400))
    top, left, height, width = found["view_crop"].astype(float).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, ratio = height * width / 120_000, np.log(width / height)
    assert abs(area.mean() - 0.35) < 0.01 and abs(np.quantile(area, 0.25) - 0.275) < 0.01
    assert abs(ratio.mean()) < 0.02 and abs(np.abs(ratio).max() - np.log(4 / 3)) < 0.02
    assert abs((top / (300 - height)).mean() - 0.5) < 0.02 and abs(found["view_flip"].mean() - 0.5) < 0.03
    narrow = draw(recipe, "train", np.arange(5), 0, 5, lambda _: (1000, 2))["view_crop"]
    assert (narrow[:, 3] == 2).all() and (narrow[:, 2] >= 1).all() and (narrow[:, 2] < 5).all()


def test_plain_rows_have_the_processors_view() -> None:
    data = encoded(levels(3))
    assert torch.equal(replay([data], [b""], plain(1), OURS), replay([data], [], {}, OURS))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "CMYK", "1", "YCbCr"])
def test_images_of_other_modes(mode: str) -> None:
    form = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "TIFF"}.get(mode, "PNG")
    sink = io.BytesIO()
    Image.fromarray(levels(4)).convert(mode).save(sink, form)
    for wanted in ("RGB", "L"):
        assert decode(sink.getvalue(), wanted).mode == wanted


def test_transparency_is_white_as_transformers_has_it() -> None:
    array = np.dstack([levels(5), np.full((20, 24), 100, np.uint8)])
    found = np.asarray(decode(encoded(array), "RGB"))
    assert np.array_equal(found, np.asarray(convert_to_rgb(Image.fromarray(array), return_numpy=True)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_that_lie_on_their_side_are_turned(form: str) -> None:
    image = Image.fromarray(levels(6, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    image.save(sink, form, exif=exif, **({} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}))
    found = decode(sink.getvalue(), "RGB")
    assert image_size(sink.getvalue()) == (30, 20) == (found.height, found.width)
    if form != "JPEG":
        assert np.array_equal(np.asarray(found), np.rot90(levels(6, 20, 30), -1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_unreadable_images(form: str) -> None:
    whole = encoded(levels(7, 60, 60), form)
    check(whole)
    for data, says in [
        (b"", "it is empty"), (b"no image at all", "no image that Pillow can read"),
        (whole[: len(whole) // 2], "image"), (whole[:20], "image"),
    ]:  # fmt: skip
        for look in (lambda data: decode(data, "RGB"), check):
            with pytest.raises(DataError, match=says):
                look(data)


def test_images_too_large_or_too_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = encoded(np.arange(40_000, 40_100, dtype=np.uint16).reshape(10, 10))
    for look in (lambda data: decode(data, "L"), check):
        with pytest.raises(DataError, match="8 bits a channel expected; it is of mode I;16"):
            look(deep)
    data = encoded(levels(8, 40, 40))
    for most in (1599, 700):  # Pillow warns, and then raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(DataError, match="pixels"):
            check(data)


def test_masks_follow_their_images() -> None:
    classes = np.zeros((16, 20), np.uint8)
    classes[4:12, 3:9] = 2
    classes[0, :] = 255
    assert np.array_equal(decode_mask(encoded(classes)), classes)
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    sink = io.BytesIO()
    palette.save(sink, "PNG")
    assert np.array_equal(decode_mask(sink.getvalue()), classes)
    same = Processing("RGB", size=(16, 20))
    view = {"view_crop": np.array([[2, 1, 8, 10]], np.int32), "view_flip": np.array([True])}
    found = replay_masks([encoded(classes)], view, Processing("RGB", size=(8, 10)))
    assert np.array_equal(found[0], classes[2:10, 1:11][:, ::-1])
    reduced = Processing("RGB", size=(16, 20), reduce_labels=True)
    assert np.array_equal(replay_masks([encoded(classes)], {}, same)[0], classes)
    expected = SegformerImageProcessorPil(size={"height": 16, "width": 20}, do_reduce_labels=True)(
        Image.fromarray(np.zeros((16, 20, 3), np.uint8)), Image.fromarray(classes), return_tensors="np"
    )["labels"][0]
    assert np.array_equal(replay_masks([encoded(classes)], {}, reduced)[0], expected)
    with pytest.raises(DataError, match="it is of mode RGB"):
        decode_mask(encoded(levels(9)))


def test_without_pillow_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"pip install predistill\[images\]"):
        made_by.decode(b"", "RGB")
