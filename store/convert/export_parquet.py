"""A shard as a parquet file: nested lists of the shapes that its fields describe, or its columns as they are.

The file's schema metadata are the shard's, so that fields stay described; content hashes are hex, as in the index.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import schema
from ..codecs import STORED_AS, WHOLE_COLUMN
from ..errors import StoreCorrupt
from ..mapped import MappedShard
from ..schema import CONTENT_HASH, FieldSpec
from ..shard import ShardPlan
from .columns import Values, chunks, decoded, lengths

DECODED = b"predistill.decoded"  # in the metadata: "true" where columns are not as they are stored


def write(mapped: MappedShard, shard: ShardPlan, first_row: int, path: Path, raw: bool) -> None:
    """first_row: sample_id of the shard's first row. Raises StoreCorrupt for values that parquet has no type for."""
    metadata = {**(mapped.batch.schema.metadata or {}), DECODED: b"false" if raw else b"true"}
    specs = {spec.name: spec for spec in mapped.fields}
    writer: pq.ParquetWriter | None = None
    try:
        for first, last in chunks(mapped) if mapped.rows else [(0, 0)]:
            columns = {"sample_id": _integers(np.arange(first_row + first, first_row + last))}
            for name in mapped.names:
                stored = mapped.column(name).slice(first, last - first)
                if name == CONTENT_HASH:
                    columns[name] = pa.array([one.as_py().hex() for one in stored], pa.string())
                elif raw or name not in specs or specs[name].codec in WHOLE_COLUMN:
                    columns[name] = stored
                else:
                    columns[name] = nested(mapped, specs[name], first, last)
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema.with_metadata(metadata), compression="zstd")
            writer.write_table(table.replace_schema_metadata(metadata))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        carried = ", ".join(spec.name for spec in mapped.fields if spec.codec == "arrow")
        reason = str(error).splitlines()[0]
        raise StoreCorrupt(f"{mapped.path}: parquet cannot hold a carried column ({carried}): {reason}") from error
    finally:
        if writer is not None:
            writer.close()


def nested(mapped: MappedShard, spec: FieldSpec, first: int, last: int) -> pa.Array:
    """Rows of a field as lists of lists, from the last axis out."""
    found = decoded(mapped, spec, first, last)
    array = _flat(found.values, spec)
    rows = last - first
    if not spec.shape:
        return array
    if schema.is_ragged(spec.shape):
        assert found.counts is not None
        own = lengths(mapped, str(spec.shape[0]), first, last)
        return _lists(_lists(array, found.counts), own)
    sizes = [_sizes(mapped, found, size, first, last) for size in spec.shape]
    for axis in reversed(range(len(spec.shape))):
        size = spec.shape[axis]
        if isinstance(size, int):
            array = pa.FixedSizeListArray.from_arrays(array, size)
            continue
        outer = np.ones(rows, np.int64)
        for one in sizes[:axis]:
            outer = outer * one
        array = _lists(array, np.repeat(sizes[axis], outer))
    return array


def _sizes(mapped: MappedShard, found: Values, size: int | str, first: int, last: int) -> np.ndarray:
    """int64 [N]: an axis of each row."""
    if isinstance(size, int):
        return np.full(last - first, size, np.int64)
    if size == "*":
        assert found.sizes is not None
        return found.sizes
    return lengths(mapped, size, first, last)


def _lists(entries: pa.Array, sizes: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(_integers(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])), entries)


def _flat(values: np.ndarray, spec: FieldSpec) -> pa.Array:
    """All numbers of some rows, of the dtype that a reader gets."""
    if values.dtype == np.bool_:
        return _primitive(values.view(np.uint8), "uint8").cast(pa.bool_())
    assert values.dtype.name not in STORED_AS
    return _primitive(values, values.dtype.name)


def _primitive(values: np.ndarray, dtype: str) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values).reshape(-1))
    return pa.Array.from_buffers(schema.ARROW_TYPES[dtype], values.size, [None, data])


def _integers(values: np.ndarray) -> pa.Array:
    return _primitive(values.astype(np.int64), "int64")
