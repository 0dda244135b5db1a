"""An ensemble store: the rows of one dataset once, and what several teachers say of them.

The first teacher's columns have the plain names, `teacher_logits`, so that who knows of no ensembles reads that
teacher; those of the second begin with `teacher2_`, and so on. `identity.teachers` says who they are. A `Member` is one
of them as a store of its own, with the plain names, so that whatever reads a store reads a member.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from . import schema
from .errors import StoreCorrupt, StoreIncomplete
from .index import Index
from .manifest import INDEX
from .mapped import MappedShard, recent
from .reader import TeacherStore
from .schema import FieldSpec

TEACHERS = "teachers"  # of a plan's identity
PLAIN = "teacher_"  # what the first teacher's columns begin with
LONGEST = 200  # characters of a name
OWN = ("teacher", "summary")  # roles of columns that are one teacher's


@dataclass(frozen=True)
class Teller:
    """One teacher of a store. name: unique in it; prefix: of its columns; teacher: its identity; settings: of its dump;
    columns: those that are there, by their plain names."""

    name: str
    prefix: str
    teacher: dict[str, Any]
    settings: dict[str, Any]
    columns: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "prefix": self.prefix, "teacher": self.teacher, "settings": self.settings}


def prefix_of(number: int) -> str:
    """Of teacher 1, 2, …"""
    return PLAIN if number == 1 else f"teacher{number}_"


def tellers(store: TeacherStore) -> list[Teller]:
    """The teachers that a store has columns of; of a store that is no ensemble its one. Raises StoreCorrupt."""
    teacher = store.identity.get("teacher") or {}
    if TEACHERS not in store.identity:
        name = str(teacher.get("name") or teacher.get("class") or "teacher")
        return [Teller(name, PLAIN, teacher, store.settings, _columns(store.fields, PLAIN))]
    said = store.identity[TEACHERS]
    try:
        found = [Teller(one["name"], one["prefix"], dict(one["teacher"]), dict(one["settings"]), {}) for one in said]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"{store.path}: identity.{TEACHERS} is no list of teachers ({error!r})") from error
    names, prefixes = [one.name for one in found], [one.prefix for one in found]
    if prefixes != [prefix_of(number) for number in range(1, len(found) + 1)]:
        raise StoreCorrupt(f"{store.path}: identity.{TEACHERS}: prefixes teacher_, teacher2_, … expected")
    if not all(type(one) is str and 0 < len(one) <= LONGEST and one.isprintable() for one in names):
        raise StoreCorrupt(f"{store.path}: identity.{TEACHERS}: a name of each expected, printable, on one line")
    if len(set(names)) < len(names):
        raise StoreCorrupt(f"{store.path}: identity.{TEACHERS} has two teachers of one name")
    placed = [replace(one, columns=_columns(store.fields, one.prefix)) for one in found]
    return [one for one in placed if any(store.fields[name].role == "teacher" for name in one.columns.values())]


def _columns(fields: Mapping[str, FieldSpec], prefix: str) -> dict[str, str]:
    return {
        PLAIN + name.removeprefix(prefix): name for name, spec in fields.items()
        if spec.role in OWN and name.startswith(prefix) and name != schema.POSITIONS
    }  # fmt: skip


def renamed(spec: FieldSpec, names: Mapping[str, str]) -> FieldSpec:
    """The field, and the column that counts its entries, by other names."""
    counts = str(spec.parameters.get("counts"))
    parameters = {**spec.parameters, "counts": names[counts]} if counts in names else spec.parameters
    return replace(spec, name=names.get(spec.name, spec.name), parameters=parameters)


def members_of(store: TeacherStore) -> list[TeacherStore]:
    """One store a teacher; of a store that is no ensemble itself. Raises StoreCorrupt, StoreIncomplete."""
    if TEACHERS not in store.identity:
        return [store]
    if store._partial:
        raise StoreIncomplete(f"{store.path} is an unfinished ensemble store: run the same merge again to go on")
    return [Member(store, one) for one in tellers(store)] or [store]


class Member(TeacherStore):
    """One teacher of an ensemble store. Files, rows and sample_ids are the whole's; fields and `samples` have this
    teacher's columns by the plain names (in `samples` those of the other teachers stay beside them)."""

    def __init__(self, whole: TeacherStore, said: Teller):
        vars(self).update(vars(whole))  # path, manifest, shards, …
        self.whole, self.member = whole, said.name
        self.settings = said.settings
        self.identity = {**{k: v for k, v in whole.identity.items() if k != TEACHERS}, "teacher": said.teacher}
        plain = {stored: name for name, stored in said.columns.items()}
        specs = [renamed(spec, plain) for spec in whole.fields.values() if _is_of(spec, plain)]
        placed = any(spec.shape[:1] == ("P",) for spec in specs if spec.name != schema.POSITIONS)
        self.fields = {spec.name: spec for spec in specs if placed or spec.name != schema.POSITIONS}
        stored = [*schema.ADDRESS_COLUMNS, *self.fields]
        self._stored = {name: said.columns.get(name, name) for name in stored}
        self._recent = recent(self._map)
        first = {name for name, spec in whole.fields.items() if spec.role == "summary" and name.startswith(PLAIN)}
        rows = int(whole.first_row[-1])
        plainly = said.prefix == PLAIN
        self._index = Index(whole.path, rows) if plainly else MemberIndex(whole.path, rows, said.columns, first)

    def _map(self, shard: int) -> MappedShard:
        return self.whole.mapped(shard).by_names(self._stored)

    def close(self) -> None:
        super().close()
        self.whole.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.whole, self.member)


def _is_of(spec: FieldSpec, plain: Mapping[str, str]) -> bool:
    return spec.name in plain or spec.role not in OWN or spec.name == schema.POSITIONS


def _reopen(whole: TeacherStore, name: str) -> TeacherStore:
    return next(one for one in members_of(whole) if one.member == name)


class MemberIndex(Index):
    """The index of the whole store, in whose `samples` the plain names are one teacher's.

    columns: that teacher's, plain to stored; hidden: those of the first teacher.
    """

    def __init__(self, folder: Path, rows: int, columns: Mapping[str, str], hidden: Collection[str]):
        super().__init__(folder, rows)
        self._columns, self._hidden = columns, hidden

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        fresh, found = self._connection is None, super().connection
        if fresh:  # a view of this connection: the file is read-only
            there = [str(row[0]) for row in found.execute("DESCRIBE samples").fetchall()]
            shown = [_quoted(name) for name in there if name not in self._hidden]
            shown += [f"{_quoted(one)} AS {_quoted(name)}" for name, one in self._columns.items() if one in there]
            table = f"{_quoted(Path(INDEX).stem)}.main.samples"
            found.execute(f"CREATE TEMP VIEW samples AS SELECT {', '.join(shown)} FROM {table}")
        return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
