"""The ground floor: what both phases must agree on. FORMAT.md is the on-disk format on one page.

    errors <- schema <- codecs <- shard <- manifest <- index <- writer, reader (rows, gather, prefetch), verify

Names load when first used, so that `predistill --help` reads neither pyarrow nor duckdb.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codecs import bytes_per_row
    from .errors import (
        ConfigError,
        DataError,
        FormatVersionError,
        OutOfSpace,
        PredistillError,
        StoreCorrupt,
        StoreError,
        StoreIncomplete,
        StoreMismatch,
    )
    from .identity import compare, content_hash, tokenizer_sha256, weights_sha256
    from .manifest import Plan
    from .reader import TeacherRows, TeacherStore
    from .schema import FieldSpec, layer_column
    from .shard import ShardBuilder, ShardPlan
    from .verify import describe, rebuild_index
    from .writer import StoreWriter

_HOMES = {
    "errors": (
        "ConfigError",
        "DataError",
        "FormatVersionError",
        "OutOfSpace",
        "PredistillError",
        "StoreCorrupt",
        "StoreError",
        "StoreIncomplete",
        "StoreMismatch",
    ),
    "codecs": ("bytes_per_row",),
    "identity": ("compare", "content_hash", "tokenizer_sha256", "weights_sha256"),
    "manifest": ("Plan",),
    "reader": ("TeacherRows", "TeacherStore"),
    "schema": ("FieldSpec", "layer_column"),
    "shard": ("ShardBuilder", "ShardPlan"),
    "verify": ("describe", "rebuild_index"),
    "writer": ("StoreWriter",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ConfigError",
    "DataError",
    "FieldSpec",
    "FormatVersionError",
    "OutOfSpace",
    "Plan",
    "PredistillError",
    "ShardBuilder",
    "ShardPlan",
    "StoreCorrupt",
    "StoreError",
    "StoreIncomplete",
    "StoreMismatch",
    "StoreWriter",
    "TeacherRows",
    "TeacherStore",
    "bytes_per_row",
    "compare",
    "content_hash",
    "describe",
    "layer_column",
    "rebuild_index",
    "tokenizer_sha256",
    "weights_sha256",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
