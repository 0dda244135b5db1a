"""The DuckDB index: built from shards, rebuilt from shards, queried read-only.

One `samples` row a stored row, one `shards` row a shard. Tensors never pass through it: DuckDB cannot bind an Arrow
table that holds half-precision columns, so narrow tables are bound. `samples.parquet` is the same table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from . import manifest, schema
from .errors import ConfigError, OutOfSpace, StoreCorrupt
from .mapped import MappedShard
from .shard import fsync_folder

LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "lock_configuration": "true",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
}
_FULL = (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.TransactionException, duckdb.FatalException)
_AS = ("sample_id::BIGINT AS sample_id", "split::VARCHAR AS split", "shard::VARCHAR AS shard", "row::BIGINT AS row")
_MISPLACED = """
WITH placed AS (SELECT shard, split, rows, sum(rows) OVER (ORDER BY rowid) - rows AS first FROM shards)
SELECT count(*) FROM (SELECT *, row_number() OVER (ORDER BY sample_id) - 1 AS at FROM samples) s
LEFT JOIN placed p ON s.shard = p.shard
WHERE NOT coalesce(s.sample_id = s.at AND s.split = p.split AND s.row = s.sample_id - p.first
                   AND s.row >= 0 AND s.row < p.rows, false)
"""  # rows of `samples` that do not stand where `shards` has them
ADDRESS = ("sample_id", "split", "source_index", "view", "content_hash", "shard", "row", "num_tokens", "label")


def build(folder: Path, made: Mapping[str, Any]) -> None:
    """index.duckdb and samples.parquet anew from the shards. Raises StoreCorrupt, OutOfSpace."""
    target, temporary = folder / manifest.INDEX, folder / f"{manifest.INDEX}.tmp"
    parquet = folder / f"{manifest.SAMPLES}.tmp"
    for path in (temporary, Path(f"{temporary}.wal")):
        path.unlink(missing_ok=True)
    try:
        with duckdb.connect(str(temporary)) as connection:
            fill(connection, folder, made)
            connection.execute("CHECKPOINT")  # one that fails at close fails in silence
            connection.sql("SELECT * FROM samples ORDER BY sample_id").write_parquet(str(parquet), compression="zstd")
    except (
        duckdb.IOException,
        duckdb.OutOfMemoryException,
        duckdb.TransactionException,
        duckdb.FatalException,
    ) as error:
        for path in (temporary, Path(f"{temporary}.wal"), parquet):
            path.unlink(missing_ok=True)
        raise OutOfSpace(
            f"{folder}: the index could not be written ({str(error).splitlines()[0]}); the shards are safe: "
            "make room, then run the same dump again"
        ) from error
    for written, final in ((temporary, target), (parquet, folder / manifest.SAMPLES)):
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, final)
    fsync_folder(folder)


def build_from_samples(folder: Path, made: Mapping[str, Any]) -> None:
    """index.duckdb of samples.parquet and the manifest, for a store whose shards are elsewhere. Raises StoreCorrupt."""
    target, temporary = folder / manifest.INDEX, folder / f"{manifest.INDEX}.tmp"
    source = folder / manifest.SAMPLES
    temporary.unlink(missing_ok=True)
    plan = manifest.plan_of(made, str(folder))
    try:
        with duckdb.connect(str(temporary)) as connection:
            shards_table(connection, plan, made)
            samples = connection.read_parquet(str(source))
            if not set(ADDRESS) <= set(samples.columns):
                raise StoreCorrupt(f"{source} has not the columns of a samples table: {', '.join(ADDRESS)}")
            total = sum(entry["rows"] for entry in made["shards"])
            if connection.sql("SELECT count(*) FROM samples").fetchall() != [(total,)]:
                raise StoreCorrupt(f"{source} has not the {total} rows that the manifest counts")
            kept = f"SELECT * REPLACE ({', '.join(_AS)}) FROM samples ORDER BY sample_id"
            connection.execute(f"CREATE TABLE samples AS {kept}")
            if connection.sql(_MISPLACED).fetchall() != [(0,)]:
                raise StoreCorrupt(f"{source} does not place its rows where the manifest has them")
            connection.execute("CHECKPOINT")
    except duckdb.OutOfMemoryException as error:
        raise OutOfSpace(f"{folder}: the index could not be made ({str(error).splitlines()[0]})") from error
    except duckdb.Error as error:
        temporary.unlink(missing_ok=True)
        raise StoreCorrupt(f"{source} is not a samples table ({_sentence(error)})") from error
    os.replace(temporary, target)


def fill(connection: duckdb.DuckDBPyConnection, folder: Path, made: Mapping[str, Any]) -> None:
    """The `shards` and `samples` tables of a manifest, into any connection."""
    plan = manifest.plan_of(made, str(folder))
    shards_table(connection, plan, made)
    first = 0
    for shard, entry in zip(plan.shards, made["shards"], strict=True):
        mapped = MappedShard(manifest.shard_path(folder, shard.name))
        _insert(connection, _narrow(mapped, shard.name, shard.split, first), shard is plan.shards[0])
        first += entry["rows"]


def shards_table(connection: duckdb.DuckDBPyConnection, plan: manifest.Plan, made: Mapping[str, Any]) -> None:
    """The `shards` table, of the manifest alone."""
    names = ("shard", "split", "view", "start", "stop", "rows", "tokens", "bytes", "sha256")
    words = ("shard", "split", "sha256")
    kinds = ", ".join(f"{name} {'VARCHAR' if name in words else 'BIGINT'}" for name in names)
    connection.execute(f"CREATE TABLE shards ({kinds})")
    rows = [
        [shard.name, shard.split, shard.view, shard.start, shard.stop]
        + [entry[name] for name in ("rows", "tokens", "bytes", "sha256")]
        for shard, entry in zip(plan.shards, made["shards"], strict=True)
    ]
    if rows:
        connection.executemany(f"INSERT INTO shards VALUES ({', '.join('?' * len(names))})", rows)


def _insert(connection: duckdb.DuckDBPyConnection, narrow: pa.Table, create: bool) -> None:
    columns = ", ".join(_expression(field) for field in narrow.schema)
    connection.register("narrow", narrow)
    connection.execute(
        f"CREATE TABLE samples AS SELECT {columns} FROM narrow"
        if create
        else f"INSERT INTO samples SELECT {columns} FROM narrow"
    )
    connection.unregister("narrow")


def _expression(field: pa.Field) -> str:
    """Missing labels and undefined summaries (NaN) are NULL in the index; hashes are hex."""
    name = '"' + field.name.replace('"', '""') + '"'
    if field.name == schema.CONTENT_HASH:
        return f"lower(hex({name})) AS {name}"
    if field.name == "label" and pa.types.is_integer(field.type):
        return f"CASE WHEN {name} >= 0 THEN {name} END AS {name}"
    if pa.types.is_floating(field.type):
        return f"CASE WHEN NOT isnan({name}) THEN {name} END AS {name}"
    return name


def _narrow(mapped: MappedShard, name: str, split: str, first: int) -> pa.Table:
    """The index rows of one shard, in the order of ADDRESS, then summaries, then carried columns."""
    specs = {spec.name: spec for spec in mapped.fields}
    rows = mapped.rows
    table = {
        "sample_id": _count(first, rows),
        "split": pa.repeat(split, rows),
        **{column: mapped.column(column) for column in schema.ADDRESS_COLUMNS},
        "shard": pa.repeat(name, rows),
        "row": _count(0, rows),
        "num_tokens": _num_tokens(mapped, specs),
        "label": _label(mapped, specs),
    }
    table = {column: table[column] for column in ADDRESS}
    for spec in mapped.fields:
        if spec.role in ("summary", "carried") and _bindable(mapped.column(spec.name).type):
            table[spec.name] = mapped.column(spec.name)
    return pa.table(table)


def _count(first: int, rows: int) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), rows, [None, pa.py_buffer(np.arange(first, first + rows))])


def _num_tokens(mapped: MappedShard, specs: Mapping[str, schema.FieldSpec]) -> pa.Array:
    if schema.INPUT_IDS not in specs:
        return pa.nulls(mapped.rows, pa.int64())
    offsets = mapped.column(schema.INPUT_IDS).buffers()[1]
    starts = np.frombuffer(offsets, np.int64, mapped.rows + 1) if mapped.rows else np.zeros(1, np.int64)
    return pa.Array.from_buffers(pa.int64(), mapped.rows, [None, pa.py_buffer(np.diff(starts))])


def _label(mapped: MappedShard, specs: Mapping[str, schema.FieldSpec]) -> pa.Array:
    """Sample-level labels only: a token-level label has no place in one cell."""
    if schema.LABELS not in specs or "S" in specs[schema.LABELS].shape:
        return pa.nulls(mapped.rows, pa.int64())
    return mapped.column(schema.LABELS)


def _bindable(kind: pa.DataType) -> bool:
    """Can DuckDB read this Arrow type? Not half precision, anywhere inside."""
    if pa.types.is_float16(kind):
        return False
    children = [kind.field(at).type for at in range(kind.num_fields)]
    return all(_bindable(child) for child in children)


class Index:
    """index.duckdb, opened at first use: read-only, no external access, configuration locked."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._connection: duckdb.DuckDBPyConnection | None = None

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            path = self._folder / manifest.INDEX
            if not path.exists():
                raise StoreCorrupt(f"{path} is missing; make it anew with: predistill index {self._folder} --rebuild")
            try:
                self._connection = duckdb.connect(str(path), read_only=True, config=LOCKED)
            except duckdb.Error as error:
                raise StoreCorrupt(
                    f"{path} cannot be opened ({str(error).splitlines()[0]}); make it anew with: "
                    f"predistill index {self._folder} --rebuild"
                ) from error
        return self._connection

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """A relation over the tables `samples` and `shards`. Raises ConfigError for SQL that cannot run."""
        try:
            relation = self.connection.sql(query)
        except duckdb.Error as error:
            raise ConfigError(f"SQL {query!r}: {_sentence(error)}") from error
        if relation is None:
            raise ConfigError(f"SQL {query!r}: a query that returns rows is expected")
        return relation

    def sample_ids(self, where: str, split: str | None = None) -> np.ndarray:
        """sample_id of the rows (of a split) that a WHERE expression keeps, ascending, int64. Raises ConfigError."""
        of_split = "" if split is None else f" AND split = '{split}'"  # a plain file name: the manifest was checked
        query = f"SELECT sample_id FROM samples WHERE (\n{where}\n){of_split} ORDER BY sample_id"
        try:
            return self.connection.sql(query).fetchnumpy()["sample_id"].astype(np.int64)
        except duckdb.Error as error:
            raise ConfigError(f"where {where!r} is no SQL condition on samples: {_sentence(error)}") from error

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class MemoryIndex(Index):
    """Made in memory from the shards themselves: of an unfinished store, or of one whose index is not to be trusted."""

    def __init__(self, folder: Path, made: Mapping[str, Any]):
        super().__init__(folder)
        self._connection = duckdb.connect(":memory:", config=LOCKED)
        fill(self._connection, folder, made)


def _sentence(error: duckdb.Error) -> str:
    return " ".join(str(error).split())[:400]


def contents(connection: duckdb.DuckDBPyConnection) -> list[Any]:
    """What both tables hold, in a form that can be compared with another index's."""
    return [content(connection, table, order) for table, order in (("shards", "shard"), ("samples", "sample_id"))]


def content(connection: duckdb.DuckDBPyConnection, table: str, order: str) -> Any:
    """(columns, rows, hash of every row with its place) of one table."""
    relation = connection.sql(f"SELECT * FROM {table}")
    schema_of = [(name, str(kind)) for name, kind in zip(relation.columns, relation.types, strict=True)]
    numbered = f"SELECT row_number() OVER (ORDER BY {order}) AS place, t FROM {table} t"
    query = f"SELECT count(*), bit_xor(hash(place, t)) FROM ({numbered})"
    return schema_of, connection.sql(query).fetchall()[0]
