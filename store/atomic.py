"""Files and folders that are there whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from .errors import OutOfSpace
from .shard import fsync_folder, write_arrow

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def write_synced(batch: Any, path: Path) -> dict[str, Any]:
    """One Arrow file, on the disk when this returns {"sha256", "bytes"}; for a temporary name, to be renamed."""
    with open(path, "wb", buffering=0) as file:
        sink = _Hashing(file)
        try:
            write_arrow(batch, sink)
            os.fsync(file.fileno())
        finally:
            sha256 = sink.digest()
    return {"sha256": sha256, "bytes": sink.bytes}


def write_file(batch: Any, path: Path) -> dict[str, Any]:
    """One Arrow file, whole or not at all. Returns {"sha256", "bytes"}."""
    temporary = path.with_name(path.name + ".tmp")
    written = write_synced(batch, temporary)
    os.replace(temporary, path)
    fsync_folder(path.parent)
    return written


def replace_folder(target: Path, source: Path) -> None:
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


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def out_of_space(folder: Path, *temporary: Path) -> Iterator[None]:
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
            "make room, then run the same command again"
        ) from error
