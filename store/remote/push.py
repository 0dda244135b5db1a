"""`predistill push`, top to bottom: a store to a place that others read.

store.json arrives last, so that half a store is never taken for a whole one; a shard's sidecar arrives after the shard,
so that the same command sends only what is not there yet. index.duckdb stays: who reads the store makes it anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import manifest
from ..card import LICENCES, licences_in, store_card
from ..convert.recut import plain_file
from ..errors import ConfigError, StoreCorrupt, StoreError, StoreMismatch
from ..identity import file_sha256
from ..progress import bytes_bar
from ..strict import parse_json
from ..verify import verify
from .config import PushConfig
from .elsewhere import FilePlace, HubPlace, Place, clean, is_url, open_place
from .hub import push_to_hub
from .transfer import CHUNK, at_once, read_card, read_remote_manifest


def push(config: PushConfig) -> dict[str, Any]:
    """Returns {"store", "destination", "fingerprint", "files", "bytes", "sent"}: `sent` counts what was not there yet.

    Raises StoreIncomplete, StoreCorrupt for a store that is not as it was dumped, StoreMismatch where the destination
    holds another one, ConfigError where the Hub is to be told no licences, StoreError for what a place answers.
    """
    if is_url(config.store):
        raise ConfigError(f"STORE is a folder; got {clean(config.store)}: predistill pull it first")
    folder = Path(config.store).expanduser()
    made = manifest.read_manifest(folder)
    if config.verify:
        _verified(folder)
    place = open_place(config.destination)
    licences = _licences(config, folder, place)
    files = _files(folder, made)
    card = store_card(folder, made, licences, place.url)
    if isinstance(place, HubPlace):
        sent = push_to_hub(place, folder, made, files, card, config)
    else:
        assert isinstance(place, FilePlace)
        sent = _push_files(place, folder, made, files, card, config)
    return {
        "store": str(folder),
        "destination": place.url,
        "fingerprint": made["fingerprint"],
        "files": len(files) + 2,
        "bytes": sum(entry["bytes"] for entry in made["shards"]),
        "sent": sent,
        **licences,
    }


def _verified(folder: Path) -> None:
    found = verify(folder)
    if not found["ok"]:
        first = found["problems"][0]
        more = f" (and {len(found['problems']) - 1} more)" if len(found["problems"]) > 1 else ""
        raise StoreCorrupt(f"{folder} is not pushed: {first['path']}: {first['detail']}{more}")


def _licences(config: PushConfig, folder: Path, place: Place) -> dict[str, str | None]:
    """Those of the command line, else of the store's card, else of the one that is there. Raises ConfigError."""
    path, carried = folder / manifest.CARD, {}
    with contextlib.suppress(StoreError):  # a repository that is not there yet
        carried = licences_in(read_card(place))
    if path.exists():
        carried |= licences_in(plain_file(path).read_text(encoding="utf-8", errors="replace"))
    found = {name: getattr(config, name) or carried.get(name) for name in LICENCES}
    if isinstance(place, HubPlace) and (missing := [name for name, value in found.items() if value is None]):
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"who downloads this store must know what they may do with it: give {flags}, as the Hub "
                          "writes licences; `unknown` where it is not known")  # fmt: skip
    return found


def _files(folder: Path, made: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "bytes"}} of all but README.md and store.json. Raises StoreCorrupt for links."""
    found: dict[str, dict[str, Any]] = {}
    for entry in made["shards"]:
        found[f"{manifest.SHARDS}/{entry['name']}.arrow"] = {name: entry[name] for name in ("sha256", "bytes")}
        found[f"{manifest.SHARDS}/{entry['name']}.json"] = {}
    found |= {**made.get("files", {}), manifest.PLAN: {}}
    for name, known in found.items():
        path = plain_file(folder / name)
        if not known:
            found[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return found


def _push_files(
    place: FilePlace, folder: Path, made: Mapping[str, Any], files: Mapping[str, Any], card: str, config: PushConfig
) -> int:
    """To a file system. Returns the bytes sent."""
    same = _prepare(place, made, config)
    shards = [name.removesuffix(".arrow") for name in files if name.endswith(".arrow")]
    others = [name for name in files if not name.startswith(f"{manifest.SHARDS}/") and name != manifest.PLAN]
    sent, counting = 0, threading.Lock()

    with bytes_bar("push", sum(entry["bytes"] for entry in files.values())) as bar:

        def send(name: str) -> None:
            nonlocal sent
            place.put(folder / name, name)
            if config.verify:
                _check_arrived(place, name, files[name])
            with counting:
                sent += files[name]["bytes"]

        def shard(stem: str) -> None:
            if not _is_there(place, stem, files):
                send(f"{stem}.arrow")
                send(f"{stem}.json")
            bar.advance(files[f"{stem}.arrow"]["bytes"])

        if not same:
            send(manifest.PLAN)
            at_once(config.jobs, send, others)
        at_once(config.jobs, shard, shards)
    if not same or read_card(place) != card:
        place.put_text(card, manifest.CARD)
    if not same:
        place.put(folder / manifest.MANIFEST, manifest.MANIFEST)
    if read_remote_manifest(place)["sha256"] != made["sha256"]:
        raise StoreMismatch(f"{place.url} was written by another push meanwhile; run the same command again")
    return sent


def _prepare(place: FilePlace, made: Mapping[str, Any], config: PushConfig) -> bool:
    """Is this very store there already? What is of another goes, or is refused. While files come, no store.json."""
    stored = _fingerprint_there(place)
    if stored is None and not config.overwrite:
        for name in (manifest.PLAN, manifest.CARD):  # nothing of ours; what a push of ours left has a plan
            if place.stat(name) is not None:
                raise StoreMismatch(f"{place.url} holds {name} and is not a store: give another destination, or "
                                    "--overwrite")  # fmt: skip
    if stored is not None and stored != made["fingerprint"]:
        if not config.overwrite:
            raise StoreMismatch(f"{place.url} holds another store (fingerprint {stored[:12]}; this one's is "
                                f"{made['fingerprint'][:12]}): give another destination, or --overwrite")  # fmt: skip
        place.remove(manifest.MANIFEST)
        for name in place.names(manifest.SHARDS):
            place.remove(f"{manifest.SHARDS}/{name}")
    elif place.stat(manifest.MANIFEST) is not None:
        try:
            if read_remote_manifest(place)["sha256"] == made["sha256"]:
                return True
        except StoreCorrupt:
            pass  # what was cut short is written again
        place.remove(manifest.MANIFEST)
    return False


def _fingerprint_there(place: FilePlace) -> str | None:
    """Of the plan at the other end; None where there is none that can be read."""
    if place.stat(manifest.PLAN) is None:
        return None
    where = f"{place.url}/{manifest.PLAN}"
    try:
        return manifest.Plan.from_json(parse_json(place.read(manifest.PLAN), where), where).fingerprint
    except StoreCorrupt:
        return None


def _is_there(place: FilePlace, stem: str, files: Mapping[str, Any]) -> bool:
    """The sidecar was sent after its shard; so where it is the one of these bytes, they arrived."""
    found = place.stat(f"{stem}.arrow")
    if found is None or found.size != files[f"{stem}.arrow"]["bytes"]:
        return False
    try:
        return hashlib.sha256(place.read(f"{stem}.json")).hexdigest() == files[f"{stem}.json"]["sha256"]
    except FileNotFoundError:
        return False


def _check_arrived(place: FilePlace, name: str, entry: Mapping[str, Any]) -> None:
    """What can be read there is what was sent."""
    state, size = hashlib.sha256(), entry["bytes"]
    for start in range(0, size, CHUNK):
        state.update(place.read(name, start, min(start + CHUNK, size)))
    if state.hexdigest() != entry["sha256"]:
        raise StoreError(f"{place.url}/{name} is not what was sent (by sha256): run the same command again")
