"""A plan that grows: what is dumped of rows that nobody has counted, a part at a time.

    plan.json                                          how, and by how many rows a part, never changed
    plan-0001.json, plan-0002.json, …                  which rows came, in the order in which they were read

A part is appended once its rows were read and looked at, and never changed. It carries the hash of all rows of its
split so far, so that a source that changed is found; and that of the part before, so that none is missing, edited or
swapped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import StoreCorrupt
from .identity import digest
from .manifest import Plan, sealed, write_json
from .schema import FORMAT_VERSION, check_version
from .shard import ShardPlan
from .strict import is_count, is_sha256, member, read_json

FILE = re.compile(r"plan-(\d{4,})\.json")


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a split, a shard for each view of them.

    ended: was there no row after them, when they were read? rows_sha256: of the split's rows from 0 to `stop`.
    """

    split: str
    start: int
    stop: int
    ended: bool
    rows_sha256: str
    shards: list[ShardPlan]

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("split", "start", "stop", "ended", "rows_sha256")}
        return {"format_version": FORMAT_VERSION, **own, "shards": [shard.to_json() for shard in self.shards]}

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> Part:
        check_version(data.get("format_version"), where)
        shards = [ShardPlan.from_json(one, where) for one in member(data, "shards", list, where)]
        split, rows_sha256 = (member(data, name, str, where) for name in ("split", "rows_sha256"))
        start, stop = (member(data, name, int, where) for name in ("start", "stop"))
        sound = shards and is_count(start) and is_count(stop) and start < stop and is_sha256(rows_sha256)
        if not sound or any((one.split, one.start, one.stop) != (split, start, stop) for one in shards):
            raise StoreCorrupt(f"{where} is not a part of a plan: rows, their sha256 and shards of just them expected")
        return cls(split, start, stop, member(data, "ended", bool, where), rows_sha256, shards)


class Parts:
    """The parts of a folder, in order. Raises StoreCorrupt naming the first that is not what a dump appended."""

    def __init__(self, folder: Path, plan: Plan):
        self._folder, self._last = folder, plan.fingerprint
        self.all: list[Part] = []
        self.look()
        beyond = [name for name in part_names(folder) if int(name[5:-5]) > len(self.all)]
        if beyond:
            raise StoreCorrupt(f"{self._path} is not there, and {beyond[0]} is: put it back, or dump to another folder")

    def look(self) -> list[Part]:
        """Those that were appended since."""
        before = len(self.all)
        while self._path.exists():
            data = read_json(self._path)
            if sealed(data)["sha256"] != data.get("sha256"):
                raise StoreCorrupt(
                    f"{self._path} was changed after a dump wrote it: its sha256 is not that of its content"
                )
            if data.get("before") != self._last:
                raise StoreCorrupt(f"{self._path} does not follow the part before it: it is of another store, or moved")
            self._add(Part.from_json(data, str(self._path)), data["sha256"])
        return self.all[before:]

    def append(self, part: Part) -> None:
        data = sealed({**part.to_json(), "before": self._last})
        write_json(self._path, data)
        self._add(part, data["sha256"])

    def _add(self, part: Part, sha256: str) -> None:
        self.all.append(part)
        self._last = sha256

    @property
    def _path(self) -> Path:
        """Of the part that is next."""
        return self._folder / part_file(len(self.all) + 1)


def part_file(number: int) -> str:
    """number: from 1."""
    return f"plan-{number:04d}.json"


def part_names(folder: Path) -> list[str]:
    """Names of the files of parts, in order."""
    found = [entry.name for entry in folder.iterdir() if FILE.fullmatch(entry.name)]
    return sorted(found, key=lambda name: int(name[5:-5]))


def with_parts(plan: Plan, parts: Sequence[Part]) -> Plan:
    """The plan with the shards of its parts, and which rows those are of: `rows_sha256` is what a dump of the same rows
    that were counted beforehand has."""
    ends = {part.split: part for part in parts}
    rows = {split: {"rows": part.stop, "values": part.rows_sha256} for split, part in ends.items()}
    dataset = {**plan.base.identity["dataset"], "rows": sum(part.stop for part in ends.values())}
    dataset["rows_sha256"] = digest(rows)
    shards = [shard for part in parts for shard in part.shards]
    return replace(plan, identity={**plan.identity, "dataset": dataset}, shards=shards)
