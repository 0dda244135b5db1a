"""Two folders change places in one step, so that there is no moment without either."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from ..errors import StoreError
from ..shard import fsync_folder

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h


def swap(current: Path, made: Path, aside: Path) -> None:
    """`made` stands where `current` stood, which is afterwards where `made` was.

    Linux does it in one step on most file systems. Elsewhere `current` goes to `aside` first: a kill at that moment
    leaves no folder at its place, which `recover` mends. Raises StoreError where folders cannot be renamed there.
    """
    try:
        if not _exchange(current, made):
            os.rename(current, aside)
            os.rename(made, current)
            os.rename(aside, made)
    except OSError as error:
        if aside.exists() and not current.exists():
            os.rename(aside, current)
        raise StoreError(f"{current} cannot be renamed ({os.strerror(error.errno or 0)}); it is as it was") from error
    for folder in {current.parent, made.parent}:
        fsync_folder(folder)


def recover(current: Path, made: Path, aside: Path) -> None:
    """End a swap that was stopped between its renames."""
    if aside.exists() and not current.exists():
        os.rename(made if made.exists() else aside, current)
    if aside.exists() and not made.exists():
        os.rename(aside, made)


def _exchange(left: Path, right: Path) -> bool:
    """False where neither the C library nor the file system knows how."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_HERE, os.fsencode(left), _HERE, os.fsencode(right), _EXCHANGE) == 0
