"""Stored rows into new shards, by Arrow buffers: what merge and drop write. No value passes through Python.

A shard says in its metadata which plan it is of, so that a shard of another plan is written anew, at the disk's speed;
one whose rows and plan stay is linked, or copied where the file system has no links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from .. import manifest, schema
from ..atomic import out_of_space, write_file
from ..errors import ConfigError, StoreCorrupt
from ..identity import file_sha256
from ..manifest import Plan, shard_path
from ..mapped import MappedShard
from ..reader import TeacherStore
from ..schema import INPUT_IDS, FieldSpec
from ..shard import ShardPlan
from ..verify import check_structure


def checked_shard(store: TeacherStore, plan: Plan, at: int) -> MappedShard:
    """Shard number `at` of a store and its plan, once its bytes were held against the manifest: what is damaged must
    not be written anew with a checksum of its own. Raises StoreCorrupt."""
    shard, entry = store.shards[at], store.manifest["shards"][at]
    path = plain_file(store.shard_path(at))
    if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
        raise StoreCorrupt(f"{path} is not what the dump wrote: see predistill verify {store.path}")
    return check_structure(path, plan, shard, entry)


def check_apart(output: Path, store: Path, name: str) -> None:
    """Raises ConfigError where something would be written into a store."""
    if output.resolve().is_relative_to(store.resolve()):
        raise ConfigError(f"{name} {output} is {store}, or in it; give a folder elsewhere")


def plain_file(path: Path) -> Path:
    """Raises StoreCorrupt for anything else than a file: a stranger's link may lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise StoreCorrupt(f"{path}: a plain file expected; it is {'a link' if path.is_symlink() else 'not there'}")
    return path


def plain_folders(folder: Path) -> dict[str, Path]:
    """{"tokenizer": …}: what the inputs were made with, without links in it. Raises StoreCorrupt."""
    found = {name: folder / name for name in manifest.FOLDERS if (folder / name).exists()}
    for path in found.values():
        for each in (path, *path.rglob("*")):
            if each.is_symlink() or not (each.is_file() or each.is_dir()):
                raise StoreCorrupt(f"{each}: a plain file or folder expected; a store has no links")
    return found


def indices(values: np.ndarray) -> pa.Array:
    """int64 [N] as Arrow, without pandas."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def shard_batch(
    columns: Mapping[str, pa.Array], fields: Sequence[FieldSpec], shard: ShardPlan, fingerprint: str
) -> pa.RecordBatch:
    """One shard of these columns, which says of itself what it is."""
    names = [*schema.ADDRESS_COLUMNS, *(spec.name for spec in fields)]
    arrays = [columns[name] for name in names]
    described = schema.metadata(fields, {**shard.to_json(), "rows": len(arrays[0])}, fingerprint)
    kinds = [
        pa.field(name, array.type, nullable=array.null_count > 0) for name, array in zip(names, arrays, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(kinds, metadata=described))


def commit(folder: Path, shard: ShardPlan, batch: pa.RecordBatch, fingerprint: str) -> None:
    """The file, then its sidecar, which makes it count."""
    path = shard_path(folder, shard.name)
    with out_of_space(folder, path.with_suffix(".arrow.tmp"), path.with_suffix(".json.tmp")):
        path.with_suffix(".json").unlink(missing_ok=True)
        written = write_file(batch, path)
        entry = {**written, "rows": batch.num_rows, "tokens": _tokens(batch), "fingerprint": fingerprint}
        manifest.write_json(path.with_suffix(".json"), entry)


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy of it."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(plain_file(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def _tokens(batch: pa.RecordBatch) -> int:
    """Of all rows; sliced lists have offsets that do not begin at 0."""
    at = batch.schema.get_field_index(INPUT_IDS)
    if at < 0 or not batch.num_rows:
        return 0
    column = batch.column(at)
    starts = np.frombuffer(column.buffers()[1], np.int64)[column.offset :]
    return int(starts[batch.num_rows] - starts[0])


def plan_of(store: TeacherStore) -> Plan:
    return manifest.plan_of(store.manifest, str(store.path))
