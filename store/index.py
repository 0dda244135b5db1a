"""The DuckDB index: built from shards, rebuilt from shards, queried read-only.

One `samples` row a stored row, one `shards` row a shard. Tensors never pass through it: DuckDB cannot bind an Arrow
table that holds half-precision columns, so narrow tables are bound. `samples.parquet` is the same table.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from . import manifest
from .errors import ConfigError, OutOfSpace, StoreCorrupt
from .index_rows import ADDRESS, expression, quoted, refused, rows_of, sentence
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
_AS = {
    "sample_id": "BIGINT", "split": "VARCHAR", "source_index": "BIGINT", "view": "INTEGER", "shard": "VARCHAR",
    "row": "BIGINT", "num_tokens": "BIGINT",
}  # fmt: skip
_MISPLACED = """
WITH placed AS (SELECT shard, split, rows, sum(rows) OVER (ORDER BY rowid) - rows AS first FROM shards)
SELECT count(*) FROM (SELECT *, rowid AS at FROM samples) s
LEFT JOIN placed p ON s.shard = p.shard
WHERE NOT coalesce(s.sample_id = s.at AND s.split = p.split AND s.row = s.sample_id - p.first
                   AND s.row >= 0 AND s.row < p.rows, false)
"""  # rows of `samples` that do not stand where `shards` has them
_TOGETHER = (1000, 1 << 20)  # shards, and rows, that go to DuckDB at once: each insert by itself costs 16 ms
_MEMORY = f"{min(2 << 30, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2)}B"  # DuckDB would take 80 %
_CATALOG = Path(manifest.INDEX).stem  # what DuckDB calls the file
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
_SPAN = 1 << 24  # sample_ids looked at together: 128 MB


def build(folder: Path, made: Mapping[str, Any]) -> None:
    """index.duckdb and samples.parquet anew from the shards. Raises StoreCorrupt, OutOfSpace."""
    target, temporary = folder / manifest.INDEX, folder / f"{manifest.INDEX}.tmp"
    parquet = folder / f"{manifest.SAMPLES}.tmp"
    for path in (temporary, Path(f"{temporary}.wal")):
        path.unlink(missing_ok=True)
    shutil.rmtree(f"{temporary}.tmp", ignore_errors=True)  # what DuckDB spilled before it was killed
    try:
        with duckdb.connect(str(temporary.absolute()), config={"memory_limit": _MEMORY}) as connection:
            fill(connection, folder, made)
            connection.execute("CHECKPOINT")  # one that fails at close fails in silence
            # in the order of insertion, which is that of sample_id: sorting a billion rows would spill them all
            _write_parquet(connection, parquet)
    except BaseException as error:
        for path in (temporary, Path(f"{temporary}.wal"), parquet):
            path.unlink(missing_ok=True)
        if isinstance(error, _FULL):
            raise OutOfSpace(
                f"{folder}: the index could not be written ({sentence(error)}); the shards are safe: "
                "make room, then run the same dump again"
            ) from error
        raise
    for written, final in ((temporary, target), (parquet, folder / manifest.SAMPLES)):
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, final)
    fsync_folder(folder)


def _write_parquet(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    try:
        connection.sql("FROM samples").write_parquet(str(path), compression="zstd")
    except _FULL:
        raise
    except duckdb.Error as error:  # Parquet has other bounds than DuckDB
        samples = connection.sql("FROM samples")
        columns = zip(samples.columns, map(str, samples.types), strict=True)
        raise refused(columns, lambda name: samples.select(quoted(name)).write_parquet(str(path)), error) from error


def build_from_samples(folder: Path, made: Mapping[str, Any]) -> None:
    """index.duckdb of samples.parquet and the manifest, for a store whose shards are elsewhere. Raises StoreCorrupt."""
    target, temporary = folder / manifest.INDEX, folder / f"{manifest.INDEX}.tmp"
    source = folder / manifest.SAMPLES
    temporary.unlink(missing_ok=True)
    plan = manifest.plan_of(made, str(folder))
    try:
        with duckdb.connect(str(temporary.absolute()), config={"memory_limit": _MEMORY}) as connection:
            shards_table(connection, plan, made)
            samples = connection.read_parquet(str(source))
            if not set(ADDRESS) <= set(samples.columns):
                raise StoreCorrupt(f"{source} has not the columns of a samples table: {', '.join(ADDRESS)}")
            total = sum(entry["rows"] for entry in made["shards"])
            if connection.sql("SELECT count(*) FROM samples").fetchall() != [(total,)]:
                raise StoreCorrupt(f"{source} has not the {total} rows that the manifest counts")
            typed = ", ".join(f"{name}::{kind} AS {name}" for name, kind in _AS.items())
            kept = f"SELECT * REPLACE ({typed}) FROM samples{_order(source, connection)}"
            connection.execute(f"CREATE TABLE samples AS {kept}")
            if connection.sql(_MISPLACED).fetchall() != [(0,)]:
                raise StoreCorrupt(f"{source} does not place its rows where the manifest has them")
            connection.execute("CHECKPOINT")
    except duckdb.OutOfMemoryException as error:
        raise OutOfSpace(f"{folder}: the index could not be made ({sentence(error)})") from error
    except duckdb.Error as error:
        temporary.unlink(missing_ok=True)
        raise StoreCorrupt(f"{source} is not a samples table ({sentence(error)})") from error
    os.replace(temporary, target)


def _order(source: Path, connection: duckdb.DuckDBPyConnection) -> str:
    """What sorts a samples table by sample_id; nothing where it is, as a dump writes it."""
    rows = connection.read_parquet(str(source), file_row_number=True)
    sorted_ = rows.filter("sample_id IS DISTINCT FROM file_row_number").limit(1).fetchall() == []
    return "" if sorted_ else " ORDER BY sample_id"


def fill(connection: duckdb.DuckDBPyConnection, folder: Path, made: Mapping[str, Any]) -> None:
    """The `shards` and `samples` tables of a manifest, into any connection."""
    plan = manifest.plan_of(made, str(folder))
    shards_table(connection, plan, made)
    for number, narrow in enumerate(_tables(folder, plan, made)):
        if number == 0:
            _select(connection, narrow, "CREATE TABLE samples AS SELECT {} FROM narrow LIMIT 0")
        _select(connection, narrow, "INSERT INTO samples SELECT {} FROM narrow")


def _tables(folder: Path, plan: manifest.Plan, made: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The index rows of all shards in order, those of neighbours together."""
    held, rows, first = list[pa.Table](), 0, 0
    for shard, entry in zip(plan.shards, made["shards"], strict=True):
        narrow = rows_of(MappedShard(manifest.shard_path(folder, shard.name)), shard.name, shard.split, first)
        full = len(held) == _TOGETHER[0] or rows + len(narrow) > _TOGETHER[1]
        if held and (full or narrow.schema != held[0].schema):
            yield pa.concat_tables(held)
            held, rows = [], 0
        held.append(narrow)
        rows, first = rows + len(narrow), first + entry["rows"]
    if held:
        yield pa.concat_tables(held)


def shards_table(connection: duckdb.DuckDBPyConnection, plan: manifest.Plan, made: Mapping[str, Any]) -> None:
    """The `shards` table, of the manifest alone."""
    words = {name: [getattr(shard, name) for shard in plan.shards] for name in ("name", "split")}
    words["sha256"] = [entry["sha256"] for entry in made["shards"]]
    numbers = {name: [getattr(shard, name) for shard in plan.shards] for name in ("view", "start", "stop")}
    numbers |= {name: [entry[name] for entry in made["shards"]] for name in ("rows", "tokens", "bytes")}
    columns = {name: pa.array(values, pa.string()) for name, values in words.items()}
    columns |= {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
    names = "name AS shard, split, view, start, stop, rows, tokens, bytes, sha256"
    _select(connection, pa.table(columns), f"CREATE TABLE shards AS SELECT {names} FROM narrow")


def _select(connection: duckdb.DuckDBPyConnection, narrow: pa.Table, statement: str) -> None:
    """A statement about an Arrow table `narrow`; {} in it are its columns as the index has them."""
    connection.register("narrow", narrow)
    try:
        connection.execute(statement.format(", ".join(expression(field) for field in narrow.schema)))
    except _FULL:
        raise
    except duckdb.Error as error:
        columns = [(field.name, str(field.type)) for field in narrow.schema]
        tried = "CREATE OR REPLACE TEMP TABLE tried AS SELECT {} FROM narrow"
        said = refused(columns, lambda name: connection.execute(tried.format(expression(narrow.field(name)))), error)
        raise said from error
    connection.unregister("narrow")


class Index:
    """index.duckdb, opened at first use: read-only, no external access, configuration locked.

    rows: of the store, where it is known. A file that a stranger made may hold anything under the names that are asked
    for: views that never end, macros in place of functions, numbers of rows that are not there. Raises StoreCorrupt.
    """

    def __init__(self, folder: Path, rows: int | None = None):
        self._folder, self._rows = folder, rows
        self._connection: duckdb.DuckDBPyConnection | None = None

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            path = self._folder / manifest.INDEX
            if not path.exists():
                raise self._corrupt("is missing")
            try:
                found = duckdb.connect(str(path.absolute()), read_only=True, config=LOCKED)
            except duckdb.Error as error:
                raise self._corrupt(f"cannot be opened ({sentence(error)})") from error
            try:
                self._check(found)
            except duckdb.Error as error:
                found.close()
                raise self._corrupt(f"cannot be read ({sentence(error)})") from error
            except StoreCorrupt:
                found.close()
                raise
            self._connection = found
        return self._connection

    def _check(self, found: duckdb.DuckDBPyConnection) -> None:
        """Tables as a dump makes them, and DuckDB's own functions before any that the file brings."""
        found.execute(f"SET search_path = 'system.main,{_CATALOG}.main'")
        listed = found.execute(
            "SELECT database_name, schema_name, table_name, sql FROM system.main.duckdb_tables()"
        ).fetchall()
        tables = {name.lower(): said for base, place, name, said in listed if (base, place) == (_CATALOG, "main")}
        for name in ("samples", "shards"):
            if name not in tables or "GENERATED ALWAYS" in tables[name]:
                raise self._corrupt(f"has no table {name} as a dump makes it")
        samples = found.sql(f"FROM {_CATALOG}.main.samples")
        kinds = dict(zip(samples.columns, map(str, samples.types), strict=True))
        for name, kind in _AS.items():
            if kinds.get(name) not in ((kind,) if kind == "VARCHAR" else _INTEGERS):
                raise self._corrupt(f"has no column {name} of {kind}s in its table samples")

    def _corrupt(self, why: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"{self._folder / manifest.INDEX} {why}; make it anew with: predistill index {self._folder} --rebuild"
        )

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """A relation over the tables `samples` and `shards`. Raises ConfigError for SQL that cannot run."""
        try:
            relation = self.connection.sql(query)
        except duckdb.Error as error:
            raise ConfigError(f"SQL {query!r}: {sentence(error)}") from error
        if relation is None:
            raise ConfigError(f"SQL {query!r}: a query that returns rows is expected")
        return relation

    def sample_ids(self, where: str, split: str | None = None) -> np.ndarray:
        """sample_id of the rows (of a split) that a WHERE expression keeps, ascending, int64. Raises ConfigError."""
        of_split = "" if split is None else f" AND split = '{split}'"  # a plain file name: the manifest was checked
        query = f"SELECT sample_id FROM samples WHERE (\n{where}\n){of_split}"
        try:
            with self._for_once() as connection:
                found = connection.sql(query).fetchnumpy()["sample_id"]
        except duckdb.Error as error:
            raise ConfigError(f"where {where!r} is no SQL condition on samples: {sentence(error)}") from error
        if self._rows is not None and len(found) > self._rows:
            raise self._corrupt(f"has {len(found)} such samples, the store has {self._rows} rows")
        if np.ma.is_masked(found) or found.dtype.kind not in "iu":
            raise self._corrupt("has sample_ids that are no integers")
        ids = np.ma.getdata(found).astype(np.int64, copy=False)
        if (ids[1:] <= ids[:-1]).any():  # only of an index that was not made here
            ids = np.unique(ids)
        if len(ids) and (ids[0] < 0 or (self._rows is not None and ids[-1] >= self._rows)):
            raise self._corrupt(f"has sample_ids {ids[0]} to {ids[-1]}; 0 to {(self._rows or 0) - 1} are expected")
        return ids

    def longest(self, ids: np.ndarray | range) -> tuple[int, int] | None:
        """(place, tokens) of the longest of some ascending sample_ids, the first of them; None where `samples` does not
        say it of all rows."""
        best, begin = (0, -1), 0
        with self._for_once() as connection:
            while begin < len(ids):
                end = bisect.bisect_left(ids, ids[begin] + _SPAN)
                first, last = int(ids[begin]), int(ids[end - 1])
                query = f"SELECT num_tokens FROM samples WHERE sample_id BETWEEN {first} AND {last}"
                try:
                    found = connection.sql(query).fetchnumpy()["num_tokens"]
                except duckdb.Error as error:
                    raise self._corrupt(f"cannot be read ({sentence(error)})") from error
                if len(found) != last - first + 1 or np.ma.is_masked(found):
                    return None
                tokens = found if last - first == end - begin - 1 else found[np.asarray(ids[begin:end]) - first]
                at = int(np.argmax(tokens))
                best, begin = max(best, (begin + at, int(tokens[at])), key=lambda one: one[1]), end
        return best

    @contextlib.contextmanager
    def _for_once(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """The connection, closed again unless it was open: DuckDB keeps what it has read, 3.6 GB of a billion rows."""
        opened = self._connection is None
        try:
            yield self.connection
        finally:
            if opened:
                self.close()

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
        super().__init__(folder, sum(entry["rows"] for entry in made["shards"]))
        self._connection = duckdb.connect(":memory:", config=LOCKED)
        fill(self._connection, folder, made)


def agrees(folder: Path, made: Mapping[str, Any], stored: duckdb.DuckDBPyConnection) -> bool:
    """Do both tables hold what the shards say? Compared by hashes of rows, some shards at a time."""
    plan = manifest.plan_of(made, str(folder))
    with duckdb.connect(":memory:") as fresh:
        shards_table(fresh, plan, made)
        if content(fresh, "shards") != content(stored, "shards"):
            return False
        told = content(stored, "samples")
        for number, narrow in enumerate(_tables(folder, plan, made)):
            if number == 0:
                _select(fresh, narrow, "CREATE TABLE samples AS SELECT {} FROM narrow LIMIT 0")
            fresh.execute("CREATE OR REPLACE TABLE held AS FROM samples")
            _select(fresh, narrow, "INSERT INTO held SELECT {} FROM narrow")
            columns, rows = content(fresh, "held")
            if told[0] != columns or any(told[1].pop(shard, None) != found for shard, found in rows.items()):
                return False
    return not told[1]


def content(connection: duckdb.DuckDBPyConnection, table: str) -> tuple[list[Any], dict[str, tuple[int, int]]]:
    """(columns, {shard: (rows, sum of the rows' hashes)}) of one table."""
    relation = connection.sql(f"FROM {table}")
    columns = [(name, str(kind)) for name, kind in zip(relation.columns, relation.types, strict=True)]
    found = connection.execute(f"SELECT shard, count(*), sum(hash(t)) FROM {table} t GROUP BY shard").fetchall()
    return columns, {shard: (count, total) for shard, count, total in found}
