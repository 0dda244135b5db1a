"""A shard as a safetensors file: https://huggingface.co/docs/safetensors, 8 bytes of length, a JSON header, then bytes.

    NAME            fixed rows [N, *shape]; of lists [E, *rest]; of other shapes all values, row after row
    NAME.offsets    int64 [N + 1], where each row begins: in entries of NAME, along its first axis
    NAME.json       uint8, of carried columns: each row's value as JSON, with NAME.json.offsets

bfloat16 is BF16. With raw, codecs of two parts are NAME.values (or NAME.levels) and NAME.scales; packed numbers are
bytes. Sizes are known before anything is decoded, so a column is written a few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .. import schema
from ..codecs import STORED_AS, WHOLE_COLUMN, Part, codec_of, parts_of
from ..mapped import MappedShard
from ..schema import CONTENT_HASH, FieldSpec
from ..shard import ShardPlan
from .columns import chunks, decoded

_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "bool": "BOOL",
}  # fmt: skip


class Tensor(NamedTuple):
    """dtype: of ours. pieces: its bytes, a few rows at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(STORED_AS.get(self.dtype, self.dtype)).itemsize


def write(mapped: MappedShard, shard: ShardPlan, first_row: int, path: Path, raw: bool) -> None:
    """first_row: sample_id of the shard's first row."""
    tensors = list(_tensors(mapped, first_row, raw))
    metadata = {key.decode(): value.decode() for key, value in (mapped.batch.schema.metadata or {}).items()}
    header: dict[str, Any] = {"__metadata__": {**metadata, "predistill.decoded": str(not raw).lower()}}
    begin = 0
    for tensor in sorted(tensors, key=_alignment):  # wide dtypes first, as the format asks for
        header[tensor.name] = {
            "dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.bytes],
        }  # fmt: skip
        begin += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in sorted(tensors, key=_alignment):
            written = sum(file.write(np.ascontiguousarray(piece).data) for piece in tensor.pieces() if piece.size)
            assert written == tensor.bytes, f"{tensor.name}: {tensor.bytes} bytes announced, {written} written"


def _alignment(tensor: Tensor) -> int:
    return -np.dtype(STORED_AS.get(tensor.dtype, tensor.dtype)).itemsize


def _tensors(mapped: MappedShard, first_row: int, raw: bool) -> Iterator[Tensor]:
    rows = mapped.rows
    yield _whole("sample_id", "int64", np.arange(first_row, first_row + rows))
    for name, width in ((schema.SOURCE_INDEX, 8), (schema.VIEW, 4), (CONTENT_HASH, 16)):
        data = np.frombuffer(mapped.column(name).buffers()[1] or b"", np.uint8)[: rows * width]
        kind = {8: "int64", 4: "int32"}.get(width, "uint8")
        yield _whole(name, kind, data.view(kind).reshape((rows, 16) if width == 16 else (rows,)))
    for spec in mapped.fields:
        if spec.codec in WHOLE_COLUMN:
            yield from _objects(mapped, spec)
        elif raw:
            for part in parts_of(spec):
                yield from _part(mapped, spec, part)
        else:
            yield from _decoded(mapped, spec)


def _whole(name: str, dtype: str, values: np.ndarray) -> Tensor:
    return Tensor(name, dtype, values.shape, lambda: iter([values]))


def _part(mapped: MappedShard, spec: FieldSpec, part: Part) -> Iterator[Tensor]:
    """As it is stored: views of the file."""
    values, starts = mapped.part(spec, part)
    name = f"{spec.name}.{part.name}" if part.name else spec.name
    rest = part.shape[1:] if schema.is_list(part.shape) else () if schema.symbols(part.shape) else part.shape
    yield _whole(name, part.dtype, values.reshape(len(values), *(int(size) for size in rest)))
    if starts is not None:
        yield _whole(f"{name}.offsets", "int64", starts)


def _decoded(mapped: MappedShard, spec: FieldSpec) -> Iterator[Tensor]:
    if spec.codec == "dense":
        yield from _part(mapped, spec, parts_of(spec)[0])
        return
    sizes, dtype, rest = [np.zeros(0, np.int64)], "", tuple[int, ...]()
    parts = [mapped.part(spec, part) for part in parts_of(spec)]
    if schema.is_ragged(spec.shape):  # how many values there are is in the counts
        for first, last in chunks(mapped):
            found = decoded(mapped, spec, first, last)
            assert found.sizes is not None
            sizes.append(found.sizes)
    elif parts[0][1] is not None:
        sizes.append(np.diff(parts[0][1]))
    none = codec_of(spec).decode([np.zeros(_empty(part), part.numpy_dtype) for part in parts_of(spec)], spec)
    dtype, listed = none.dtype.name, bool(schema.symbols(spec.shape))
    fixed = spec.shape[1:] if schema.is_list(spec.shape) else () if listed else spec.shape
    rest = tuple(int(size) for size in fixed)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    count = int(starts[-1]) if listed else mapped.rows

    def pieces() -> Iterator[np.ndarray]:
        for first, last in chunks(mapped):
            yield decoded(mapped, spec, first, last).values

    yield Tensor(spec.name, dtype, (count, *rest), pieces)
    if listed:
        yield _whole(f"{spec.name}.offsets", "int64", starts)


def _empty(part: Part) -> tuple[int, ...]:
    """A shape of no rows, as the codec takes it."""
    return (0, *(0 if isinstance(size, str) else size for size in part.shape))


def _objects(mapped: MappedShard, spec: FieldSpec) -> Iterator[Tensor]:
    """Files as bytes; anything else as JSON."""
    column = mapped.checked(spec.name)
    files = spec.codec == "bytes"
    name = spec.name if files else f"{spec.name}.json"

    def texts(first: int, last: int) -> Iterator[bytes]:
        for value in column.slice(first, last - first):
            yield mapped.as_python(spec.name, partial(_file if files else as_json, value))

    sizes = np.asarray([len(one) for first, last in chunks(mapped) for one in texts(first, last)], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def pieces() -> Iterator[np.ndarray]:
        for first, last in chunks(mapped):
            yield np.frombuffer(b"".join(texts(first, last)), np.uint8)

    yield Tensor(name, "uint8", (int(starts[-1]),), pieces)
    yield _whole(f"{name}.offsets", "int64", starts)


def _file(value: pa.Scalar) -> bytes:
    return value.as_py() or b""


def as_json(value: pa.Scalar) -> bytes:
    """A carried value; what JSON has no word for is text, and bytes are hex."""
    return json.dumps(value.as_py(), ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
