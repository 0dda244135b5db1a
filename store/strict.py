"""What a store's JSON files may hold. A stranger may have written them: they are read within bounds, looked at before
anything is made of them, and shown short in errors. Everything here raises StoreCorrupt, on one line, naming the file.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import StoreCorrupt

LARGEST_JSON = 1 << 30  # bytes; a manifest of a million shards is 300 MB
LARGEST_SIDECAR = 1 << 16  # bytes; one is 250
DEEPEST = 200  # lists and objects in each other; a store that was merged again and again adds two each time
LONGEST_NAME = 200  # characters of a file's name; file systems take 255, with what is put behind it meanwhile
BEYOND = 1 << 62  # numbers of rows and bytes are below, and add up below what int64 holds
_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*").fullmatch
_SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
Kind = TypeVar("Kind")


def shown(value: Any) -> str:
    """A stranger's value as an error shows it: quoted, escaped, cut."""
    return _SHORT.repr(value)


def reason(error: Exception) -> str:
    """An error about a stranger's value as another error shows it: on one line, cut."""
    text = str(error)
    return text if text.isprintable() and len(text) <= 300 else shown(text)


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """One JSON object of a regular file of at most `largest` bytes: neither a pipe nor a device is waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreCorrupt(f"{path}: a regular file expected; got a folder, a pipe or a device")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        text = file.read(min(largest, os.fstat(file.fileno()).st_size) + 1)
    if len(text) > largest:
        raise StoreCorrupt(f"{path}: at most {largest} bytes of JSON expected; got more")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """One JSON object, no more than DEEPEST deep, whose strings can be written as UTF-8 again."""
    try:
        data = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{where} is not JSON ({error})") from error
    if type(data) is not dict:
        raise StoreCorrupt(f"{where}: one JSON object expected; got {type(data).__name__}")
    inner: list[Any] = [data]
    for _ in range(DEEPEST):
        within = (one.values() if type(one) is dict else one for one in inner)
        inner = [value for values in within for value in values if type(value) in (dict, list)]
        if not inner:
            break
    else:
        raise StoreCorrupt(f"{where}: lists and objects at most {DEEPEST} deep in each other expected; got more")
    if b"\\ud" in text or b"\\uD" in text:  # half of a pair, or both
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise StoreCorrupt(f"{where}: whole characters expected; got {error.object[error.start]!r}") from error
    return data


def member(data: dict[str, Any], name: str, kind: type[Kind], where: str) -> Kind:
    """data[name], of just this kind."""
    value = data.get(name)
    if type(value) is not kind:
        raise StoreCorrupt(f"{where}: {name} is {_KINDS[kind]}; got {shown(value)}")
    return value


def is_count(value: Any, below: int = BEYOND) -> bool:
    return type(value) is int and 0 <= value < below


def is_sha256(value: Any) -> bool:
    return type(value) is str and _SHA256(value) is not None


def is_entry(value: Any, *counts: str) -> bool:
    """Is it an object with `sha256` and these counts?"""
    return type(value) is dict and is_sha256(value.get("sha256")) and all(map(is_count, map(value.get, counts)))


def check_name(name: Any, where: str) -> str:
    """A split's or shard's name must be a plain file name: a stranger's manifest may not lead out of its folder."""
    if not (type(name) is str and len(name) <= LONGEST_NAME and _PLAIN(name)):
        raise StoreCorrupt(
            f"{where}: {shown(name)} is not a plain file name of at most {LONGEST_NAME} letters, digits, _, - and ."
        )
    return name


def check_inside(name: str, where: str) -> None:
    """The path of a file of a store: inside of its folder, of names that any file system takes."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and path.as_posix() == name and len(name) <= 4 * LONGEST_NAME
    if path.is_absolute() or ".." in path.parts or not plain or max(map(len, path.parts), default=0) > LONGEST_NAME:
        raise StoreCorrupt(
            f"{where}: {shown(name)} is not a path inside of the folder, of names of at most {LONGEST_NAME} letters"
        )
