"""A shard as a tar of WebDataset's kind: the files of one sample stand together and share the name before the dot.

    SPLIT-000000012.json             address, scalars, words: numbers and text; NaN is null
    SPLIT-000000012.NAME.npy         every other field, in numpy's own format, without pickle
    SPLIT-000000012.NAME.png         files as they came, by what they are: png, jpg, gif, webp, tiff, bin

The number is the sample_id. Headers hold no time and no owner: equal stores give equal tars.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import schema
from ..codecs import WHOLE_COLUMN, parts_of
from ..mapped import MappedShard
from ..schema import FieldSpec
from ..shard import ShardPlan
from ..strict import check_name
from .columns import Values, chunks, decoded, lengths
from .export_safetensors import as_json

_MAGIC = {
    b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"II*\x00": "tiff", b"MM\x00*": "tiff",
}  # fmt: skip


def write(mapped: MappedShard, shard: ShardPlan, first_row: int, path: Path, raw: bool) -> None:
    """first_row: sample_id of the shard's first row, which with the split names the samples."""
    for spec in mapped.fields:
        if spec.codec != "arrow":  # which is in the JSON
            check_name(spec.name, str(mapped.path))  # a tar's names become paths
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first, last in chunks(mapped):
            columns = [column for spec in mapped.fields for column in _columns(mapped, spec, first, last, raw)]
            for row in range(first, last):
                key = f"{shard.split}-{first_row + row:09d}"
                said: dict[str, Any] = {"split": shard.split, "sample_id": first_row + row}
                for name in schema.ADDRESS_COLUMNS:
                    value = mapped.column(name)[row].as_py()
                    said[name] = value.hex() if isinstance(value, bytes) else value
                files = [(name, data) for column in columns for name, data in column(row - first, said)]
                _add(tar, f"{key}.json", json.dumps(said, ensure_ascii=False).encode())
                for name, data in files:
                    _add(tar, f"{key}.{name}", data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


class _Column:
    """Some rows of one array: into the sample's JSON where a row is a number, else into a file."""

    def __init__(self, name: str, found: Values, shapes: list[tuple[int, ...]] | None, scalar: bool):
        self._name, self._values, self._shapes, self._scalar = name, found.values, shapes, scalar
        self._starts = None if found.sizes is None else np.concatenate([[0], np.cumsum(found.sizes)])

    def __call__(self, row: int, said: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        own = self._values[row] if self._starts is None else self._values[self._starts[row] : self._starts[row + 1]]
        if self._scalar:
            value = own.item()
            said[self._name] = None if isinstance(value, float) and not math.isfinite(value) else value
            return
        file = io.BytesIO()
        np.lib.format.write_array(file, own.reshape(self._shapes[row]) if self._shapes else own, allow_pickle=False)
        yield f"{self._name}.npy", file.getvalue()


class _Object:
    """A carried column, into the sample's JSON; an encoded file, into a file of its kind."""

    def __init__(self, mapped: MappedShard, spec: FieldSpec, first: int):
        self._mapped, self._column, self._spec, self._first = mapped, mapped.checked(spec.name), spec, first

    def __call__(self, row: int, said: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        value = self._column[self._first + row]
        if self._spec.codec == "arrow":
            said[self._spec.name] = json.loads(self._mapped.as_python(self._spec.name, partial(as_json, value)))
        elif data := value.as_py():
            kind = next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "bin")
            yield f"{self._spec.name}.{kind}", data


def _columns(mapped: MappedShard, spec: FieldSpec, first: int, last: int, raw: bool) -> Iterator[_Column | _Object]:
    if spec.codec in WHOLE_COLUMN:
        yield _Object(mapped, spec, first)
        return
    if not raw:
        square = schema.symbols(spec.shape) and not schema.is_list(spec.shape) and not schema.is_ragged(spec.shape)
        shapes = _shapes(mapped, spec, first, last) if square else None
        yield _Column(spec.name, decoded(mapped, spec, first, last), shapes, not spec.shape)
        return
    for part in parts_of(spec):
        values, starts = mapped.part(spec, part)
        name = f"{spec.name}.{part.name}" if part.name else spec.name
        own = values[first:last] if starts is None else values[starts[first] : starts[last]]
        rest = part.shape[1:] if schema.is_list(part.shape) else () if schema.symbols(part.shape) else part.shape
        sizes = None if starts is None else np.diff(starts[first : last + 1])
        shaped = own.reshape(len(own), *(int(size) for size in rest))
        yield _Column(name, Values(shaped, sizes), None, not part.shape)


def _shapes(mapped: MappedShard, spec: FieldSpec, first: int, last: int) -> list[tuple[int, ...]]:
    """Of each row: (H, S, S) in its own numbers."""
    sizes = [
        lengths(mapped, size, first, last) if isinstance(size, str) else np.full(last - first, size)
        for size in spec.shape
    ]
    return [tuple(row) for row in np.stack(sizes, axis=1).tolist()]
