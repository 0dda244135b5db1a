"""Room on the disk: looked at before, and named when it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..store.errors import OutOfSpace

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(folder: Path, needed: int) -> None:
    """Raises OutOfSpace, with both figures, where `needed` bytes cannot fit."""
    free = free_bytes(folder)
    if needed > free:
        raise OutOfSpace(
            f"--output-dir {folder} needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: nothing was started; "
            "make room, or dump fewer splits or columns"
        )


@contextlib.contextmanager
def out_of_space(folder: Path) -> Iterator[None]:
    """A full disk becomes OutOfSpace naming the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OutOfSpace(
            f"{folder}: {os.strerror(error.errno)}, {free_bytes(folder) / 1e9:.3g} GB free; what was committed is "
            "safe: make room, then run the same dump again"
        ) from error
