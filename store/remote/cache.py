"""Shards of stores that are elsewhere, kept on this disk up to a size; the least recently used go first.

    ~/.cache/predistill/stores/KEY/  a store folder whose shards come when they are read; KEY is its manifest's hash
    ~/.cache/predistill/users/       a file for each opened store: what it maps, locked while its process lives

A shard is there whole or not at all: it arrives under another name and is renamed once its sha256 was checked. Any
number of processes share a cache. What one of them maps stays, whatever the limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ConfigError, OutOfSpace
from ..sizes import parse_size

FOLDER, LIMIT = "PREDISTILL_CACHE", "PREDISTILL_CACHE_SIZE"  # in the environment
_LIMIT = "100GB"


class Cache:
    """A folder and its limit in bytes, of all shards together. Raises ConfigError where it cannot be written."""

    def __init__(self, root: str | os.PathLike[str] | None = None, limit: int | str | None = None):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "predistill"
        self.root = Path(root or os.environ.get(FOLDER) or home).expanduser().absolute()
        try:
            self.limit = parse_size(limit if limit is not None else os.environ.get(LIMIT) or _LIMIT)
        except ConfigError as error:
            raise ConfigError(f"{LIMIT}: {error}") from error
        try:
            for name in ("stores", "users"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with self.mutex():
                pass
        except OSError as error:
            raise ConfigError(f"the cache {self.root} cannot be written ({error.strerror}): set {FOLDER} to a folder "
                              "that can") from error  # fmt: skip

    def folder(self, key: str) -> Path:
        return self.root / "stores" / key

    @contextlib.contextmanager
    def mutex(self) -> Iterator[None]:
        """Held for moments: while it is noted what is in use, and while files go."""
        with _locked(self.root / "lock"):
            yield

    def make_room(self, size: int) -> None:
        """Under the mutex: the least recently used shards go until `size` bytes fit. Raises OutOfSpace."""
        held = sorted(_shards(self.root / "stores"))
        total = sum(found for _, found, _ in held)
        used: set[str] | None = None
        for _, found, path in held:
            if total + size <= self.limit:
                return
            used = self._in_use() if used is None else used
            if str(path).removesuffix(".part") not in used:
                path.unlink(missing_ok=True)
                total -= found
        if size and total + size > self.limit:
            raise OutOfSpace(
                f"the cache {self.root} may hold {_gigabytes(self.limit)}: {_gigabytes(total)} are mapped by running "
                f"processes, {_gigabytes(size)} are to come; set {LIMIT} higher, read fewer rows, or predistill pull it"
            )

    def _in_use(self) -> set[str]:
        """Paths that living processes have noted; what dead ones have noted is forgotten."""
        found: set[str] = set()
        for path in (self.root / "users").iterdir():
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.update(file.read().decode(errors="replace").splitlines())
                else:
                    path.unlink(missing_ok=True)
        return found


class CacheUser:
    """What one opened store maps: a note, locked until it is closed, or its process and what it forked have ended."""

    def __init__(self, cache: Cache):
        self.cache = cache
        with cache.mutex():
            self._note, _ = tempfile.mkstemp(dir=cache.root / "users")
            fcntl.flock(self._note, fcntl.LOCK_EX)
        self._closing = weakref.finalize(self, os.close, self._note)

    def shard(self, path: Path, size: int, fetch: Callable[[Path], None]) -> Path:
        """A shard's path, once it is there. fetch(path): puts it there, whole and checked; called where it is not."""
        with self.cache.mutex():
            os.write(self._note, f"{path}\n".encode())
            if _is_whole(path, size):
                os.utime(path)
                return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # another process may be fetching it
            if not _is_whole(path, size):
                with self.cache.mutex():
                    arrived = path.with_name(path.name + ".part")
                    self.cache.make_room(size - (arrived.stat().st_size if arrived.exists() else 0))
                fetch(path)
                with self.cache.mutex():  # others may have fetched meanwhile
                    self.cache.make_room(0)
        return path

    def close(self) -> None:
        self._closing()


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _shards(stores: Path) -> Iterator[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of what has arrived, or has begun to."""
    for pattern in ("*/shards/*.arrow", "*/shards/*.part"):
        for path in stores.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
