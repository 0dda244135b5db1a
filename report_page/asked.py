"""The index of a store, asked in SQL: answers are small, whatever the store's size.

What a stranger's index says is not trusted to have the columns, types or values that a dump writes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ..store import index, manifest
from ..store.errors import ConfigError, StoreCorrupt
from ..store.reader import TeacherStore

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
NUMBERS = (*INTEGERS, "FLOAT", "DOUBLE")


class ScratchIndex(index.Index):
    """The index of an unfinished store, made in a temporary file of the shards that are there."""

    def __init__(self, folder: Path, made: Mapping[str, Any]):
        super().__init__(folder)
        self._scratch = tempfile.TemporaryDirectory(prefix="predistill-report-")
        self._connection = duckdb.connect(str(Path(self._scratch.name) / manifest.INDEX), config=index.LOCKED)
        index.fill(self._connection, folder, made)

    def close(self) -> None:
        super().close()
        self._scratch.cleanup()


class Asked:
    """The tables of a store: `columns` of samples with their types, and answers to queries.

    partial: the store is unfinished and has no index yet. Raises StoreCorrupt for an index that cannot be asked.
    """

    def __init__(self, store: TeacherStore, partial: bool):
        self._store = store
        self._scratch = ScratchIndex(store.path, store.manifest) if partial else None
        self.columns = {str(name): str(kind) for name, kind, *_ in self.rows("DESCRIBE samples")}
        whole = all(self.columns.get(name) in INTEGERS for name in ("sample_id", "source_index", "view", "row"))
        if not whole or {self.columns.get("split"), self.columns.get("shard")} != {"VARCHAR"}:
            raise self._corrupt("its table of samples has other columns than a dump gives it")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        ask = self._scratch.sql if self._scratch else self._store.sql
        try:
            return ask(query).fetchall()
        except (duckdb.Error, ConfigError) as error:
            raise self._corrupt(" ".join(str(error).split())[:200]) from error

    def _corrupt(self, why: str) -> StoreCorrupt:
        path = self._store.path
        return StoreCorrupt(
            f"{path}: its index cannot be asked ({why}); make it anew: predistill index {path} --rebuild"
        )

    def number(self, name: str) -> str | None:
        """SQL for a numeric column as DOUBLE, NULL where it is not finite; None where there is no such column."""
        if self.columns.get(name) not in NUMBERS:
            return None
        column = f"CAST({quoted(name)} AS DOUBLE)"
        return f"CASE WHEN isfinite({column}) THEN {column} END"

    def is_integer(self, *names: str) -> bool:
        return all(self.columns.get(name) in INTEGERS for name in names)

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch:
            self._scratch.close()


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def finite(value: Any) -> float | None:
    """A number as it may be shown; None for everything else, NaN and truth values among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
