"""Columns of images: which they are, and their encoded files, whatever way a dataset keeps them.

datasets' Image, struct of bytes and path, binary     the file as it came; a path is read
Array2D, Array3D or nested lists of whole numbers     [H, W] or [H, W, C] of 0..255, written as PNG
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ...store.errors import ConfigError, DataError
from ...store.images.processing import pillow
from ..config import AUTO

FILES = pa.large_binary()


def is_image(feature: Any) -> bool:
    """Is this feature of a dataset surely one of images?"""
    if isinstance(feature, datasets.Image):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def may_hold_images(feature: Any) -> bool:
    """Could it, where a person says so? Binary and arrays of numbers too."""
    of_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    of_levels = isinstance(feature, datasets.Array2D | datasets.Array3D)
    return is_image(feature) or of_bytes or of_levels or _nested(feature) in (2, 3)


def image_column(flag: str, asked: str, splits: dict[str, Any], others: Sequence[str] = ()) -> str:
    """The column of images: the one that is asked for, else the only one there is. others: that are taken already.

    splits: features by split. Raises ConfigError where there is none, or more than one.
    """
    first = next(iter(splits.values()))
    if asked != AUTO:
        for split, features in splits.items():
            if asked not in features:
                raise ConfigError(f"{flag} {asked}: split {split} has {', '.join(features)}")
            if not may_hold_images(features[asked]):
                raise ConfigError(f"{flag} {asked}: images expected; it holds {features[asked]}")
        return asked
    found = [name for name, feature in first.items() if is_image(feature) and name not in others]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"the dataset has several columns of images, {', '.join(found)}: name one with {flag}")
    raise ConfigError(f"the dataset has no column of images, only {', '.join(first)}: name one with {flag}")


def as_files(table: pa.Table, features: datasets.Features) -> pa.Table:
    """Columns that are surely of images as files, large_binary; other columns as they are."""
    for at, name in enumerate(table.column_names):
        if is_image(features.get(name)):
            table = table.set_column(at, name, files(table.column(name)))
    return table


def files(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """large_binary: the encoded file of each row, null where there is none. Raises DataError for a lost path."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    if pa.types.is_struct(array.type):
        return _of_struct(array)
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return array.cast(FILES)
    return pa.array([None if one is None else _png(one) for one in array.to_pylist()], FILES)


def _of_struct(array: pa.StructArray) -> pa.Array:
    """Bytes where they are held, else what stands at the path."""
    held = array.field("bytes").cast(FILES)
    if not held.null_count and not array.null_count:
        return held
    made = []
    for one in array.to_pylist():
        one = one or {"bytes": None, "path": None}
        made.append(_read(one["path"]) if one["bytes"] is None and one["path"] else one["bytes"])
    return pa.array(made, FILES)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"image {Path(path).name} cannot be read: {error.strerror or error}") from error


def _png(levels: Any) -> bytes:
    """Levels [H, W] or [H, W, C] as a file."""
    try:
        array = np.asarray(levels)
        if array.size and not (array.min() >= 0 and array.max() <= 255):
            raise DataError(f"levels of 0 to 255 expected; an image has {array.min()} to {array.max()}")
        image = pillow().Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[-1:] == (1,) else array)
                                         .astype(np.uint8))  # fmt: skip
    except (TypeError, ValueError) as error:
        raise DataError(f"an image of levels [H, W] or [H, W, 3] expected: {error}") from error
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def _nested(feature: Any) -> int:
    """Lists around whole numbers: 2 of [H, W]; 0 where there is something else in them."""
    depth = 0
    while isinstance(feature, datasets.List | datasets.LargeList | list):
        feature, depth = (feature[0] if isinstance(feature, list) else feature.feature), depth + 1
    whole = isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")
    return depth if whole else 0
