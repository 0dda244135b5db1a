"""The plan of shards, atomic commit, resume.

    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            builder = writer.open_shard(shard, rows, lengths)
            builder.put(...)
            writer.commit(builder)
        writer.finish(card)

Nothing under its final name is ever half-written: every file gets a temporary name, fsync, rename, and fsync of
its folder. A kernel lock, gone with the process that held it, keeps a second dump out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from . import index, manifest
from .buffers import Memory
from .errors import ConfigError, OutOfSpace, StoreError
from .identity import compare, digest
from .manifest import Plan, shard_path
from .shard import ShardBuilder, ShardPlan, fsync_folder, write_arrow

INFORMATION = tuple(f"identity.{part}.name" for part in manifest.NAMED)  # paths are no identity
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        check_folder(path)
        with _out_of_space(path):
            (path / manifest.SHARDS).mkdir(parents=True, exist_ok=True)
            lock = take_lock(path / manifest.LOCK, "dump")
            try:
                if overwrite:
                    _clear(path)
                if (path / manifest.PLAN).exists():
                    stored = manifest.read_plan(path)
                    _compare_plans(path, stored, plan)
                    plan = stored
                else:
                    manifest.write_json(path / manifest.PLAN, plan.to_json())
            except BaseException:
                lock.close()
                raise
        return cls(path, plan, lock)

    def missing(self) -> list[ShardPlan]:
        """Shards that are not yet committed, in plan order."""
        done = manifest.committed(self.path, self.plan)
        return [shard for shard in self.plan.shards if shard.name not in done]

    def open_shard(self, shard: ShardPlan, rows: int, lengths: Mapping[str, np.ndarray]) -> ShardBuilder:
        """A builder with all of the shard's buffers in memory. lengths: {"S": int64[rows]}."""
        return ShardBuilder(shard, self.plan.fields, rows, lengths, self._memory)

    def commit(self, builder: ShardBuilder) -> dict[str, Any]:
        """Write the shard under a temporary name, fsync, rename, then its sidecar, which makes it count."""
        path = shard_path(self.path, builder.plan.name)
        with _out_of_space(self.path, path.with_suffix(".arrow.tmp"), path.with_suffix(".json.tmp")):
            path.with_suffix(".json").unlink(missing_ok=True)
            written = write_file(builder.to_batch(self.plan.fingerprint), path)
            entry = {**written, "rows": builder.rows, "tokens": builder.tokens}
            manifest.write_json(path.with_suffix(".json"), {**entry, "fingerprint": self.plan.fingerprint})
        self._memory.give(builder.memory())
        return entry

    def finish(self, card: str | None = None, folders: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """Index, samples, card and folders ({"tokenizer": saved folder}), and store.json last.

        Returns the manifest. Raises StoreError where shards are missing.
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
        with _out_of_space(self.path, self.path / f"{manifest.INDEX}.tmp"):
            for name, source in (folders or {}).items():
                _replace_folder(self.path / name, Path(source))
            index.build(self.path, made)
            if card is not None:
                _write_text(self.path / manifest.CARD, card)
            made = manifest.sealed({**made, "files": manifest.described_files(self.path)})
            manifest.write_json(self.path / manifest.MANIFEST, made)
        return made

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Hashing:
    """A file whose bytes are hashed in a thread, beside the writing and the fsync: each takes about as long."""

    def __init__(self, file: IO[bytes]):
        self._file, self.bytes, self.closed = file, 0, False
        self._sha256, self._thread = hashlib.sha256(), ThreadPoolExecutor(1, "predistill-sha256")

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._thread.submit(self._sha256.update, view)
        written = 0
        while written < view.nbytes:  # a raw file writes at most 2 GB at a time
            written += self._file.write(view[written:]) or 0
        self.bytes += view.nbytes
        return view.nbytes

    def digest(self) -> str:
        self._thread.shutdown()
        return self._sha256.hexdigest()

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def write_file(batch: Any, path: Path) -> dict[str, Any]:
    """One Arrow file, whole or not at all. Returns {"sha256", "bytes"}."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as file:
        sink = _Hashing(file)
        try:
            write_arrow(batch, sink)
            os.fsync(file.fileno())
        finally:
            sha256 = sink.digest()
    os.replace(temporary, path)
    fsync_folder(path.parent)
    return {"sha256": sha256, "bytes": sink.bytes}


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
    left, right = stored.to_json(), current.to_json()
    for plan in (left, right):
        plan["fields"] = {spec["name"]: spec for spec in plan["fields"]}
        plan["shards"] = digest(plan["shards"])
    for section in ("task", "settings", "identity", "fields", "label_names", "shards"):
        compare(str(path), {section: left[section]}, {section: right[section]}, ignore=INFORMATION)


def take_lock(path: Path, writer: str) -> IO[bytes]:
    """Held until it is closed, or its process ends. Raises StoreError where another `writer` has the folder."""
    lock = open(path, "ab")  # noqa: SIM115  held until close
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    (path / manifest.PLAN).unlink(missing_ok=True)


def _replace_folder(target: Path, source: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for file in temporary.rglob("*"):
        with open(file, "rb") if file.is_file() else contextlib.nullcontext() as copied:
            if copied is not None:
                os.fsync(copied.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    fsync_folder(target.parent)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _out_of_space(folder: Path, *temporary: Path) -> Iterator[None]:
    """A full disk (or quota, or file-size limit) becomes OutOfSpace, with figures; temporary files go."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        for path in temporary:
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise OutOfSpace(
            f"{folder}: {os.strerror(error.errno)} ({free / 1e9:.3g} GB free); what was committed is safe: "
            "make room, then run the same dump again"
        ) from error
