"""The plan of shards, atomic commit, resume.

    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            builder = writer.open_shard(shard, rows, lengths)
            builder.put(...)
            writer.commit(builder)
        writer.finish()

Nothing under its final name is ever half-written (atomic.py). A kernel lock, gone with the process that held it, keeps
a second writer out; shared.py has the writer for any number of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from . import index, manifest
from .atomic import out_of_space, replace_folder, write_synced, write_text
from .buffers import Memory
from .card import store_card
from .errors import ConfigError, StoreError, StoreMismatch
from .identity import compare, digest
from .manifest import Plan, shard_path
from .parts import part_names
from .shard import ShardBuilder, ShardPlan, fsync_folder

INFORMATION = tuple(f"identity.{part}.name" for part in manifest.NAMED)  # paths are no identity


class StoreWriter:
    """Holds the folder's lock from `begin` to `close`; `commit` may be called from one background thread.

    Raises ConfigError where the folder holds something that is not a store, StoreMismatch where it holds a store
    of other settings, StoreError where another dump is writing, OutOfSpace where the disk is full.
    """

    def __init__(self, path: Path, plan: Plan, lock: IO[bytes]):
        self.path, self.plan, self._lock, self._memory = path, plan, lock, Memory()

    @classmethod
    def begin(cls, path: str | os.PathLike[str], plan: Plan, overwrite: bool = False) -> StoreWriter:
        path = Path(path)
        lock = enter(path)
        with closed_on_failure(lock):
            return cls(path, settle(path, plan, overwrite), lock)

    def missing(self) -> list[ShardPlan]:
        """Shards that are not yet committed, in plan order."""
        done = manifest.committed(self.path, self.plan)
        return [shard for shard in self.plan.shards if shard.name not in done]

    def open_shard(self, shard: ShardPlan, rows: int, lengths: Mapping[str, np.ndarray]) -> ShardBuilder:
        """A builder with all of the shard's buffers in memory. lengths: {"S": int64[rows]}."""
        return ShardBuilder(shard, self.plan.fields, rows, lengths, self._memory)

    def commit(self, builder: ShardBuilder) -> dict[str, Any] | None:
        """Write the shard under a temporary name, fsync, rename, then its sidecar, which makes it count.

        Returns {"sha256", "bytes", "rows", "tokens"}.
        """
        return self._commit(builder, always)

    def _commit(self, builder: ShardBuilder, owned: Callable[[], bool], mark: str = "") -> dict[str, Any] | None:
        """None where, with all bytes written, `owned` says that they are not wanted. mark: of temporary names."""
        path = shard_path(self.path, builder.plan.name)
        temporary = path.with_name(f"{path.name}{mark}.tmp")
        with out_of_space(self.path, temporary, path.with_suffix(".json.tmp")):
            written = write_synced(builder.to_batch(self.plan.fingerprint), temporary)
            self._memory.give(builder.memory())
            if not owned():
                temporary.unlink(missing_ok=True)
                return None
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(temporary, path)
            fsync_folder(path.parent)
            entry = {**written, "rows": builder.rows, "tokens": builder.tokens}
            manifest.write_json(path.with_suffix(".json"), {**entry, "fingerprint": self.plan.fingerprint})
        return entry

    def finish(
        self, folders: Mapping[str, Path] | None = None, licences: Mapping[str, str | None] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Index, samples, card and folders ({"tokenizer": saved folder}), and store.json last.

        licences: for the card, by the names in card.LICENCES. Returns the manifest. Raises StoreError where shards
        are missing.
        """
        done = manifest.committed(self.path, self.plan)
        if len(done) < len(self.plan.shards):
            raise StoreError(
                f"{self.path}: {len(done)} of {len(self.plan.shards)} shards are committed; dump the rest first"
            )
        shards = [{"name": shard.name, **done[shard.name]} for shard in self.plan.shards]
        made = {
            "format_version": manifest.FORMAT_VERSION,
            "plan": self.plan.to_json(),
            "fingerprint": self.plan.fingerprint,
            "shards": shards,
        }
        with out_of_space(self.path, self.path / f"{manifest.INDEX}.tmp"):
            for name, source in (folders or {}).items():
                replace_folder(self.path / name, Path(source))
            index.build(self.path, made)
            write_text(self.path / manifest.CARD, store_card(self.path, made, licences))
            made = manifest.sealed({**made, "files": manifest.described_files(self.path)})
            manifest.write_json(self.path / manifest.MANIFEST, made)
        return made

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_folder(path: Path) -> None:
    """A dump may go into a folder that is not there, is empty, or holds a store; nothing else is touched."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output-dir {path} is a file; give a folder that is new, empty or a store")
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()} - {manifest.LOCK, manifest.SHARDS, f"{manifest.PLAN}.tmp"}
        if names and manifest.PLAN not in names:
            raise ConfigError(
                f"--output-dir {path} holds {', '.join(sorted(names)[:3])} and is not a store; "
                "give a folder that is new, empty or a store"
            )


def _compare_plans(path: Path, stored: Plan, current: Plan) -> None:
    """Settings before what follows from them, so that the refusal names what a person chose."""
    left, right = stored.to_json() | {"grows_by": stored.grows_by}, current.to_json() | {"grows_by": current.grows_by}
    for plan in (left, right):
        plan["fields"] = {spec["name"]: spec for spec in plan["fields"]}
        plan["shards"] = digest(plan["shards"])
    for section in ("task", "settings", "identity", "fields", "label_names", "shards", "grows_by"):
        compare(str(path), {section: left[section]}, {section: right[section]}, ignore=INFORMATION)


def enter(path: Path, alone: bool = True) -> IO[bytes]:
    """The lock of a folder that may become a store."""
    check_folder(path)
    with out_of_space(path):
        (path / manifest.SHARDS).mkdir(parents=True, exist_ok=True)
        return take_lock(path / manifest.LOCK, "dump", alone)


def settle(path: Path, plan: Plan, overwrite: bool) -> Plan:
    """The plan that is there, or else this one, written. Raises StoreMismatch where they differ."""
    with out_of_space(path):
        if overwrite:
            _clear(path)
        if not (path / manifest.PLAN).exists():
            manifest.write_json(path / manifest.PLAN, plan.to_json())
            return plan
        stored = manifest.read_plan(path)
        if (stored.grows_by is None) != (plan.grows_by is None):
            begun = ("with", "give it again") if plan.grows_by is None else ("without", "leave it away")
            raise StoreMismatch(f"{path} was dumped {begun[0]} --streaming: {begun[1]}, or give another --output-dir")
        _compare_plans(path, stored.base, plan.base)
        return stored


@contextlib.contextmanager
def closed_on_failure(lock: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.close()
        raise


def always() -> bool:
    return True


def take_lock(path: Path, writer: str, alone: bool = True) -> IO[bytes]:
    """Held until it is closed, or its process ends. alone: nobody else may hold it.

    Raises StoreError where another `writer` has the folder.
    """
    lock = open(path, "ab")  # noqa: SIM115  held until close
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StoreError(f"{path.parent} is being written by another {writer}; wait for it, or stop it") from error
    return lock


def _clear(path: Path) -> None:
    """Manifest first and plan last, so that a kill between leaves an unfinished store, never a folder of no kind."""
    for name in (manifest.MANIFEST, manifest.INDEX, manifest.SAMPLES, manifest.CARD):
        (path / name).unlink(missing_ok=True)
    for name in manifest.FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for file in (path / manifest.SHARDS).iterdir():
        file.unlink()
    for name in reversed(part_names(path)):
        (path / name).unlink()
    (path / manifest.PLAN).unlink(missing_ok=True)
