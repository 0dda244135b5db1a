"""DistillKit's captures: log-probabilities as some exact values and a polynomial, ids as a stream of bits.

Written from arcee-ai/DistillKit: sample_logits_vllm.py (columns input_ids, compressed_logprobs, bytepacked_indices, and
compression_config.yaml beside them), compression/{config,monotonic_logprobs,bitpack}.py; and compression/legacy.py for
the older packed_indices, exact_values, coeffs. Entry s, by vLLM's prompt_logprobs without their first, is of the token
after token s.

A position's bytes, little-endian: exact_k values of exact_dtype; the coefficients, one a term, in term_dtype; for each
bin of residuals a scale and num_elements numbers of element_bits bits, most significant first, padded to bytes. With
t = 0, 1, … over the other k - exact_k values (0 to 1 with normalize_t), each is Σ coefficient · term(t) + residual;
with delta_encoding all of them are differences to the one before.

S tokens, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...store.codecs import bfloat16_to_float32, bitpack_decode
from ...store.errors import ConfigError
from ...store.schema import INPUT_IDS, FieldSpec
from .config import NEXT
from .numbers import Unfit, nested_numbers, whole_numbers
from .rows import Rules, Said, aligned, check_tokens
from .topk import labels_of

LOGPROBS, INDICES = "compressed_logprobs", "bytepacked_indices"
PACKED, EXACT, COEFFICIENTS = "packed_indices", "exact_values", "coeffs"
CONFIG_FILE = "compression_config.yaml"
MOST_MASS = 1.25  # the polynomial is fitted to log-probabilities, whose sum it does not keep
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}
_MOST = 2**16  # entries a position


class Bin(NamedTuple):
    """Residuals of `size` values in `bits` bits each."""

    dtype: str
    bits: int
    size: int


@dataclass(frozen=True)
class Compression:
    """What compression_config.yaml says. vocabulary: its d; terms: of the polynomial, powers or names."""

    vocabulary: int
    k: int
    exact_k: int
    exact_dtype: str
    terms: tuple[int | str, ...]
    term_dtype: str
    bins: tuple[Bin, ...]
    delta: bool
    normalized: bool

    @property
    def bits(self) -> int:
        """Of an id."""
        return math.ceil(math.log2(self.vocabulary))

    @property
    def size(self) -> int:
        """Bytes of a position's values."""
        residuals = sum(_WIDTHS[one.dtype] + -(-one.bits * one.size // 8) for one in self.bins)
        return self.exact_k * _WIDTHS[self.exact_dtype] + len(self.terms) * _WIDTHS[self.term_dtype] + residuals


def load_compression(path: Path) -> Compression | Legacy:
    """Raises ConfigError for a file that is none."""
    import yaml

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    for name in ("teacher", "logprob_compressor", "legacy_logit_compression"):  # as in a run's own file
        said = said[name] if isinstance(said, Mapping) and isinstance(said.get(name), Mapping) else said
    try:
        return _legacy(said) if "polynomial_degree" in said else _compression(said)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: the settings of DistillKit's logprob_compressor expected; {type(error).__name__}: {error}"
        ) from error


def _compression(said: Mapping[str, Any]) -> Compression:
    terms = tuple(said.get("polynomial_terms") or ())
    bins = tuple(
        Bin(_dtype(one["scale_dtype"]), _count(one["element_bits"], 32), _count(one["num_elements"]))
        for one in said.get("residual_bins") or ()
    )
    made = Compression(
        _count(said["d"], 2**31), _count(said["k"]), _count(said["exact_k"], least=0),
        _dtype(said.get("exact_dtype", "float32")), terms, _dtype(said.get("term_dtype", "float32")), bins,
        bool(said.get("delta_encoding", True)), bool(said.get("normalize_t", False)),
    )  # fmt: skip
    if not all(term in _TERMS or (type(term) is int and 0 <= term < 64) for term in terms):
        raise ValueError(f"polynomial_terms are powers, sqrt and exp; got {list(terms)}")
    if made.exact_k > made.k or sum(one.size for one in bins) > made.k - made.exact_k:
        raise ValueError("exact_k and the bins have at most k values together")
    return made


def decompressed(packed: np.ndarray, said: Compression) -> np.ndarray:
    """uint8 [S, size] -> float64 [S, K]. Raises Unfit for another size."""
    if packed.shape[1] != said.size:
        raise Unfit(f"{LOGPROBS} of {said.size} bytes a position expected, by the YAML file; got {packed.shape[1]}")
    stream = _Stream(packed)
    exact = stream.floats(said.exact_dtype, said.exact_k)
    rest = np.zeros((len(packed), said.k - said.exact_k))
    if said.terms:
        coefficients = stream.floats(said.term_dtype, len(said.terms))
        rest += _sum(coefficients, _polynomial(said.terms, rest.shape[1], said.normalized))
    start = 0
    for one in said.bins:
        scale, levels = stream.floats(one.dtype, 1), stream.integers(one.bits, one.size)
        centred = levels * 2.0 - 1 if one.bits == 1 else levels - 2.0 ** (one.bits - 1)
        rest[:, start : start + one.size] += centred * scale
        start += one.size
    values = np.concatenate([exact, rest], axis=1)
    return values.cumsum(axis=1) if said.delta else values


def _polynomial(terms: Sequence[int | str], size: int, normalized: bool) -> np.ndarray:
    """[size, terms]"""
    t = np.linspace(0, 1, size) if normalized else np.arange(size, dtype=np.float64)
    with np.errstate(over="ignore"):  # powers that no finite coefficient has
        return np.stack([t**term if isinstance(term, int) else _TERMS[term](t) for term in terms], axis=1)


def _sum(coefficients: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """[S, n] and [K, n] -> [S, K], term by term: a product of matrices may round by the number of threads."""
    made = np.zeros((len(coefficients), len(terms)))
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(terms.shape[1]):
            made += coefficients[:, at : at + 1] * terms[:, at]
    return made


class _Stream:
    """The bytes of all positions, uint8 [S, bytes], taken from the front."""

    def __init__(self, packed: np.ndarray):
        self._packed, self._at = packed, 0

    def _take(self, size: int) -> np.ndarray:
        found = np.ascontiguousarray(self._packed[:, self._at : self._at + size])
        self._at += size
        return found

    def floats(self, dtype: str, count: int) -> np.ndarray:
        """float64 [S, count]"""
        taken = self._take(count * _WIDTHS[dtype])
        if dtype == "bfloat16":
            return bfloat16_to_float32(taken.view("<u2")).astype(np.float64)
        return taken.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)

    def integers(self, bits: int, count: int) -> np.ndarray:
        """float64 [S, count]"""
        return _unpacked(self._take(-(-bits * count // 8)), bits, count).astype(np.float64)


def _unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [S, bytes] -> int64 [S, count]: the store's own packing. Raises Unfit where there are too few bytes."""
    size = -(-bits * count // 8)
    if packed.shape[1] < size:
        raise Unfit(f"{count} numbers of {bits} bits take {size} bytes; got {packed.shape[1]}")
    spec = FieldSpec("packed", (count,), "int64", "bitpack", parameters={"bits": bits})
    return bitpack_decode([packed[:, :size]], spec)


class DistillKit(NamedTuple):
    """Reads rows of the present form."""

    said: Compression
    labels: str
    rules: Rules
    columns: tuple[str, ...] = (INPUT_IDS, LOGPROBS, INDICES, "labels")

    def read(self, row: dict[str, Any]) -> Said:
        """Raises Unfit."""
        values = decompressed(_bytes(row, LOGPROBS), self.said)
        ids = _unpacked(_bytes(row, INDICES), self.said.bits, self.said.k).astype(np.int64)
        return _said(row, ids, values, self.labels, self.rules)


@dataclass(frozen=True)
class Legacy:
    """The settings of the older form: exact_k values, and coefficients of powers of t = 1, 2, … for the others."""

    vocabulary: int
    k: int
    exact_k: int
    degree: int
    inverted: bool
    with_sqrt: bool

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(self.vocabulary))

    def terms(self) -> np.ndarray:
        """[k - exact_k, coefficients]"""
        t = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        powers = [t ** (-power if self.inverted else power) for power in range(self.degree + 1)]
        return np.stack([*powers, *([np.sqrt(t)] if self.with_sqrt else [])], axis=1)


def _legacy(said: Mapping[str, Any]) -> Legacy:
    made = Legacy(
        _count(said["vocab_size"], 2**31), _count(said["k"]), _count(said["exact_k"], least=0),
        _count(said["polynomial_degree"], 64, least=0), bool(said.get("invert_polynomial", True)),
        bool(said.get("with_sqrt_term", False)),
    )  # fmt: skip
    if made.exact_k > made.k:
        raise ValueError("exact_k is at most k")
    return made


class LegacyDistillKit(NamedTuple):
    """Reads rows of the older form: ids in words of 64 bits, as many as fit, the first in the lowest bits."""

    said: Legacy
    labels: str
    rules: Rules
    columns: tuple[str, ...] = (INPUT_IDS, PACKED, EXACT, COEFFICIENTS, "labels")

    def read(self, row: dict[str, Any]) -> Said:
        """Raises Unfit."""
        packed, exact = _table(row, PACKED, np.int64).view(np.uint64), _table(row, EXACT, np.float64)
        said, values = self.said, exact
        if exact.shape[1] != said.exact_k:
            raise Unfit(f"{EXACT}: {said.exact_k} a position expected, by the YAML file; got {exact.shape[1]}")
        if said.exact_k < said.k:
            coefficients, terms = _table(row, COEFFICIENTS, np.float64), said.terms()
            if coefficients.shape != (len(exact), terms.shape[1]):
                raise Unfit(f"{COEFFICIENTS}: {terms.shape[1]} a position expected; got {list(coefficients.shape)}")
            values = np.concatenate([exact, _sum(coefficients, terms)], axis=1)
        each = 64 // said.bits
        if packed.shape != (len(exact), -(-said.k // each)):
            raise Unfit(f"{PACKED}: {-(-said.k // each)} words a position expected; got {list(packed.shape)}")
        shifts = np.arange(each, dtype=np.uint64) * np.uint64(said.bits)
        ids = (packed[:, :, None] >> shifts) & np.uint64(2**said.bits - 1)
        return _said(row, ids.reshape(len(ids), -1)[:, : said.k].astype(np.int64), values, self.labels, self.rules)


def _said(row: dict[str, Any], ids: np.ndarray, values: np.ndarray, labels: str, rules: Rules) -> Said:
    """ids, values: [S or S - 1, K]."""
    if row.get(INPUT_IDS) is None:
        raise Unfit(f"column {INPUT_IDS!r} expected; it is null")
    tokens = whole_numbers(row[INPUT_IDS], INPUT_IDS)
    check_tokens(tokens, rules.vocabulary)
    if len(ids) != len(values):
        raise Unfit(f"ids and values of as many positions expected; got {len(ids)} and {len(values)}")
    counts, _ = aligned(np.full(len(ids), ids.shape[1], np.int64), len(tokens), NEXT)
    return Said(tokens, labels_of(row, labels, tokens), counts, ids.reshape(-1), values.reshape(-1))


def _bytes(row: dict[str, Any], name: str) -> np.ndarray:
    """uint8 [S, bytes]"""
    found = _table(row, name, np.int64)
    if found.size and (found.min() < 0 or found.max() > 255):
        raise Unfit(f"{name}: bytes expected; got {found.min()} to {found.max()}")
    return found.astype(np.uint8)


def _table(row: dict[str, Any], name: str, dtype: Any) -> np.ndarray:
    if row.get(name) is None:
        raise Unfit(f"column {name!r} expected; it is null")
    found = nested_numbers(row[name], name)
    if dtype is np.int64 and found.flat.dtype != np.int64 and len(found.flat):
        raise Unfit(f"{name}: whole numbers expected")
    return found.dense().astype(dtype)


def _count(value: Any, most: int = _MOST, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a whole number from {least} to {most} expected; got {value!r}")
    return value


def _dtype(value: Any) -> str:
    if value not in _WIDTHS:
        raise ValueError(f"one of {', '.join(_WIDTHS)} expected; got {value!r}")
    return str(value)
