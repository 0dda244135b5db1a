"""What the index has of a shard: an Arrow table of a row each, and what DuckDB is to make of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import duckdb
import numpy as np
import pyarrow as pa

from . import schema
from .errors import StoreCorrupt
from .mapped import MappedShard

ADDRESS = ("sample_id", "split", "source_index", "view", "content_hash", "shard", "row", "num_tokens", "label")


def rows_of(mapped: MappedShard, name: str, split: str, first: int) -> pa.Table:
    """The index rows of one shard, in the order of ADDRESS, then summaries, then carried columns."""
    specs = {spec.name: spec for spec in mapped.fields}
    rows = mapped.rows
    table = {
        "sample_id": _count(first, rows),
        "split": pa.repeat(split, rows),
        **{column: mapped.checked(column) for column in schema.ADDRESS_COLUMNS},
        "shard": pa.repeat(name, rows),
        "row": _count(0, rows),
        "num_tokens": _num_tokens(mapped, specs),
        "label": _label(mapped, specs),
    }
    table = {column: table[column] for column in ADDRESS}
    for spec in mapped.fields:
        kept = spec.role in ("summary", "carried") and spec.name not in table
        if kept and _bindable(mapped.column(spec.name).type):
            table[spec.name] = mapped.checked(spec.name)
    return pa.table(table)


def _count(first: int, rows: int) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), rows, [None, pa.py_buffer(np.arange(first, first + rows))])


def _num_tokens(mapped: MappedShard, specs: Mapping[str, schema.FieldSpec]) -> pa.Array:
    if schema.INPUT_IDS not in specs:
        return pa.nulls(mapped.rows, pa.int64())
    column = mapped.column(schema.INPUT_IDS)
    if not pa.types.is_large_list(column.type):
        raise StoreCorrupt(f"{mapped.path}: column {schema.INPUT_IDS} is a large_list a row; got {column.type}")
    offsets = column.buffers()[1]
    starts = np.frombuffer(offsets, np.int64, mapped.rows + 1) if mapped.rows else np.zeros(1, np.int64)
    return pa.Array.from_buffers(pa.int64(), mapped.rows, [None, pa.py_buffer(np.diff(starts))])


def _label(mapped: MappedShard, specs: Mapping[str, schema.FieldSpec]) -> pa.Array:
    """Sample-level labels only: a token-level label has no place in one cell."""
    if schema.LABELS not in specs or "S" in specs[schema.LABELS].shape:
        return pa.nulls(mapped.rows, pa.int64())
    return mapped.checked(schema.LABELS)


def _bindable(kind: pa.DataType) -> bool:
    """Can DuckDB read this Arrow type? Neither half precision nor decimals beyond 38 digits, anywhere inside."""
    if pa.types.is_float16(kind) or pa.types.is_decimal256(kind):
        return False
    children = [kind.field(at).type for at in range(kind.num_fields)]
    return all(_bindable(child) for child in children)


def expression(field: pa.Field) -> str:
    """Missing labels and undefined summaries (NaN) are NULL in the index; hashes are hex."""
    name = quoted(field.name)
    if field.name == schema.CONTENT_HASH:
        return f"lower(hex({name})) AS {name}"
    if field.name == "label" and pa.types.is_integer(field.type):
        return f"CASE WHEN {name} >= 0 THEN {name} END AS {name}"
    if pa.types.is_floating(field.type):
        return f"CASE WHEN NOT isnan({name}) THEN {name} END AS {name}"
    return name


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def refused(columns: Iterable[tuple[str, str]], attempt: Callable[[str], object], error: duckdb.Error) -> StoreCorrupt:
    """What is to be said of an `error` over columns, (name, type) each: which it is, by an attempt with each."""
    for name, kind in columns:
        try:
            attempt(name)
        except duckdb.Error as own:
            return StoreCorrupt(
                f"column {name!r} ({kind[:100]}) has values that an index cannot hold ({sentence(own)}): make the "
                "store anew without that column"
            )
    return StoreCorrupt(f"no index can be made of these shards ({sentence(error)})")


def sentence(error: duckdb.Error) -> str:
    return " ".join(str(error).split())[:400]
