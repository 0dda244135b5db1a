"""A store that is elsewhere, opened as if it were here: its index at once, its shards when a row of theirs is read."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .. import index, manifest
from ..atomic import write_text
from ..errors import StoreCorrupt, StoreMismatch
from ..mapped import MappedShard
from ..reader import TeacherStore
from .cache import Cache, CacheUser
from .elsewhere import Place, clean, open_place
from .transfer import fetch, fetch_files, read_card, read_remote_manifest

_STALE = 86_400  # seconds


class RemoteStore(TeacherStore):
    """A TeacherStore whose folder is one of the cache.

    `url` is where it comes from, `path` the folder. Raises OutOfSpace where the shards that this process has mapped
    fill the cache: what one process reads at once must fit.
    """

    def __init__(self, address: str, cache: Cache, made: dict[str, Any], place: Place | None = None):
        super().__init__(cache.folder(made["sha256"]), made, False)
        self.url, self._address, self._place = clean(address), address, place
        self._user, self._fetching = CacheUser(cache), threading.Lock()

    def _map(self, shard: int) -> MappedShard:
        size = self.manifest["shards"][shard]["bytes"]
        with self._fetching:  # the prefetching thread, and the caller's
            return MappedShard(self._user.shard(self.shard_path(shard), size, lambda path: self._fetch(shard, path)))

    def close(self) -> None:
        super().close()
        self._user.close()

    def __reduce__(self) -> tuple[Any, ...]:
        cache = self._user.cache
        return _reopen, (self._address, self.manifest["sha256"], str(cache.root), cache.limit)

    def _fetch(self, shard: int, path: Path) -> None:
        if self._place is None:
            self._place = open_place(self._address)
        name, entry = f"{manifest.SHARDS}/{self.shards[shard].name}.arrow", self.manifest["shards"][shard]
        fetch(self._place, name, path, entry, made=self.manifest)


def open_remote(url: str, revision: str | None = None, cache: Cache | None = None) -> RemoteStore:
    """Manifest, samples and tokenizer of a store at a URL; its shards follow."""
    cache = Cache() if cache is None else cache
    place = open_place(url, revision)
    made = read_remote_manifest(place)
    folder = cache.folder(made["sha256"])
    if not (folder / manifest.MANIFEST).exists():
        _bring_index(place, made, folder)
    return RemoteStore(place.address, cache, made, place)


def _bring_index(place: Place, made: dict[str, Any], folder: Path) -> None:
    """Into a folder of its own, which gets its name once all of it is there."""
    if manifest.SAMPLES not in made.get("files", {}):
        raise StoreCorrupt(f"{place.url}: its manifest does not list {manifest.SAMPLES}, which is its index")
    for left in folder.parent.glob(".arriving-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    arriving = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".arriving-"))
    try:
        fetch_files(place, arriving, made)
        index.build_from_samples(arriving, made)
        manifest.write_json(arriving / manifest.PLAN, made["plan"])
        card = read_card(place)
        if card is not None:
            write_text(arriving / manifest.CARD, card)
        (arriving / manifest.SHARDS).mkdir()
        manifest.write_json(arriving / manifest.MANIFEST, made)
        try:
            os.rename(arriving, folder)
        except OSError:
            if not (folder / manifest.MANIFEST).exists():  # unless another process was quicker
                raise
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def _reopen(address: str, sha256: str, root: str, limit: int) -> RemoteStore:
    """In another process: the same store, without asking the network for what the cache has."""
    cache = Cache(root, limit)
    folder = cache.folder(sha256)
    if (folder / manifest.MANIFEST).exists():
        return RemoteStore(address, cache, manifest.read_manifest(folder))
    store = open_remote(address, cache=cache)
    if store.manifest["sha256"] != sha256:
        raise StoreMismatch(f"{store.url} changed while it was read: its {manifest.MANIFEST} is another than before")
    return store
