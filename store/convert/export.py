"""A store in another format: `predistill export`. A file for each shard, one after another, a few rows at a time.

    export.json (what is exported, and how) -> a file a shard -> export.json with the files

Every file is written under a temporary name and renamed; one that is there is done, so the same command goes on.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import manifest
from ..atomic import out_of_space
from ..errors import ConfigError
from ..identity import file_sha256
from ..mapped import MappedShard
from ..members import tellers
from ..progress import bytes_bar
from ..reader import TeacherStore
from ..shard import ShardPlan, fsync_folder
from ..strict import read_json
from ..writer import take_lock
from .config import ExportConfig
from .recut import check_apart, checked_shard, plan_of

EXPORT, LOCK = "export.json", ".lock"
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar", "safetensors": ".safetensors"}

Write = Callable[[MappedShard, ShardPlan, int, Path, bool], None]


def export(config: ExportConfig) -> dict[str, Any]:
    """Write every shard of a store as one file of `config.format` in `config.output`.

    Returns {"output", "format", "raw", "files": [{"name", "rows", "bytes", "sha256"}], "samples", "bytes"}. Raises
    ConfigError where the folder holds something else, StoreError, StoreCorrupt, OutOfSpace.
    """
    output = Path(config.output).expanduser()
    write: Write = importlib.import_module(f".export_{config.format}", __package__).write
    folder = Path(config.store).expanduser()
    check_apart(output, folder, "OUTPUT")
    with TeacherStore.open(folder) as store:
        about = _about(store, config)
        _check_folder(output, about)
        with out_of_space(output):
            output.mkdir(parents=True, exist_ok=True)
            with take_lock(output / LOCK, "export"):
                if not (output / EXPORT).exists():
                    manifest.write_json(output / EXPORT, about)
                files = _files(store, config, output, write)
                manifest.write_json(output / EXPORT, {**about, "files": files})
    return {
        "output": str(output), "format": config.format, "raw": config.raw, "files": files,
        "samples": sum(one["rows"] for one in files), "bytes": sum(one["bytes"] for one in files),
    }  # fmt: skip


def _files(store: TeacherStore, config: ExportConfig, output: Path, write: Write) -> list[dict[str, Any]]:
    made, plan = [], plan_of(store)
    with bytes_bar("export", sum(entry["bytes"] for entry in store.manifest["shards"])) as bar:
        for at, (shard, entry) in enumerate(zip(store.shards, store.manifest["shards"], strict=True)):
            path = output / f"{shard.name}{SUFFIXES[config.format]}"
            if not path.exists():
                temporary = path.with_name(path.name + ".tmp")
                with out_of_space(output, temporary):
                    write(checked_shard(store, plan, at), shard, int(store.first_row[at]), temporary, config.raw)
                    _settle(temporary, path)
            made.append(
                {"name": path.name, "rows": entry["rows"], "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            )
            bar.advance(entry["bytes"])
    return made


def _settle(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def _about(store: TeacherStore, config: ExportConfig) -> dict[str, Any]:
    """What the files were made from, and what a reader of them must know."""
    return {
        "format": config.format, "raw": config.raw, "task": store.task, "fingerprint": store.fingerprint,
        "store_sha256": store.manifest["sha256"], "label_names": store.label_names,
        "teachers": {one.prefix: one.name for one in tellers(store)},
        "fields": [spec.to_json() for spec in store.fields.values()],
        "shards": [{**shard.to_json(), "name": shard.name} for shard in store.shards],
    }  # fmt: skip


def _check_folder(output: Path, about: dict[str, Any]) -> None:
    """Raises ConfigError for a folder that is no export of the same store in the same way."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"OUTPUT {output} is a file; give a folder that is new or empty")
    names = {entry.name for entry in output.iterdir()} - {LOCK, f"{EXPORT}.tmp"}
    if not names:
        return
    if EXPORT not in names:
        raise ConfigError(
            f"OUTPUT {output} holds {sorted(names)[0]} and is no export; give a folder that is new or empty"
        )
    said = read_json(output / EXPORT)
    for name, value in about.items():
        if said.get(name) != value:
            what = {"format": "of another --format", "raw": "with another --raw"}.get(name, "of another store")
            raise ConfigError(f"OUTPUT {output} holds an export {what}; give another folder")
