"""Leases: which worker makes which shard. A lease ends with its owner, and what a dead worker held is taken up again.

    lock       an advisory lock on a file, which the kernel gives back the moment its process is gone
    heartbeat  for network file systems, where no kernel knows of another machine's death: a file that its owner
               touches four times in every `timeout`; one that was not touched for that long is anybody's

A worker that was only slow, and finds its heartbeat lease gone, must throw its work away: `held` says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from pathlib import Path
from typing import Protocol

KINDS = ("auto", "lock", "heartbeat")
TIMEOUT = 60.0  # seconds without a heartbeat after which its owner is taken for dead
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs", "smb3",
    "smbfs", "virtiofs",
}  # fmt: skip
_MOUNTS = Path("/proc/self/mounts")


class Lease(Protocol):
    """mark: what the names of its owner's temporary files hold, where two might think that they own it."""

    mark: str

    def held(self) -> bool:
        """Is it still ours?"""

    def release(self) -> None:
        """Give it back; a second time does nothing."""


def take(path: Path, kind: str = "auto", timeout: float = TIMEOUT) -> Lease | None:
    """The lease that the file `path` stands for; None while another has it."""
    kind = kind_for(path.parent) if kind == "auto" else kind
    return _Lock.take(path) if kind == "lock" else _Heartbeat.take(path, timeout)


def kind_for(folder: Path) -> str:
    """By the file system that the folder is on, as Linux knows it; "lock" where nothing is known."""
    try:
        lines = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:  # no Linux
        return "lock"
    folder = folder.resolve()
    mounts = [(Path(line[1].replace("\\040", " ")), line[2]) for line in lines if len(line) > 2]
    above = [(len(mount.parts), system) for mount, system in mounts if folder.is_relative_to(mount)]
    system = max(above, default=(0, ""))[1]
    return "heartbeat" if system in _NETWORK or system.startswith("fuse.") else "lock"


class _Lock:
    mark = ""

    def __init__(self, path: Path, file: int):
        self._path, self._file = path, file

    @classmethod
    def take(cls, path: Path) -> _Lock | None:
        while True:
            file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.fstat(file).st_ino == os.stat(path).st_ino
            except BlockingIOError:
                os.close(file)
                return None
            except FileNotFoundError:  # its last owner took the file away before we had the lock
                same = False
            if same:
                return cls(path, file)
            os.close(file)

    def held(self) -> bool:
        return self._file >= 0

    def release(self) -> None:
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


class _Heartbeat:
    def __init__(self, path: Path, mark: str, timeout: float):
        self._path, self.mark, self._timeout, self._ended = path, mark, timeout, threading.Event()
        threading.Thread(target=self._beat, name="predistill-lease", daemon=True).start()

    @classmethod
    def take(cls, path: Path, timeout: float) -> _Heartbeat | None:
        mark = f".{uuid.uuid4().hex}"
        if _create(path, mark):
            return cls(path, mark, timeout)
        try:
            if _age(path, path.with_name(path.name + mark)) < timeout:
                return None
        except FileNotFoundError:  # given back in this moment
            return None
        path.unlink(missing_ok=True)
        return cls(path, mark, timeout) if _create(path, mark) else None

    def held(self) -> bool:
        try:
            return not self._ended.is_set() and self._path.read_text() == self.mark
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self.held():
            self._path.unlink(missing_ok=True)
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout / 4):
            if not self.held():
                return
            with contextlib.suppress(OSError):  # a server that is away for a moment; `held` will tell
                os.utime(self._path)


def _create(path: Path, mark: str) -> bool:
    """Make the file, with its owner's mark in it, unless it is there."""
    try:
        with open(path, "x") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _age(path: Path, probe: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file server: that of a file made for the purpose."""
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
