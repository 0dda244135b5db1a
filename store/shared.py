"""The writer for any number of processes, on one machine or many, that make one store's shards together.

    with SharedWriter.begin(path, plan) as writer:
        for shard in writer.claim():
            ...
            writer.commit(builder)
        writer.finish()

Workers come and go: each claims one missing shard after another by its own lease, nobody waits for a slow one before
there is nothing else to do, and what a dead one held is claimed again. One of them builds the index.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from . import lease, manifest
from .errors import StoreError
from .lease import Lease
from .manifest import Plan
from .shard import ShardBuilder, ShardPlan
from .writer import StoreWriter, always, closed_on_failure, enter, settle

_POLL = 0.5  # seconds between looks at what others hold
_PATIENCE = 10.0  # seconds, before a folder that somebody has alone is given up
LEASE = ".lease"
PLANNING, _FINISHING = f"plan{LEASE}", f"store{LEASE}"  # held by the one that writes plan.json, and store.json


class SharedWriter(StoreWriter):
    """One of the workers on a store. Raises what StoreWriter raises; StoreError where one writes that wants it alone.

    kind, timeout: of its leases (lease.py).
    """

    def __init__(self, path: Path, plan: Plan, lock: IO[bytes], kind: str = "auto", timeout: float = lease.TIMEOUT):
        super().__init__(path, plan, lock)
        self._kind = lease.kind_for(path) if kind == "auto" else kind
        self._timeout, self._leases, self._closed = timeout, dict[str, Lease](), threading.Event()

    @classmethod
    def begin(
        cls, path: str | os.PathLike[str], plan: Plan, overwrite: bool = False, kind: str = "auto",
        timeout: float = lease.TIMEOUT,
    ) -> Self:  # fmt: skip
        """overwrite: what is there goes; so does, in any case, a plan of which nothing is committed. Neither does where
        somebody is at work on it."""
        path = Path(path)
        try:
            lock, alone = enter(path), True
        except StoreError:
            if overwrite:
                raise
            lock, alone = _joined(path), False
        with closed_on_failure(lock), waited(path / manifest.SHARDS / PLANNING, kind, timeout):
            made = cls(path, settle(path, plan, overwrite or (alone and _is_untouched(path))), lock, kind, timeout)
            fcntl.flock(lock, fcntl.LOCK_SH)  # others may come
        return made

    def claim(self, waiting: Callable[[int], None] = lambda shards: None) -> Iterator[ShardPlan]:
        """Shards for this worker to make, one at a time, until all others are committed or claimed by it.

        waiting: told, once, how many shards others are making when there is nothing left to claim.
        """
        missing, told = self.missing(), False
        while missing and not self._closed.is_set():
            claimed = False
            for shard in missing:
                if self._claimed(shard):
                    claimed = True
                    yield shard
            missing = [
                shard for shard in missing
                if shard.name not in self._leases and not manifest.is_committed(self.path, self.plan, shard)
            ]  # fmt: skip
            if missing and not claimed:
                if not told:
                    waiting(len(missing))
                told = True
                self._closed.wait(_POLL)

    def commit(self, builder: ShardBuilder) -> dict[str, Any] | None:
        """As StoreWriter does; None where the lease was lost meanwhile, and the shard is another's to make."""
        held = self._leases.get(builder.plan.name)
        if held is None:
            return self._commit(builder, always)
        try:
            return self._commit(builder, held.held, held.mark)
        finally:
            held.release()
            self._leases.pop(builder.plan.name, None)

    def finish(
        self, folders: Mapping[str, Path] | None = None, licences: Mapping[str, str | None] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Once for all workers: those that come later are given the same manifest."""
        with waited(self.path / manifest.SHARDS / _FINISHING, self._kind, self._timeout):
            made = self._finished() or super().finish(folders, licences)
            for file in (self.path / manifest.SHARDS).iterdir():  # of workers that died
                if file.name.endswith((".tmp", LEASE)) and file.name != _FINISHING:
                    file.unlink(missing_ok=True)
        return made

    def close(self) -> None:
        """Gives back what is claimed and not committed; nothing more is claimed."""
        self._closed.set()
        for name in list(self._leases):
            self._leases.pop(name).release()
        super().close()

    def _claimed(self, shard: ShardPlan) -> bool:
        path = manifest.shard_path(self.path, shard.name).with_suffix(LEASE)
        held = None if self._closed.is_set() else lease.take(path, self._kind, self._timeout)
        if held is None:
            return False
        self._leases[shard.name] = held
        if self._closed.is_set() or manifest.is_committed(self.path, self.plan, shard):
            self._leases.pop(shard.name, held).release()
            return False
        return True

    def _finished(self) -> dict[str, Any] | None:
        """The manifest, where it is of the shards that are there."""
        if not (self.path / manifest.MANIFEST).exists():
            return None
        made = manifest.read_manifest(self.path)
        done = manifest.committed(self.path, self.plan)
        now = [{"name": shard.name, **done[shard.name]} for shard in self.plan.shards if shard.name in done]
        return made if (made["fingerprint"], made["shards"]) == (self.plan.fingerprint, now) else None


def _joined(path: Path) -> IO[bytes]:
    """The lock beside others; whoever has it alone for a moment, to write the plan, is waited for."""
    patience = time.monotonic() + _PATIENCE
    while True:
        try:
            return enter(path, alone=False)
        except StoreError:
            if time.monotonic() > patience:
                raise
        time.sleep(_POLL / 10)


def _is_untouched(path: Path) -> bool:
    return (path / manifest.PLAN).exists() and not manifest.committed(path, manifest.read_plan(path))


@contextlib.contextmanager
def waited(path: Path, kind: str, timeout: float) -> Iterator[None]:
    """Alone among the workers, however long it takes."""
    while (held := lease.take(path, kind, timeout)) is None:
        time.sleep(_POLL / 10)
    try:
        yield
    finally:
        held.release()
