"""Files from a place to this disk, checked; several at once, with a bar."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from .. import manifest
from ..errors import OutOfSpace, StoreCorrupt, StoreError, StoreIncomplete, StoreMismatch
from ..shard import fsync_folder
from ..strict import LARGEST_JSON, parse_json
from .elsewhere import Place, explained

CHUNK = 16 << 20  # bytes asked for at a time
_CARD_BYTES = 1 << 20  # a card is not listed in the manifest; what is longer is none
_READ = 1 << 20
Advance = Callable[[float], None]
T = TypeVar("T")


def nothing(done: float) -> None:
    pass


def read_remote_manifest(place: Place) -> dict[str, Any]:
    """store.json at the other end, checked. Raises StoreIncomplete for half a store, StoreError for none."""
    found = place.stat(manifest.MANIFEST)
    if found is None:
        if place.stat(manifest.PLAN) is not None:
            raise StoreIncomplete(
                f"{place.url} is half a store: {manifest.MANIFEST}, which arrives last, is not there; run the same "
                "push again, or wait for it"
            )
        raise StoreError(f"{place.url} is not a store, or is not there: it has no {manifest.MANIFEST}")
    where = f"{place.url}/{manifest.MANIFEST}"
    if found.size > LARGEST_JSON:
        raise StoreCorrupt(f"{where}: {found.size} bytes is no manifest")
    made = manifest.check_manifest(parse_json(place.read(manifest.MANIFEST), where), where)
    for name, entry in made.get("files", {}).items():
        check_file(name, entry, where)
    for entry in made["shards"]:
        if not _is_sha256(entry.get("sha256")):
            raise StoreCorrupt(f"{where}: shard {entry['name']} has no sha256")
    return made


def check_file(name: str, entry: Any, where: str) -> None:
    """A stranger's manifest may name files of `tokenizer/`, `processor/` and samples.parquet alone."""
    top, _, rest = name.partition("/")
    known = name == manifest.SAMPLES or (top in manifest.FOLDERS and rest)
    sound = isinstance(entry, Mapping) and type(entry.get("bytes")) is int and entry["bytes"] >= 0
    if not (known and name.isprintable() and sound and _is_sha256(entry.get("sha256"))):
        raise StoreCorrupt(f"{where}: its file {name[:200]!r} is not one that a store has")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def fetch(
    place: Place, name: str, path: Path, entry: Mapping[str, Any], advance: Advance = nothing, made: Any = None
) -> None:
    """A file under its final name, once it has the bytes and the sha256 of its entry; an interrupted one goes on.

    made: the manifest that the entry is of, so that a place that changes meanwhile can be told from a damaged one.
    """
    part = path.with_name(path.name + ".part")
    with explained(str(path.parent)):
        part.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        sound = _download(place, name, part, entry, advance)
        if not sound and resumed:  # what lay there was of another file
            part.unlink(missing_ok=True)
            sound = _download(place, name, part, entry, nothing)
        if not sound:
            part.unlink(missing_ok=True)
            raise _unlike(place, name, made)
        os.replace(part, path)
        fsync_folder(path.parent)


def _download(place: Place, name: str, part: Path, entry: Mapping[str, Any], advance: Advance) -> bool:
    """Are these the bytes of the entry?"""
    state, done = hashlib.sha256(), 0
    with open(part, "a+b") as file:
        file.seek(0)
        while chunk := file.read(_READ):
            state.update(chunk)
            done += len(chunk)
        advance(min(done, entry["bytes"]))
        while done < entry["bytes"]:
            try:
                chunk = place.read(name, done, min(done + CHUNK, entry["bytes"]))
            except FileNotFoundError:
                return False
            if not chunk:
                return False
            file.write(chunk)
            state.update(chunk)
            done += len(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return done == entry["bytes"] and state.hexdigest() == entry["sha256"]


def _unlike(place: Place, name: str, made: Any) -> StoreError:
    try:
        now = read_remote_manifest(place)["sha256"]
    except StoreError:
        now = None
    if made is not None and now != made.get("sha256"):
        return StoreMismatch(f"{place.url} changed while it was read: its {manifest.MANIFEST} is another than before; "
                             "read it anew")  # fmt: skip
    return StoreCorrupt(
        f"{place.url}/{name} is not the file that its {manifest.MANIFEST} says (by sha256): nothing of it was kept; "
        "push the store again"
    )


def fetch_files(place: Place, folder: Path, made: Mapping[str, Any], advance: Advance = nothing,
                without: tuple[str, ...] = ()) -> None:  # fmt: skip
    """Tokenizer, processor and samples, into a folder."""
    for name, entry in made.get("files", {}).items():
        path = folder / name
        if name in without or (path.is_file() and path.stat().st_size == entry["bytes"] and same(path, entry)):
            continue
        fetch(place, name, path, entry, advance, made)


def same(path: Path, entry: Mapping[str, Any]) -> bool:
    from ..identity import file_sha256

    return file_sha256(path) == entry["sha256"]


def read_card(place: Place) -> str | None:
    """README.md as it came; None where there is none that is text."""
    found = place.stat(manifest.CARD)
    if found is None or found.size > _CARD_BYTES:
        return None
    with contextlib.suppress(UnicodeDecodeError, FileNotFoundError):
        return place.read(manifest.CARD).decode()
    return None


def check_room(folder: Path, size: int) -> None:
    """Raises OutOfSpace before anything is fetched that cannot end well."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise OutOfSpace(f"{folder}: {size / 1e9:.3g} GB are to come, {free / 1e9:.3g} GB are free; make room, or take "
                         "less with --split, --where or --fields")  # fmt: skip


def at_once(jobs: int, work: Callable[[T], None], items: Iterable[T], stop: threading.Event | None = None) -> None:
    """work of every item, `jobs` at a time; the first that fails, or Ctrl-C, stops those that have not begun, and sets
    `stop`, which those that have may look at."""
    with ThreadPoolExecutor(jobs, "predistill-transfer") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((one for one in futures if one in done and one.exception() is not None), None)
        finally:
            if stop is not None:
                stop.set()
            for future in futures:
                future.cancel()
        if failed is not None:
            failed.result()
