"""A store into a dataset repository of the Hugging Face Hub.

huggingface_hub uploads the folder: in batches, in parallel, and what is there already is not sent again. The card and
store.json follow in a commit of their own, the last.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import manifest
from ..errors import StoreCorrupt, StoreError, StoreMismatch
from .config import PushConfig
from .elsewhere import HubPlace, Stat, explained
from .transfer import read_remote_manifest


def push_to_hub(
    place: HubPlace, folder: Path, made: Mapping[str, Any], files: Mapping[str, Any], card: str, config: PushConfig
) -> int:
    """Returns the bytes of files that were not there. Raises StoreMismatch where the repository has another store."""
    with explained(place.url):
        place.api.create_repo(place.repo, repo_type="dataset", private=config.private or None, exist_ok=True)
    there = place.stats([*files, manifest.MANIFEST])
    missing = [name for name, entry in files.items() if not _is_it(there.get(name), folder / name, entry)]
    if manifest.MANIFEST in there:
        _make_way(place, made, there, bool(missing), config)
    if missing:
        with explained(place.url):
            place.api.upload_folder(
                repo_id=place.repo, repo_type="dataset", folder_path=folder, path_in_repo=place.folder or None,
                revision=place.revision, allow_patterns=[glob.escape(name) for name in missing],
                commit_message="Upload the shards of a store with predistill",
            )  # fmt: skip
    _finish(place, folder, card)
    _check_arrived(place, folder, files)
    return sum(files[name]["bytes"] for name in missing)


def _make_way(
    place: HubPlace, made: Mapping[str, Any], there: Mapping[str, Stat], changes: bool, config: PushConfig
) -> None:
    """While files of a store change, its store.json is away."""
    try:
        stored = read_remote_manifest(place)
    except StoreCorrupt:
        stored = {"fingerprint": "", "sha256": ""}
    if stored["fingerprint"] != made["fingerprint"] and not config.overwrite:
        raise StoreMismatch(f"{place.url} holds another store (fingerprint {stored['fingerprint'][:12]}; this one's is "
                            f"{made['fingerprint'][:12]}): give another repository, or --overwrite")  # fmt: skip
    if not changes:
        return
    from huggingface_hub import CommitOperationDelete

    gone = [manifest.MANIFEST]
    if stored["fingerprint"] != made["fingerprint"]:
        gone += [f"{manifest.SHARDS}/{entry['name']}{end}" for entry in stored.get("shards", ())
                 for end in (".arrow", ".json")]  # fmt: skip
    with explained(place.url):
        place.api.create_commit(
            place.repo, [CommitOperationDelete(place.path(name)) for name in gone], repo_type="dataset",
            revision=place.revision, commit_message="Make way for another store",
        )  # fmt: skip


def _finish(place: HubPlace, folder: Path, card: str) -> None:
    from huggingface_hub import CommitOperationAdd

    last = {manifest.CARD: card.encode(), manifest.MANIFEST: (folder / manifest.MANIFEST).read_bytes()}
    with explained(place.url):
        done = place.api.create_commit(
            place.repo, [CommitOperationAdd(place.path(name), data) for name, data in last.items()],
            repo_type="dataset", revision=place.revision, commit_message="The store is whole",
        )  # fmt: skip
    place.moved(done.oid)


def _check_arrived(place: HubPlace, folder: Path, files: Mapping[str, Any]) -> None:
    there = place.stats(list(files))
    for name, entry in files.items():
        if not _is_it(there.get(name), folder / name, entry):
            raise StoreError(f"{place.url}/{name} is not what was sent: run the same command again")


def _is_it(found: Stat | None, path: Path, entry: Mapping[str, Any]) -> bool:
    """By the Hub's own checksum: sha256 of large files, git's sha1 of others."""
    if found is None or found.size != entry["bytes"]:
        return False
    if len(found.tag) == 64:
        return found.tag == entry["sha256"]
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == found.tag
