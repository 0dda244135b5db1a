"""Several stores become one: `predistill merge`.

    kind -> pieces (which rows of which shards make each new shard) -> shards -> tokenizer, card, index, manifest

More rows: the shards of one store after those of another; a store whose addresses are taken gets others. More fields
or teachers: shards end wherever one of a store ends, so that each is made of one piece of each store. Every shard says
which plan it is of, so that all are written anew, by Arrow buffers. The same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import schema
from ..identity import digest
from ..images.views import NOBODY, VIEW_MIX_WITH
from ..manifest import MANIFEST, Plan
from ..mapped import MappedShard
from ..members import TEACHERS
from ..progress import bytes_bar
from ..reader import TeacherStore
from ..verify import describe
from ..writer import StoreWriter
from .config import MergeConfig
from .merge_kinds import ENSEMBLE, FIELDS, LAYOUT, ROWS, kind_of
from .merge_pieces import Piece, check_same, pieces_of_fields, pieces_of_rows
from .merge_teachers import Teachers, teachers_of
from .recut import check_apart, checked_shard, commit, indices, plain_folders, plan_of, shard_batch

MERGED = "merged_from"  # of a plan's identity: what each store was, and which rows or fields came of it


def merge(config: MergeConfig) -> dict[str, Any]:
    """Make one store of several in `config.output_dir`; see merge_kinds.py for which.

    Returns what `describe` says, and "merged": "rows", "fields" or "teachers". Raises StoreMismatch (naming what
    differs, counts and the first row), ConfigError, StoreError, StoreCorrupt, OutOfSpace.
    """
    output = Path(config.output_dir).expanduser()
    paths = [Path(path).expanduser() for path in config.stores]
    for path in paths:
        check_apart(output, path, "--output-dir")
    with ExitStack() as opened:
        stores = [opened.enter_context(TeacherStore.open(path)) for path in paths]
        keep = config.duplicates == "keep"
        kind = kind_of(stores, keep)
        pieces = pieces_of_rows(stores, keep) if kind == ROWS else pieces_of_fields(stores)
        teachers = teachers_of(stores) if kind == ENSEMBLE else None
        names = teachers.names if teachers else [dict[str, str]() for _ in stores]
        if kind != ROWS:
            check_same(stores, pieces, names)
        folders = plain_folders(stores[0].path)
        plan = _plan(stores, pieces, kind, teachers)
        with StoreWriter.begin(output, plan) as writer:
            _write(stores, pieces, names, writer)
            if not (output / MANIFEST).exists():
                writer.finish(folders)
    return {**describe(output), "merged": kind}


def _plan(stores: Sequence[TeacherStore], pieces: Sequence[Piece], kind: str, teachers: Teachers | None) -> Plan:
    first, shards = stores[0], [piece.plan for piece in pieces]
    identity = {**first.identity, MERGED: [_came(store, at, pieces, kind) for at, store in enumerate(stores)]}
    if teachers:
        identity[TEACHERS] = teachers.said
        return Plan(first.task, first.settings, identity, teachers.fields, shards, first.label_names)
    fields = {name: spec for store in reversed(stores) for name, spec in store.fields.items()}
    names = dict.fromkeys(name for store in stores for name in store.fields)
    settings = dict(first.settings)
    for store in stores[1:]:
        settings = _union(settings, store.settings, (LAYOUT[0],) if kind != FIELDS else (LAYOUT[0], "fields", "layers"))
    if kind != FIELDS:
        identity["dataset"] = _dataset(stores)
    specs = [{**fields, **first.fields}[name] for name in names]
    return Plan(first.task, settings, identity, specs, shards, first.label_names)


def _union(ours: Mapping[str, Any], theirs: Mapping[str, Any], listed: Sequence[str]) -> dict[str, Any]:
    """The first store's settings, what only others say, and together what is a list of things that are there."""
    made = {**theirs, **ours}
    for name in listed:
        if isinstance(ours.get(name), list) and isinstance(theirs.get(name), list):
            made[name] = list(dict.fromkeys([*ours[name], *theirs[name]]))
    return made


def _came(store: TeacherStore, at: int, pieces: Sequence[Piece], kind: str) -> dict[str, Any]:
    """Where rows or fields came from. Names of files and folders are left out."""
    said: dict[str, Any] = {"fingerprint": store.fingerprint, "sha256": store.manifest["sha256"]}
    for part in ("teacher", "dataset"):
        said[part] = {key: value for key, value in (store.identity.get(part) or {}).items() if key != "name"}
    said["versions"] = store.identity.get("versions")
    if MERGED in store.identity:
        said[MERGED] = store.identity[MERGED]
    if kind != ROWS:
        return {**said, "fields": list(store.fields)}
    splits: dict[str, dict[str, int]] = {}
    for piece in pieces:
        if piece.sources[0].store == at:
            split = splits.setdefault(piece.plan.split, {"rows": 0, "source_index_added": piece.added})
            split["rows"] += piece.sources[0].last
    return {**said, "splits": splits}


def _dataset(stores: Sequence[TeacherStore]) -> dict[str, Any]:
    """Of rows of several datasets: as many as they have, and a hash of theirs."""
    found = [store.identity.get("dataset") or {} for store in stores]
    if all(one.get("rows_sha256") == found[0].get("rows_sha256") for one in found):
        return dict(found[0])
    names = dict.fromkeys(str(one["name"]) for one in found if one.get("name"))
    return {
        "name": ", ".join(names), "revision": None, "rows": sum(int(one.get("rows") or 0) for one in found),
        "rows_sha256": digest([one.get("rows_sha256") for one in found]),
    }  # fmt: skip


def _write(
    stores: Sequence[TeacherStore], pieces: Sequence[Piece], names: Sequence[Mapping[str, str]], writer: StoreWriter
) -> None:
    missing = {shard.name for shard in writer.missing()}
    plans, shards = [plan_of(store) for store in stores], dict[tuple[int, int], MappedShard]()
    left = [piece for piece in pieces if piece.plan.name in missing]
    with bytes_bar("merge", sum(_bytes(stores, piece) for piece in left)) as bar:
        for piece in left:
            shards = {
                key: shards[key] for key in _keys(piece) if key in shards
            }  # of those before, what is cut here too
            for store, shard in _keys(piece):
                if (store, shard) not in shards:
                    shards[store, shard] = checked_shard(stores[store], plans[store], shard)
            columns = _columns(piece, shards, names, writer.plan)
            batch = shard_batch(columns, writer.plan.fields, piece.plan, writer.plan.fingerprint)
            commit(writer.path, piece.plan, batch, writer.plan.fingerprint)
            bar.advance(_bytes(stores, piece))


def _keys(piece: Piece) -> list[tuple[int, int]]:
    return [(source.store, source.shard) for source in piece.sources]


def _columns(
    piece: Piece, shards: Mapping[tuple[int, int], MappedShard], names: Sequence[Mapping[str, str]], plan: Plan
) -> dict[str, pa.Array]:
    """Each column from the first store that has it. names: of each store, what columns of it are called now."""
    made: dict[str, pa.Array] = {}
    for source in reversed(piece.sources):
        mapped = shards[source.store, source.shard]
        for name in mapped.names:
            placed = names[source.store].get(name, name)
            made[placed] = mapped.column(name).slice(source.first, source.last - source.first)
    if piece.added:
        made[schema.SOURCE_INDEX] = _moved(made[schema.SOURCE_INDEX], piece.added)
        if any(spec.name == VIEW_MIX_WITH for spec in plan.fields):
            made[VIEW_MIX_WITH] = _moved(made[VIEW_MIX_WITH], piece.added)
    return made


def _moved(column: pa.Array, added: int) -> pa.Array:
    """int64 numbers of source rows, those of no row left as they are."""
    values = np.frombuffer(column.buffers()[1] or b"", np.int64)[column.offset : column.offset + len(column)]
    return indices(np.where(values == NOBODY, values, values + added))


def _bytes(stores: Sequence[TeacherStore], piece: Piece) -> float:
    """Of the pieces that are read, about."""
    total = 0.0
    for source in piece.sources:
        entry = stores[source.store].manifest["shards"][source.shard]
        total += entry["bytes"] * (source.last - source.first) / max(entry["rows"], 1)
    return total
