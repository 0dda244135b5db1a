"""What a column is: its name, the shape of a row, its dtype and its codec; and the Arrow type that holds it.

Shapes are those of one row. A number is a fixed size; a symbol is a size that differs from row to row:

    "S"   tokens: as many as the row has `input_ids`
    "P"   stored positions: as many as the row has entries in its positions column
    "K"   kept entries: a number that differs from position to position, in the column that parameters["counts"] names
    "*"   a length of the field's own

    ()           a scalar a row                 float32
    (C,)         sample-level, C values          fixed_size_list<float16>[C]
    (C, H, W)    a feature map                   fixed_size_list<float16>[C*H*W], row-major
    ("S",)       one value a token               large_list<int32>
    ("S", D)     D values a token                large_list<fixed_size_list<float16>[D]>
    ("S", "K")   as many as each token has       large_list<float16>, the entries of one token after another's
    (H, "S", "S") anything else                  large_list<float16>, row-major

A field is stored in one or more *parts* (codecs.py says which). A field of one part is that array; a field of
several parts is an Arrow struct of them. Entry s of a token-level field is the teacher's output at input
position s, unshifted, as transformers gives it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from .errors import ConfigError, FormatVersionError, StoreCorrupt
from .strict import reason, shown

FORMAT_VERSION = 1
MISSING_LABEL = -100  # what transformers' losses ignore

INPUT_IDS = "input_ids"
TOKEN_TYPES = "token_type_ids"
ATTENTION_MASK = "attention_mask"  # never stored: rows are unpadded, so readers make it from lengths
LABELS = "labels"
LOGITS = "teacher_logits"
TOP_K_LOGITS = "teacher_top_k_logits"
TOP_K_INDICES = "teacher_top_k_indices"
TOP_K_COUNTS = "teacher_top_k_counts"  # entries of each position, where they differ
SAMPLE_INDICES = "teacher_sample_indices"
SAMPLE_COUNTS = "teacher_sample_counts"  # draws of each id
SAMPLE_RATIOS = "teacher_sample_ratios"  # teacher's probability over the one drawn from
SAMPLE_SIZES = "teacher_sample_sizes"  # different ids at each position
LOGSUMEXP = "teacher_logsumexp"
LABEL_LOGPROBS = "teacher_label_logprobs"
POSITIONS = "teacher_positions"  # input positions of fields with shape ("P", ...)
POSITION_IDS = "position_ids"  # of packed rows: 0 where a document begins
WORD_IDS = "word_ids"  # of rows of words: the word that each token is of
NO_WORD = -1
START_POSITIONS = "start_positions"  # of questions: the token that the answer begins at, and ends at; 0 is none
END_POSITIONS = "end_positions"
START_LOGITS = "teacher_start_logits"
END_LOGITS = "teacher_end_logits"
OFFSETS = "offsets"  # the characters of a context that each token stands for
OUTSIDE = -1  # offsets of tokens that are not of the context
TOKENS = "tokens"  # the words of a row, as `datasets` calls them

SOURCE_INDEX = "source_index"
VIEW = "view"
CONTENT_HASH = "content_hash"
ADDRESS_COLUMNS = {  # written into every shard, before the fields
    SOURCE_INDEX: pa.int64(),
    VIEW: pa.int32(),
    CONTENT_HASH: pa.binary(16),
}

SYMBOLS = ("S", "P", "K", "*")
ROLES = ("input", "label", "teacher", "summary", "carried")
MOST_SIZES = 16  # of a shape; numpy takes 64 axes
LARGEST_ENTRY = 2**31  # values that Arrow takes in a list of fixed size, and one more
LONGEST_NAME = 1000  # characters of a column's name
_CONTROL = re.compile(r"[\x00-\x1f\x7f]").search
_LAYERED = ("hidden_states", "attentions", "attention_scores", "queries", "keys", "values")

# dtype of a field -> Arrow type that stores it (bfloat16 as its 16 bits, bool as a byte)
ARROW_TYPES: dict[str, pa.DataType] = {
    "float64": pa.float64(),
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "int16": pa.int16(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "bool": pa.uint8(),
}


def layer_column(kind: str, layer: int) -> str:
    """Column name of one layer: `layer_column("hidden_states", 6)` is `teacher_hidden_states_06`."""
    if kind not in _LAYERED:
        raise ConfigError(f"a field with layers is one of {', '.join(_LAYERED)}; got {kind!r}")
    return f"teacher_{kind}_{layer:02d}"


def logsumexp_column(temperature: float) -> str:
    """Column of log sum exp(z / T): `logsumexp_column(2)` is `teacher_logsumexp_at_2`, at 1 `teacher_logsumexp`."""
    return LOGSUMEXP if temperature == 1 else f"{LOGSUMEXP}_at_{temperature:g}"


@dataclass(frozen=True)
class FieldSpec:
    """One column of a store.

    name: column name, the same from the Arrow schema to the loss.
    shape: shape of one row (see the head of this file).
    dtype: what a reader gets back, except bfloat16 and int8-coded fields, which read back as float32.
    codec: "dense", "int8", "uint8", "bitpack", "bytes" (encoded files, one a row) or "arrow" (carried as it came).
    role: "input", "label", "teacher", "summary" (copied into the index) or "carried".
    pad: what a padded batch holds past a row's own length, or past a position's own entries.
    parameters: {"bits": 17} for bitpack; {"counts": column} where the shape has a "K"; and what else is worth knowing.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    codec: str = "dense"
    role: str = "teacher"
    pad: float = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (type(self.name) is str and len(self.name) <= LONGEST_NAME and not _CONTROL(self.name)):
            raise ConfigError(
                f"a field's name is a string of at most {LONGEST_NAME} characters, without control characters; got "
                f"{shown(self.name)}"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.role not in ROLES:
            raise ConfigError(f"field {self.name}: role is one of {', '.join(ROLES)}; got {shown(self.role)}")
        if not (isinstance(self.parameters, Mapping) and type(self.codec) is type(self.dtype) is str):
            raise ConfigError(
                f"field {self.name}: codec and dtype are strings and parameters an object; got {shown(self.codec)}, "
                f"{shown(self.dtype)}, {shown(self.parameters)}"
            )
        if "K" in self.shape and (
            not is_ragged(self.shape) or type(self.parameters.get("counts")) is not str or self.codec == "int8"
        ):
            raise ConfigError(
                f'field {self.name}: "K" comes last, after "S" or "P", with parameters["counts"] the column of '
                f"counts, in another codec than int8; got shape {shown(self.shape)}, {shown(self.codec)}, "
                f"{shown(self.parameters)}"
            )
        for size in self.shape:
            if not (size in SYMBOLS or (type(size) is int and 0 < size < LARGEST_ENTRY)):
                raise ConfigError(
                    f"field {self.name}: a size is a positive int or one of S, P, K, *; got {shown(size)}"
                )
        if len(self.shape) > MOST_SIZES or math.prod(s for s in self.shape if type(s) is int) >= LARGEST_ENTRY:
            raise ConfigError(
                f"field {self.name}: at most {MOST_SIZES} sizes, and fewer than {LARGEST_ENTRY} values of fixed sizes, "
                f"expected; got shape {shown(self.shape)}"
            )
        if self.codec != "arrow" and self.codec != "bytes" and self.dtype not in ARROW_TYPES:
            raise ConfigError(f"field {self.name}: dtype is one of {', '.join(ARROW_TYPES)}; got {shown(self.dtype)}")

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "parameters": dict(self.parameters)}

    @classmethod
    def from_json(cls, data: Any, where: str = "a shard") -> FieldSpec:
        """Raises StoreCorrupt, also where the codec does not take such a field."""
        from .codecs import check_field

        try:
            if type(data["shape"]) is not list or type(data.get("parameters", {})) is not dict:
                raise TypeError("its shape is a list and its parameters are an object")
            made = cls(**data)
            check_field(made)
            return made
        except (TypeError, KeyError, AttributeError, ConfigError) as error:
            raise StoreCorrupt(f"{where}: field description {shown(data)} cannot be read: {reason(error)}") from error


def symbols(shape: Sequence[int | str]) -> list[str]:
    return [size for size in shape if isinstance(size, str)]


def is_list(shape: Sequence[int | str]) -> bool:
    """A leading symbol over fixed sizes: stored as a list of entries."""
    return len(shape) > 0 and isinstance(shape[0], str) and not symbols(shape[1:])


def is_ragged(shape: Sequence[int | str]) -> bool:
    """("S", "K") or ("P", "K"): entries that differ in number from position to position."""
    return len(shape) == 2 and shape[0] in ("S", "P") and shape[1] == "K"


def entry_width(shape: Sequence[int | str]) -> int:
    """Stored values an entry: C*H*W for a fixed row, D for ("S", D), 1 for (H, "S", "S")."""
    sizes = shape[1:] if is_list(shape) else shape
    return math.prod(sizes) if not symbols(sizes) else 1  # type: ignore[arg-type]


def entries_per_row(shape: Sequence[int | str], lengths: Mapping[str, Any]) -> Any:
    """Entries of each row: 1 for a fixed row, S for ("S", D), H*S*S for (H, "S", "S"); lengths may be arrays."""
    if is_list(shape):
        return lengths[str(shape[0])]
    if not symbols(shape):
        return 1
    return math.prod(lengths[size] if isinstance(size, str) else size for size in shape)


def array_type(shape: Sequence[int | str], dtype: str) -> pa.DataType:
    """The Arrow type of one part."""
    value, width = ARROW_TYPES[dtype], entry_width(shape)
    scalar_entry = is_list(shape) and len(shape) == 1 or not shape or bool(symbols(shape) and not is_list(shape))
    entry = value if scalar_entry else pa.list_(pa.field("item", value, nullable=False), width)
    if not symbols(shape):
        return entry
    return pa.large_list(pa.field("item", entry, nullable=False))


def metadata(fields: Sequence[FieldSpec], shard: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """What every shard says of itself. No time, host, path or rank: equal rows give equal bytes."""
    return {
        "predistill.format_version": str(FORMAT_VERSION),
        "predistill.fields": json.dumps([spec.to_json() for spec in fields], sort_keys=True),
        "predistill.shard": json.dumps(shard, sort_keys=True),
        "predistill.fingerprint": fingerprint,
    }


def check_version(version: Any, where: str) -> None:
    """Raises FormatVersionError for a store from the future, StoreCorrupt for no version at all."""
    if type(version) is not int or version < 1:
        raise StoreCorrupt(f"{where}: format_version is a positive int; got {shown(version)}")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{where} was made by a newer predistill (format {shown(version)}); this one reads {FORMAT_VERSION}: "
            "upgrade it"
        )
