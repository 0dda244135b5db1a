"""A `datasets.Dataset` around the mapped shards, without a copy.

`datasets` maps only Arrow streams of its own, and pickles a table it does not know by value; this one is pickled by
where it is, so that worker processes reopen the store.
"""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from .errors import ConfigError
from .identity import digest
from .reader import TeacherStore
from .schema import CONTENT_HASH


class StoreTable(InMemoryTable):
    """The rows of one split (None: all) as one Arrow table over the memory map."""

    def __init__(self, store: TeacherStore, split: str | None, metadata: dict[bytes, bytes] | None = None):
        super().__init__(_table(store, split).replace_schema_metadata(metadata))
        self._origin = (store, split, metadata)

    def replace_schema_metadata(self, metadata: dict[bytes, bytes] | None = None) -> StoreTable:
        """`datasets` writes its features there; the table stays one that knows its store."""
        return StoreTable(*self._origin[:2], metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreTable, self._origin

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreTable:
        return self  # immutable, and its buffers are the map


def to_dataset(store: TeacherStore, split: str | None = None) -> datasets.Dataset:
    """Columns as stored (bfloat16 as its bits, int8 as values and scales). Raises ConfigError for an unknown split."""
    if split is not None and split not in store.splits:
        raise ConfigError(f"{store.path}: split {split!r} is not there; it has {', '.join(store.splits)}")
    table = StoreTable(store, split)
    name = datasets.NamedSplit(split) if split else None
    content = store.manifest.get("sha256", store.fingerprint)  # the plan's stays where rows are dropped
    content = digest([content, store.member]) if store.member else content
    return datasets.Dataset(table, split=name, fingerprint=f"{content[:16]}{split or ''}")


def _table(store: TeacherStore, split: str | None) -> pa.Table:
    batches = [store.mapped(at).batch for at, shard in enumerate(store.shards) if split in (None, shard.split)]
    kept = [name for name in batches[0].schema.names if name != CONTENT_HASH]  # fixed_size_binary has no feature type
    plain = pa.schema([batches[0].schema.field(name) for name in kept])
    table = pa.Table.from_batches(
        [
            pa.RecordBatch.from_arrays([one.column(name) for name in kept], schema=_nullable(plain, one))
            for one in batches
        ]
    )
    return table.cast(datasets.Features.from_arrow_schema(table.schema).arrow_schema)  # nullability only: no copy


def _nullable(plain: pa.Schema, batch: pa.RecordBatch) -> pa.Schema:
    """One schema for all shards: whether a carried column has nulls differs from shard to shard."""
    return pa.schema([pa.field(field.name, batch.schema.field(field.name).type, nullable=True) for field in plain])
