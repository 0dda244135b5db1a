"""How values become bytes: encode beside decode, and the size beside both.

A codec turns values [N, *entry] into *parts*, each an array with a shape and a dtype of its own, and back.
Parts are stored and gathered separately; decoding works on padded batches, where padding is zero.

    codec    parts                                          bytes a value
    dense    the values                                     4, 2 or 1: that of the dtype
    int8     values int8, scales float32, one a block        1 + 4/128 = 1.031 (last axis a multiple of 128)
    uint8    levels uint8, scales float32, one a position    1 + 4/K for K values, none above zero
    bitpack  whole numbers below 2**bits, packed             bits/8
    bytes    one binary a row                                what came + 8
    arrow    any Arrow column, as it came                    what Arrow takes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import ConfigError, DataError
from .schema import ARROW_TYPES, LARGEST_ENTRY, LOGITS, FieldSpec, entry_width, is_list, is_ragged, symbols
from .strict import shown

_BLOCK = 1 << 18  # values looked at together: 512 KB stay in the cache
INT8_BLOCK = 128  # values that share a scale
ROUNDING = 2.0**-22  # of a scale, its inverse, a level's place and the product, 2**-24 each, of the largest value

STORED_AS = {"bfloat16": "uint16", "bool": "uint8"}  # numpy has no bfloat16
LIMITS = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}


class Part(NamedTuple):
    """One stored array of a field: its name inside the column ("" alone), the shape of a row, its dtype.

    bits: where the shape ends in "K", bits of one kept entry, of which a position's share is whole bytes.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    bits: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(STORED_AS.get(self.dtype, self.dtype))

    @property
    def entry_bytes(self) -> int:
        return entry_width(self.shape) * self.numpy_dtype.itemsize

    def sizes(self, counts: Any) -> Any:
        """Stored values of positions that keep `counts` entries: the counts, or the bytes that their bits take."""
        return -(-counts * self.bits // 8) if self.bits else counts


class Codec(NamedTuple):
    """parts(spec); encode(values [..., *row shape], spec) -> arrays; decode(arrays, spec) -> values."""

    parts: Callable[[FieldSpec], tuple[Part, ...]]
    encode: Callable[[np.ndarray, FieldSpec], tuple[np.ndarray, ...]]
    decode: Callable[[Sequence[np.ndarray], FieldSpec], np.ndarray]


# dense: the values themselves


def dense_parts(spec: FieldSpec) -> tuple[Part, ...]:
    return (Part("", spec.shape, spec.dtype),)


def dense_encode(values: np.ndarray, spec: FieldSpec) -> tuple[np.ndarray, ...]:
    if spec.dtype == "bfloat16":
        return (float32_to_bfloat16(values),)
    return (np.ascontiguousarray(values).astype(STORED_AS.get(spec.dtype, spec.dtype), copy=False),)


def dense_decode(parts: Sequence[np.ndarray], spec: FieldSpec) -> np.ndarray:
    if spec.dtype == "bfloat16":
        return bfloat16_to_float32(parts[0])
    return parts[0].view(np.bool_) if spec.dtype == "bool" else parts[0]


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, as uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# int8: blocks of 128 along the last axis (all of it where its size differs by row), one float32 scale each


def int8_parts(spec: FieldSpec) -> tuple[Part, ...]:
    if not spec.shape:
        raise ConfigError(f"field {spec.name}: int8 needs an axis to share a scale along; a row here is a scalar")
    *outer, last = spec.shape
    blocks = () if isinstance(last, str) else (math.ceil(last / INT8_BLOCK),)
    return Part("values", spec.shape, "int8"), Part("scales", (*outer, *blocks), "float32")


def int8_encode(values: np.ndarray, spec: FieldSpec) -> tuple[np.ndarray, ...]:
    """Nearest of 255 levels symmetric about zero: |error| <= scale/2 = max|block| / 254, and ROUNDING of max|block|."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not values.size:
        outer, blocks = (
            values.shape[:-1],
            () if isinstance(spec.shape[-1], str) else (math.ceil(spec.shape[-1] / INT8_BLOCK),),
        )
        return values.astype(np.int8), np.zeros((*outer, *blocks), np.float32)
    block = _int8_block(spec, values.shape[-1])
    starts = np.arange(0, values.shape[-1], block)
    scales = np.maximum.reduceat(np.abs(values), starts, axis=-1) / np.float32(127)
    normal = scales > np.finfo(np.float32).tiny  # a block of less, with subnormal scales, is stored as zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=normal)
    levels = np.rint(values * _spread(inverse, block, values.shape[-1])).clip(-127, 127).astype(np.int8)
    return levels, scales[..., 0] if isinstance(spec.shape[-1], str) else scales


def int8_decode(parts: Sequence[np.ndarray], spec: FieldSpec) -> np.ndarray:
    levels, scales = parts
    block = _int8_block(spec, levels.shape[-1])
    scales = scales[..., None] if isinstance(spec.shape[-1], str) else scales
    with np.errstate(invalid="ignore", over="ignore"):  # a stranger's scales
        return levels.astype(np.float32) * _spread(scales, block, levels.shape[-1])


def _int8_block(spec: FieldSpec, size: int) -> int:
    return max(size, 1) if isinstance(spec.shape[-1], str) else min(INT8_BLOCK, size)


def _spread(scales: np.ndarray, block: int, size: int) -> np.ndarray:
    """[..., blocks] -> [..., size]; one block broadcasts."""
    return scales if scales.shape[-1] == 1 else np.repeat(scales, block, axis=-1)[..., :size]


# uint8: values none of which is above zero, as 255 levels down to the least of their position


def uint8_parts(spec: FieldSpec) -> tuple[Part, ...]:
    if not spec.shape:
        raise ConfigError(f"field {spec.name}: uint8 needs an axis to share a scale along; a row here is a scalar")
    return Part("levels", spec.shape, "uint8"), Part("scales", spec.shape[:-1], "float32")


def uint8_encode(values: np.ndarray, spec: FieldSpec) -> tuple[np.ndarray, ...]:
    """Nearest of 256 levels from zero down: |error| <= scale/2 = |least| / 510, and ROUNDING of |least|.

    Raises DataError above zero.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not values.size:
        return values.astype(np.uint8), np.zeros(values.shape[:-1], np.float32)
    if values.max() > 0:
        raise DataError(f"field {spec.name}: uint8 holds values up to 0; got {values.max():.6g}")
    scales = values.min(axis=-1) / np.float32(-255)
    inverse = np.divide(-1, scales, out=np.zeros_like(scales), where=scales > np.finfo(np.float32).tiny)
    return np.rint(values * inverse[..., None]).astype(np.uint8), scales


def uint8_decode(parts: Sequence[np.ndarray], spec: FieldSpec) -> np.ndarray:
    levels, scales = parts
    with np.errstate(invalid="ignore", over="ignore"):
        return levels * -scales[..., None]


# bitpack: whole numbers in `bits` bits each, most significant bit first, every entry starting on a byte


def bitpack_parts(spec: FieldSpec) -> tuple[Part, ...]:
    bits = _bits(spec)
    *outer, count = spec.shape or ("",)
    if count == "K":
        return (Part("", spec.shape, "uint8", bits),)
    if not isinstance(count, int):
        raise ConfigError(f"field {spec.name}: bitpack needs a fixed last axis, or K; got shape {shown(spec.shape)}")
    return (Part("", (*outer, math.ceil(count * bits / 8)), "uint8"),)


def bitpack_encode(values: np.ndarray, spec: FieldSpec) -> tuple[np.ndarray, ...]:
    bits = _bits(spec)
    if values.size and not (values.min() >= 0 and values.max() < 2**bits):
        raise DataError(f"field {spec.name}: values below 2**{bits} fit; got {values.min()} to {values.max()}")
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    stream = (values.astype(np.uint32)[..., None] >> shifts).astype(np.uint8) & 1
    return (np.packbits(stream.reshape(*values.shape[:-1], -1), axis=-1),)


def bitpack_decode(parts: Sequence[np.ndarray], spec: FieldSpec) -> np.ndarray:
    """Eight values fill `bits` bytes, so every eighth lies at one bit of one byte of such a group: a big-endian window
    over strided memory reads them all, 32 bits wide where they hold a value at any bit of its first byte."""
    bits, packed = _bits(spec), np.ascontiguousarray(parts[0])
    *outer, size = packed.shape
    count = spec.shape[-1] if isinstance(spec.shape[-1], int) else size * 8 // bits
    window = np.dtype(">u4" if bits + 7 <= 32 else ">u8")
    memory = np.empty(packed.size + window.itemsize, np.uint8)  # a window may begin in the last byte
    memory[: packed.size] = packed.reshape(-1)
    entries = math.prod(outer)
    out = np.empty((entries, count), spec.dtype)
    for lane in range(min(8, count) if entries else 0):
        shape, (byte, bit) = (entries, -(-(count - lane) // 8)), divmod(lane * bits, 8)
        windows = np.ndarray(shape, window, memory, byte, (size, bits)).astype(window.newbyteorder("="))
        windows >>= window.itemsize * 8 - bits - bit
        windows &= 2**bits - 1
        out[:, lane::8] = windows
    return out.reshape(*outer, count)


def _bits(spec: FieldSpec) -> int:
    bits = spec.parameters.get("bits")
    if type(bits) is not int or not 1 <= bits <= 32:
        raise ConfigError(f"field {spec.name}: bitpack takes bits from 1 to 32; got {shown(bits)}")
    return bits


CODECS: dict[str, Codec] = {
    "dense": Codec(dense_parts, dense_encode, dense_decode),
    "int8": Codec(int8_parts, int8_encode, int8_decode),
    "uint8": Codec(uint8_parts, uint8_encode, uint8_decode),
    "bitpack": Codec(bitpack_parts, bitpack_encode, bitpack_decode),
}
WHOLE_COLUMN = ("bytes", "arrow")  # codecs that Arrow itself holds: not numbers, so nothing to encode


def codec_of(spec: FieldSpec) -> Codec:
    if spec.codec not in CODECS:
        known = ", ".join([*CODECS, *WHOLE_COLUMN])
        raise ConfigError(f"field {spec.name}: codec is one of {known}; got {shown(spec.codec)}")
    return CODECS[spec.codec]


def parts_of(spec: FieldSpec) -> tuple[Part, ...]:
    return codec_of(spec).parts(spec)


def check_field(spec: FieldSpec) -> None:
    """Raises ConfigError where such a column cannot be stored, or read: its codec, shape, dtype and pad disagree."""
    pad, whole = spec.pad, spec.codec in WHOLE_COLUMN
    if not (type(pad) is int or (type(pad) is float and math.isfinite(pad))):
        raise ConfigError(f"field {spec.name}: pad is a finite number; got {shown(pad)}")
    if whole and spec.shape:
        raise ConfigError(f"field {spec.name}: {spec.codec} takes no shape; got {shown(spec.shape)}")
    parts = () if whole else parts_of(spec)
    if any(entry_width(part.shape) >= LARGEST_ENTRY for part in parts):
        raise ConfigError(f"field {spec.name}: fewer than {LARGEST_ENTRY} bytes expected; got {shown(spec.shape)}")
    if spec.codec == "bitpack" and "int" not in spec.dtype:
        raise ConfigError(f"field {spec.name}: bitpack gives whole numbers; got dtype {spec.dtype}")
    padded = [] if whole else [np.dtype("float32" if spec.dtype == "bfloat16" or len(parts) > 1 else spec.dtype)]
    padded += [part.numpy_dtype for part in parts if len(parts) == 1 and is_list(part.shape)]  # before it is decoded
    for dtype in padded:
        low, high = _range(dtype)
        if not low <= pad <= high:
            raise ConfigError(f"field {spec.name}: a pad from {low} to {high}, as {dtype} has it; got {shown(pad)}")


def _range(dtype: np.dtype) -> tuple[float, float]:
    """The least and the largest value that it holds."""
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)


def stored_parts(spec: FieldSpec) -> tuple[str, ...]:
    """What a batch calls the parts of a field that it holds as they are stored; none where they are the values.

    `<column>.values` int8 and `<column>.scales` float32 of int8, `<column>.bits` uint16 of bfloat16. A reader of such
    a batch decodes where it computes, on a GPU for one, so that fewer bytes travel.
    """
    if any(size in ("P", "K") for size in spec.shape):
        return ()
    if spec.codec == "int8":
        return tuple(f"{spec.name}.{part.name}" for part in parts_of(spec))
    return (f"{spec.name}.bits",) if (spec.codec, spec.dtype) == ("dense", "bfloat16") else ()


def bytes_per_row(fields: Sequence[FieldSpec], lengths: Mapping[str, float]) -> float:
    """Bytes of one row with these lengths ({"S": 27.5}), starts included; whole-column codecs count as zero.

    Lengths may be means over many rows; (H, "S", "S") takes "SS", the mean of S², where it is given.
    """
    total = 8 + 4 + 16.0  # source_index, view, content_hash
    for spec in fields:
        for part in parts_of(spec) if spec.codec not in WHOLE_COLUMN else ():
            total += part.entry_bytes * _entries(part, lengths) + (8 if symbols(part.shape) else 0)
    return total


def _entries(part: Part, lengths: Mapping[str, float]) -> float:
    if not symbols(part.shape):
        return 1
    if is_ragged(part.shape):
        return lengths.get(str(part.shape[0]), 0) * part.sizes(lengths.get("K", 0))
    sizes = part.shape[:1] if is_list(part.shape) else part.shape
    fixed = math.prod(size for size in sizes if not isinstance(size, str))
    varying = symbols(sizes)
    return fixed * lengths.get("".join(varying), math.prod(lengths.get(size, 0) for size in varying))


def check_values(values: np.ndarray, spec: FieldSpec, row_of: Callable[[int], Any]) -> None:
    """Raises DataError where the field cannot hold `values` [N, ...]: NaN, infinity or overflow, naming the row.

    row_of(n) tells which source row entry n belongs to. Labels and summaries may hold NaN: it means "missing".
    """
    if values.dtype.kind != "f" or spec.role not in ("teacher", "input"):
        return
    limit = LIMITS.get(spec.dtype, math.inf) if spec.codec == "dense" else LIMITS["float32"]
    if _peak(values) <= limit:  # False for NaN too
        return
    bad = ~(np.abs(values.reshape(len(values), -1)) <= limit).all(axis=1)
    row, worst = row_of(int(bad.argmax())), values.reshape(len(values), -1)[bad.argmax()]
    worst = worst[~(np.abs(worst) <= limit)][0]
    if not np.isfinite(worst):
        raise DataError(
            f"field {spec.name}: the teacher gave {worst} at source row {row}: look at that row, "
            "and at the teacher's own dtype (float16 teachers overflow; bfloat16 or float32 ones do not)"
        )
    holds = "float32" if spec.dtype == "bfloat16" or abs(worst) > LIMITS["bfloat16"] else "bfloat16 or float32"
    holds += "" if spec.name == LOGITS else ", or int8"
    raise DataError(
        f"field {spec.name}: {worst:.6g} at source row {row} is more than {spec.dtype} holds "
        f"({limit:.6g}): dump with --dtype {holds}"
    )


def _peak(values: np.ndarray) -> float:
    """max |values|, NaN where one is NaN, without a copy; half precision by its bits, which is 25 times faster."""
    if not values.size:
        return 0.0
    if values.dtype != np.float16:
        return max(float(values.max()), -float(values.min()))
    flat, highest = np.ascontiguousarray(values).view(np.uint16).reshape(-1), 0
    for start in range(0, flat.size, _BLOCK):
        highest = max(highest, int((flat[start : start + _BLOCK] & 0x7FFF).max()))
    return float(np.uint16(highest).view(np.float16))


assert set(STORED_AS) < set(ARROW_TYPES)
