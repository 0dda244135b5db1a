"""Pixels from stored images: decode, replay a view, hash. The teacher's pixels and the student's are made here.

    image bytes --decode--> Pillow image --view or processor's own resize and crop--> levels uint8
                --Processing.values--> float32 [C, H, W] --mix with the partner's--> pixel_values

A view whose crop is all zeros (height 0) is resized and cropped as the processor does it: so are all rows of stores
without view columns, and evaluation splits of those with. A crop of (top, left, height, width) is cut out of the
decoded image and resized to (H, W), as RandomResizedCrop does. Then the view's flip, for which left becomes right.
Mixing is of float32 values: ratio * own + (1 - ratio) * partner's, or the partner's inside the box. A row's pixels
depend on nothing but its own bytes, its partner's and its view.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .processing import MODES, Processing, pillow
from .views import (
    VIEW_CROP,
    VIEW_FLIP,
    VIEW_MIX_BOX,
    VIEW_MIX_CROP,
    VIEW_MIX_FLIP,
    VIEW_MIX_RATIO,
    VIEW_MIX_WITH,
    Recipe,
    draw,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = [
    "IMAGE", "MASK", "MODES", "PIXEL_HASH", "PIXEL_VALUES", "Processing", "Recipe", "check", "decode", "decode_mask",
    "draw", "image_size", "pixel_hash", "replay", "replay_masks",
]  # fmt: skip

IMAGE = "image"  # column of encoded files; b"" in rows of other views than 0
MASK = "mask"  # column of encoded masks, of segmentation
PIXEL_HASH = "pixel_hash"
PIXEL_VALUES = "pixel_values"  # never stored
_NEAREST = 0  # Pillow's number
_ORIENTATION = 0x0112  # EXIF's number
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError)  # what Pillow raises
_DEEP = ("I", "F")  # modes of more than 8 bits a channel begin so


def decode(data: bytes, mode: str) -> Image:
    """The image in a file, upright by its EXIF orientation, in `mode` ("RGB" or "L").

    Transparency is laid on white, as transformers does; of an animation it is the first picture. Raises DataError where
    it cannot be read, is larger than Pillow thinks safe, or has more than 8 bits a channel.
    """
    image = _opened(data)
    if image.mode.startswith(_DEEP):
        raise _too_deep(image)
    if image.mode == mode:
        return image
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            clear = image.convert("RGBA")
            white = pillow().Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = pillow().Image.alpha_composite(white, clear).convert("RGB")
        return image.convert(mode)
    except (OSError, ValueError) as error:
        raise DataError(f"mode {image.mode} cannot be made {mode}: {error}") from error


def decode_mask(data: bytes) -> np.ndarray:
    """int32 [height, width] of a mask: its levels, or the palette's indices. Raises DataError for one of colours."""
    image = _opened(data)
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16L", "I;16B"):
        raise DataError(f"a mask of one whole number a pixel expected (mode L, P or I); it is of mode {image.mode}")
    return np.asarray(image).astype(np.int32)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the decoded image, from its header. Raises DataError where there is none."""
    image = _header(data)
    if image.format == "TIFF":  # which Pillow turns while it decodes
        image = _opened(data)
    turned = image.getexif().get(_ORIENTATION, 1) >= 5  # orientations 5 to 8 lie on their side
    return (image.width, image.height) if turned else (image.height, image.width)


def replay(
    images: Sequence[bytes], partners: Sequence[bytes], view: Mapping[str, np.ndarray], processing: Processing,
    pool: Executor | None = None,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, C, H, W]: the pixels of B rows, on the CPU.

    images: encoded, of each row's source row. partners: encoded, of `view_mix_with`; b"" where that is -1, and [] where
    no row has one. view: the rows' view columns, [B, ...]; {} for the processor's own view. pool: threads that rows are
    shared among; Pillow lets others run while it decodes. Raises DataError for bytes that are no image.
    """
    import torch

    made = np.empty((len(images), *processing.shape), np.float32)

    def one(row: int) -> None:
        made[row] = _pixels(images[row], partners[row] if partners else b"", _of_row(view, row), processing)

    for _ in pool.map(one, range(len(images))) if pool else map(one, range(len(images))):
        pass
    return torch.from_numpy(made)


def replay_masks(masks: Sequence[bytes], view: Mapping[str, np.ndarray], processing: Processing) -> np.ndarray:
    """int32 [B, H, W]: masks cropped, resized (to the nearest pixel) and flipped as their images are."""
    made = np.empty((len(masks), *processing.output), np.int32)
    for row, data in enumerate(masks):
        levels = decode_mask(data)
        if processing.reduce_labels:
            levels = np.where((levels == 0) | (levels == 255), 255, levels - 1).astype(np.int32)
        own = _of_row(view, row)
        image = pillow().Image.fromarray(levels)
        made[row] = _levels(image, own.get(VIEW_CROP), bool(own.get(VIEW_FLIP, False)), processing, _NEAREST)
    return made


def pixel_hash(pixels: torch.Tensor | np.ndarray) -> np.ndarray:
    """int64 [B]: BLAKE2b, 8 bytes read as a big-endian number, of each row's float32 values in C order."""
    rows = np.ascontiguousarray(np.asarray(pixels, dtype="<f4"))
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, ">i8").astype(np.int64)


def _pixels(data: bytes, partner: bytes, view: Mapping[str, Any], processing: Processing) -> np.ndarray:
    """float32 [C, H, W] of one row."""
    own = _values(data, view.get(VIEW_CROP), bool(view.get(VIEW_FLIP, False)), processing)
    if view.get(VIEW_MIX_WITH, -1) < 0:
        return own
    other = _values(partner, view[VIEW_MIX_CROP], bool(view[VIEW_MIX_FLIP]), processing)
    ratio, (top, left, height, width) = np.float32(view[VIEW_MIX_RATIO]), map(int, view[VIEW_MIX_BOX])
    if ratio < 1:
        own = ratio * own + (np.float32(1) - ratio) * other
    own[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
    return own


def _values(data: bytes, crop: Any, flip: bool, processing: Processing) -> np.ndarray:
    return processing.values(_levels(decode(data, processing.mode), crop, flip, processing, processing.resample))


def _levels(image: Image, crop: Any, flip: bool, processing: Processing, resample: int) -> np.ndarray:
    """[H, W] or [H, W, C] of a decoded image, cropped, resized and flipped."""
    if crop is None or crop[2] <= 0:
        levels = processing.plain(image, resample)
    else:
        top, left, height, width = map(int, crop)
        cut = image.crop((left, top, left + width, top + height))
        levels = np.asarray(cut.resize(processing.output[::-1], resample))
    return levels[:, ::-1] if flip else levels


def _of_row(view: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    return {name: values[row] for name, values in view.items()}


def _header(data: bytes) -> Image:
    """Raises DataError where Pillow cannot tell what it is, or it is larger than Pillow thinks safe."""
    imaging = pillow().Image
    if not data:
        raise DataError("an image expected; it is empty")
    try:
        image = imaging.open(io.BytesIO(data))
    except (imaging.DecompressionBombError, imaging.DecompressionBombWarning) as error:
        raise DataError(f"more pixels than Pillow thinks safe: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"no image that Pillow can read ({type(error).__name__}, {len(data)} bytes)") from error
    most = imaging.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise DataError(f"{image.width} x {image.height} pixels; at most {most} expected: make it smaller")
    return image


def _opened(data: bytes) -> Image:
    """The image as it is in its file, decoded and upright."""
    image = _header(data)
    try:
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) > 1
        return pillow().ImageOps.exif_transpose(image) if turned else image
    except _DAMAGED as error:
        raise DataError(f"an image that is damaged: {error}") from error


def _too_deep(image: Image) -> DataError:
    return DataError(f"an image of 8 bits a channel expected; it is of mode {image.mode}: convert it first")


def check(data: bytes) -> None:
    """Raises DataError where `decode` would: a JPEG is decoded at an eighth of its size, which reads all of it."""
    image = _header(data)
    if image.mode.startswith(_DEEP):
        raise _too_deep(image)
    try:
        image.draft(None, (1, 1))
        image.load()
    except _DAMAGED as error:
        raise DataError(f"an image that is damaged: {error}") from error
