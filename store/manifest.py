"""plan.json and store.json: what a dump set out to do, and what it did.

`plan.json` is written first and never changed; its hash, the fingerprint, stands in every shard. A plan of rows that
nobody has counted has no shards of its own: it grows by parts (parts.py). `store.json` is written last: a folder
without it is unfinished. It lists every shard's sha256, bytes and rows and carries the hash of its own content.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import StoreCorrupt, StoreError, StoreIncomplete
from .identity import digest, file_sha256
from .schema import ADDRESS_COLUMNS, FORMAT_VERSION, FieldSpec, check_version
from .shard import ShardPlan, fsync_folder
from .strict import BEYOND, LARGEST_SIDECAR, check_inside, is_count, is_entry, is_sha256, member, read_json, shown

PLAN, MANIFEST, SHARDS = "plan.json", "store.json", "shards"
FOLDERS = ("tokenizer", "processor")
INDEX, SAMPLES, CARD, LOCK = "index.duckdb", "samples.parquet", "README.md", ".lock"
GROWING = ("rows", "rows_sha256")  # of a dataset's identity: what the parts of a plan that grows add up to
NAMED = ("teacher", "tokenizer", "processor", "dataset")  # parts of the identity whose "name" is information only
_OBJECTS = (*NAMED, "versions")  # parts of the identity that are objects, where they are there
_COUNTS = ("bytes", "rows", "tokens")  # of a shard
_LEAST = 28  # bytes of a row: its address


@dataclass(frozen=True)
class Plan:
    """What a dump set out to do.

    settings: everything chosen that changes content; identity: teacher, tokenizer, dataset, versions, hashed.
    grows_by: source rows of a part, where shards come in parts; None where all are known.
    """

    task: str
    settings: dict[str, Any]
    identity: dict[str, Any]
    fields: list[FieldSpec]
    shards: list[ShardPlan]
    label_names: list[str] | None = None
    grows_by: int | None = None

    @property
    def base(self) -> Plan:
        """As it was before any part was appended; the plan itself where it does not grow."""
        if self.grows_by is None:
            return self
        dataset = {key: value for key, value in self.identity["dataset"].items() if key not in GROWING}
        return replace(self, identity={**self.identity, "dataset": dataset}, shards=[])

    def to_json(self) -> dict[str, Any]:
        grows = {} if self.grows_by is None else {"grows_by": self.grows_by}
        return {
            **grows,
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "settings": self.settings,
            "identity": self.identity,
            "fields": [spec.to_json() for spec in self.fields],
            "label_names": self.label_names,
            "shards": [shard.to_json() for shard in self.shards],
        }

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the plan without the names of teacher, tokenizer and dataset, which say where, not what; of one
        that grows, without what its parts add."""
        plan = json.loads(json.dumps(self.base.to_json()))
        for part in NAMED:
            if isinstance(plan["identity"].get(part), dict):
                plan["identity"][part].pop("name", None)
        return digest(plan)

    @classmethod
    def from_json(cls, data: Any, where: str) -> Plan:
        """Raises StoreCorrupt, FormatVersionError."""
        if type(data) is not dict:
            raise StoreCorrupt(f"{where}: a plan is one JSON object; got {shown(data)}")
        check_version(data.get("format_version"), where)
        settings, identity = (member(data, name, dict, where) for name in ("settings", "identity"))
        for name in _OBJECTS:
            if identity.get(name) is not None:
                member(identity, name, dict, f"{where}: identity")
        shards = [ShardPlan.from_json(one, where) for one in member(data, "shards", list, where)]
        names, grows_by = data.get("label_names"), data.get("grows_by")
        if names is not None and not (type(names) in (list, dict) and all(type(one) is str for one in names)):
            raise StoreCorrupt(f"{where}: label_names is a list of strings, or null; got {shown(names)}")
        if grows_by is not None and not (grows_by and is_count(grows_by) and identity.get("dataset")):
            raise StoreCorrupt(f"{where}: grows_by is a number of rows of identity.dataset; got {shown(grows_by)}")
        fields = _fields(member(data, "fields", list, where), where)
        return cls(member(data, "task", str, where), settings, identity, fields, shards, names, grows_by)


def _fields(described: list[Any], where: str) -> list[FieldSpec]:
    fields = [FieldSpec.from_json(one, where) for one in described]
    [(name, times)] = Counter([*ADDRESS_COLUMNS, *(spec.name for spec in fields)]).most_common(1)
    if times > 1:
        raise StoreCorrupt(f"{where}: columns of different names expected; got {shown(name)} {times} times")
    return fields


def shard_path(folder: Path, name: str) -> Path:
    return folder / SHARDS / f"{name}.arrow"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def described_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{"samples.parquet": {"sha256", "bytes"}, "tokenizer/tokenizer.json": …}: what is neither shard nor index."""
    files = [folder / SAMPLES, *(file for name in FOLDERS for file in sorted((folder / name).rglob("*")))]
    return {
        file.relative_to(folder).as_posix(): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in files
        if file.is_file()
    }


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of its own content."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**body, "sha256": digest(body)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """store.json, checked. Raises StoreIncomplete, StoreCorrupt, FormatVersionError."""
    path = folder / MANIFEST
    if not path.exists():
        raise _unfinished(folder)
    return check_manifest(read_json(path), str(path))


def check_manifest(manifest: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, once its version and its own hash were looked at. Raises StoreCorrupt, FormatVersionError."""
    check_version(manifest.get("format_version"), where)
    if sealed(manifest)["sha256"] != manifest.get("sha256"):
        raise StoreCorrupt(f"{where} was changed after the dump wrote it: its sha256 is not that of its content")
    plan_of(manifest, where)
    return manifest


def plan_of(manifest: Mapping[str, Any], where: str) -> Plan:
    """The plan a manifest was made from; its lists of shards and files are checked too. Raises StoreCorrupt,
    FormatVersionError."""
    plan, made = Plan.from_json(manifest.get("plan"), where), dict(manifest)
    entries, files = member(made, "shards", list, where), member({"files": {}, **made}, "files", dict, where)
    if not is_sha256(made.get("fingerprint")):
        raise StoreCorrupt(f"{where}: fingerprint is a sha256, in hex; got {shown(made.get('fingerprint'))}")
    for entry in entries:
        if not is_entry(entry, *_COUNTS) or entry["rows"] * _LEAST > entry["bytes"]:
            raise StoreCorrupt(
                f"{where}: a shard has a name, a sha256, bytes, rows of at least {_LEAST} bytes, and tokens; got "
                f"{shown(entry)}"
            )
    names = [entry.get("name") for entry in entries]
    if names != [shard.name for shard in plan.shards] or len(set(names)) != len(names):
        raise StoreCorrupt(f"{where}: its list of shards is not the plan's")
    if not all(is_count(sum(entry[name] for entry in entries)) for name in _COUNTS):
        raise StoreCorrupt(f"{where}: its shards hold more than {BEYOND} bytes, rows or tokens")
    for name, entry in files.items():
        check_inside(name, where)
        if not is_entry(entry, "bytes"):
            raise StoreCorrupt(f"{where}: a file has a sha256 and bytes; got {shown(entry)} for {shown(name)}")
    return plan


def committed(folder: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Sidecars of the shards that are there: name -> {"sha256", "bytes", "rows", "tokens"}.

    A shard counts when its sidecar belongs to this plan and the file has the bytes that the sidecar says.
    """
    there = set(os.listdir(folder / SHARDS)) if (folder / SHARDS).is_dir() else set()  # asked once, not shard by shard
    names = [shard.name for shard in plan.shards if f"{shard.name}.json" in there]
    found = ((name, _sidecar(folder, plan.fingerprint, name)) for name in names)
    return {name: entry for name, entry in found if entry is not None}


def is_committed(folder: Path, plan: Plan, shard: ShardPlan) -> bool:
    return _sidecar(folder, plan.fingerprint, shard.name) is not None


def read_sidecar(shard: Path) -> dict[str, Any]:
    """What stands beside a shard: {"sha256", "bytes", "rows", "tokens", "fingerprint"}. Raises StoreCorrupt."""
    entry = read_json(shard.with_suffix(".json"), LARGEST_SIDECAR)
    if not is_entry(entry, *_COUNTS):
        raise StoreCorrupt(f"{shard.with_suffix('.json')}: sha256, bytes, rows and tokens expected; got {shown(entry)}")
    return entry


def _sidecar(folder: Path, fingerprint: str, name: str) -> dict[str, Any] | None:
    path = shard_path(folder, name)
    try:
        entry = read_sidecar(path)
        sound = entry.get("fingerprint") == fingerprint and path.stat().st_size == entry["bytes"]
        return {key: entry[key] for key in ("sha256", *_COUNTS)} if sound else None
    except (FileNotFoundError, StoreCorrupt):
        return None


def read_plan(folder: Path) -> Plan:
    """plan.json of a folder, with the parts that it has grown by. Raises StoreError where it is not a store at all."""
    if not (folder / PLAN).exists():
        raise StoreError(
            f"{folder} is not a store: a folder with {PLAN} and {MANIFEST} expected"
            + ("" if folder.exists() else "; it does not exist")
        )
    plan = Plan.from_json(read_json(folder / PLAN), str(folder / PLAN))
    if plan.grows_by is None or plan.shards:
        return plan
    from .parts import Parts, with_parts

    return with_parts(plan, Parts(folder, plan).all)


def _unfinished(folder: Path) -> StoreError:
    plan = read_plan(folder)
    done = len(committed(folder, plan))
    ends = {shard.split: shard.stop for shard in plan.shards}
    read = ", ".join(f"{stop} rows of {split}" for split, stop in ends.items()) or "no row"
    grown = "" if plan.grows_by is None else f", and its source was read as far as {read}"
    return StoreIncomplete(
        f"{folder} is unfinished: {done} of {len(plan.shards)} shards are there{grown}; run the same dump again to go "
        "on, or read what is there from Python with allow_partial=True"
    )
