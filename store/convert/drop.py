"""Rows taken out of a store for good: `predistill drop`.

    rows that go -> the store without them, beside it in .NAME.drop -> the two change places -> the old one is deleted

Only shards that lose rows are written anew; the plan stays, so that all others stay as they are. Whenever it is
stopped, the folder is a whole store, the old one or the new one, and the same command finishes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .. import index, manifest
from ..atomic import out_of_space, write_text
from ..card import licences_in, store_card
from ..errors import ConfigError, StoreCorrupt
from ..identity import digest
from ..manifest import shard_path
from ..parts import part_names
from ..progress import bytes_bar
from ..reader import TeacherStore
from ..shard import fsync_folder
from ..strict import read_json
from ..verify import KNOWN
from ..writer import take_lock
from .config import DropConfig
from .dependents import Going, going, with_files
from .recut import checked_shard, commit, indices, link, plain_file, plain_folders, plan_of, shard_batch
from .swap import recover, swap

DROPPED = "dropped"  # of store.json: {"rows": all that were ever taken out, "splits": {name: rows}}
_JOURNAL, _NEW, _OLD = "drop.json", "store", "aside"
_ATTRIBUTES = ".gitattributes"
_NOT_OURS = (".git",)  # a history keeps what is taken out


def drop(config: DropConfig) -> dict[str, Any]:
    """Take the rows out that `config.where` is true of, and those that cannot do without them (dependents.py).

    Returns {"dropped": False without `yes`, "rows", "along" (of these, those that go with others), "samples" (that
    stay), "splits": {name: rows that go}, "shards" (that are written anew), "output": the store}. Raises ConfigError
    for SQL that cannot run, or that leaves no row; StoreError, StoreCorrupt, OutOfSpace.
    """
    folder = Path(config.store).expanduser().resolve()
    work = folder.with_name(f".{folder.name}.drop")
    with ExitStack() as held:
        if work.exists():
            held.enter_context(take_lock(_ours(work) / manifest.LOCK, "drop"))
            recover(folder, work / _NEW, work / _OLD)
        made = manifest.read_manifest(folder)
        held.enter_context(take_lock(folder / manifest.LOCK, "dump"))
        ended = _ended(work, made)
        with TeacherStore(folder, made, False) as store:
            rows, found = _asked(store, config.where)
            if not found["rows"] or not config.yes:
                return ended or {"dropped": False, **found}
            _check_alone(folder)
            if not work.exists():
                work.mkdir()
                held.enter_context(take_lock(work / manifest.LOCK, "drop"))
            try:
                with out_of_space(work):
                    _make(store, rows, work, found)
            except StoreCorrupt:
                _clear(work)
                raise
        swap(folder, work / _NEW, work / _OLD)
        _clear(work)
    return {"dropped": True, **found}


def _asked(store: TeacherStore, where: str) -> tuple[Going, dict[str, Any]]:
    """What goes, and what is said of it. The index is made from the shards: that of a stranger is never opened."""
    with index.MemoryIndex(store.path, store.manifest) as fresh:
        asked = fresh.sample_ids(where)
    rows = going(store, asked)
    splits: dict[str, int] = {}
    touched = _touched(store, rows)
    for at, shard in enumerate(store.shards):
        gone = int(rows.gone[store.first_row[at] : store.first_row[at + 1]].sum())
        splits[shard.split] = splits.get(shard.split, 0) + gone
    total = int(rows.gone.sum())
    if total and total == len(rows.gone):
        raise ConfigError(f"{store.path}: all {total} rows would go; delete the folder instead")
    return rows, {
        "rows": total, "along": total - len(asked), "samples": len(rows.gone) - total,
        "splits": {name: count for name, count in splits.items() if count}, "shards": len(touched),
        "output": str(store.path),
    }  # fmt: skip


def _touched(store: TeacherStore, rows: Going) -> set[int]:
    """Shards that lose rows, or whose rows take files over."""
    changed = np.concatenate([np.flatnonzero(rows.gone), np.asarray(list(rows.moves), np.int64)])
    return set((np.searchsorted(store.first_row, changed, side="right") - 1).tolist())


def _make(store: TeacherStore, rows: Going, work: Path, found: Mapping[str, Any]) -> None:
    """The store without these rows, whole, in the work folder; shards that an earlier try wrote are kept."""
    journal = {"of": store.manifest["sha256"], "rows": digest(np.packbits(rows.gone).tobytes().hex()), "found": found}
    new = work / _NEW
    said = _said(work) or {}
    if {key: said.get(key) for key in journal} != journal:
        shutil.rmtree(new, ignore_errors=True)
        manifest.write_json(work / _JOURNAL, journal)
    (new / manifest.SHARDS).mkdir(parents=True, exist_ok=True)
    plan = plan_of(store)
    manifest.write_json(new / manifest.PLAN, plan.to_json())
    touched, done = _touched(store, rows), manifest.committed(new, plan)
    with bytes_bar("drop", sum(store.manifest["shards"][at]["bytes"] for at in touched)) as bar:
        for at, shard in enumerate(store.shards):
            if shard.name in done:
                continue
            if at in touched:
                _cut(store, plan, rows, at, new)
                bar.advance(store.manifest["shards"][at]["bytes"])
                continue
            _keep(store, at, new)
    fsync_folder(new / manifest.SHARDS)
    sha256 = _seal(store, plan, new, found)
    manifest.write_json(work / _JOURNAL, {**journal, "made": sha256})


def _keep(store: TeacherStore, at: int, new: Path) -> None:
    """A shard that stays as it is, under its name in the new folder."""
    source, target = store.shard_path(at), shard_path(new, store.shards[at].name)
    link(source, target)
    said = {key: value for key, value in store.manifest["shards"][at].items() if key != "name"}
    sidecar = {**said, "fingerprint": store.fingerprint}
    try:
        if manifest.read_sidecar(source) == sidecar:
            link(source.with_suffix(".json"), target.with_suffix(".json"))
            return
    except (FileNotFoundError, StoreCorrupt):
        pass
    manifest.write_json(target.with_suffix(".json"), sidecar)


def _cut(store: TeacherStore, plan: manifest.Plan, rows: Going, at: int, new: Path) -> None:
    mapped = checked_shard(store, plan, at)
    columns = {name: mapped.column(name) for name in mapped.names}
    with_files(store, columns, at, rows.moves)
    stay = indices(np.flatnonzero(~rows.gone[store.first_row[at] : store.first_row[at + 1]]))
    kept = {name: column.take(stay) for name, column in columns.items()}
    batch = shard_batch(kept, mapped.fields, store.shards[at], store.fingerprint)
    commit(new, store.shards[at], batch, store.fingerprint)


def _seal(store: TeacherStore, plan: manifest.Plan, new: Path, found: Mapping[str, Any]) -> str:
    """Folders, card, index and manifest, whose hash is returned."""
    for name, source in plain_folders(store.path).items():
        shutil.rmtree(new / name, ignore_errors=True)
        shutil.copytree(source, new / name)
    done = manifest.committed(new, plan)
    before = store.manifest.get(DROPPED, {})
    splits = {name: before.get("splits", {}).get(name, 0) + found["splits"].get(name, 0) for name in store.splits}
    made = {
        **store.manifest,
        "shards": [{"name": shard.name, **done[shard.name]} for shard in plan.shards],
        DROPPED: {"rows": sum(splits.values()), "splits": {name: count for name, count in splits.items() if count}},
    }
    index.build(new, made)
    said = {name: text for name in (manifest.CARD, _ATTRIBUTES) if (text := _text(store.path / name)) is not None}
    write_text(new / manifest.CARD, store_card(new, made, licences_in(said.pop(manifest.CARD, None))))
    for name, text in said.items():
        write_text(new / name, text)
    made = manifest.sealed({**made, "files": manifest.described_files(new)})
    manifest.write_json(new / manifest.MANIFEST, made)
    return made["sha256"]


def _text(path: Path) -> str | None:
    return plain_file(path).read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _check_alone(folder: Path) -> None:
    """The old folder is deleted whole: nothing else may be in it. Raises ConfigError."""
    ours = KNOWN | set(part_names(folder))
    known = (ours | {f"{name}.tmp" for name in ours}) - set(_NOT_OURS)
    if others := sorted({entry.name for entry in folder.iterdir()} - known):
        raise ConfigError(f"{folder} holds {others[0]}, no part of a store, which might keep the rows; move it out")


def _ours(work: Path) -> Path:
    """Raises ConfigError where something else is at the place that a drop works in."""
    names = {entry.name for entry in work.iterdir()} if work.is_dir() and not work.is_symlink() else {str(work)}
    if not names <= {_JOURNAL, f"{_JOURNAL}.tmp", _NEW, _OLD, manifest.LOCK}:
        raise ConfigError(f"{work} is in the way, and is not what a drop left; move it")
    return work


def _said(work: Path) -> dict[str, Any] | None:
    try:
        return read_json(work / _JOURNAL)
    except (FileNotFoundError, StoreCorrupt):
        return None


def _ended(work: Path, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a drop that was stopped after the change of places says; what it left is deleted.

    A work folder of another state of the store is of no use either.
    """
    journal = _said(work) if work.exists() else None
    if work.exists() and (journal is None or journal.get("of") != made["sha256"]):
        _clear(work)
        return {"dropped": True, **journal["found"]} if journal and journal.get("made") == made["sha256"] else None
    return None


def _clear(work: Path) -> None:
    """What was taken out goes first; until it is gone, the journal tells what is left to do."""
    for path in (work / _NEW, work / _OLD, work):
        if path.exists():
            shutil.rmtree(path)
    fsync_folder(work.parent)
