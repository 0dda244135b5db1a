"""`predistill pull`, top to bottom: a store, or a part of one, from elsewhere into a folder.

What comes is a stranger's: names, sizes and structure are checked, checksums are held against the manifest, and
index.duckdb is made here, from the shards. A shard counts when its sidecar is there, which is written last; the same
command goes on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import index, manifest
from ..atomic import out_of_space, write_text
from ..card import licences_in, store_card
from ..convert.recut import commit, shard_batch
from ..errors import StoreCorrupt, StoreError, StoreMismatch
from ..manifest import Plan, shard_path
from ..mapped import MappedShard
from ..progress import Bar, bytes_bar
from ..schema import ADDRESS_COLUMNS
from ..shard import ShardPlan
from ..verify import check_structure
from ..writer import check_folder, take_lock
from .choice import chosen_fields, chosen_shards, partial_plan
from .config import PullConfig
from .elsewhere import Place, open_place
from .opened import open_remote
from .ranges import SHARE, ColumnReader
from .transfer import at_once, check_room, fetch, fetch_files, read_card, read_remote_manifest

_LARGE = 32 << 20  # bytes of a shard's columns, which are held in memory: two at a time of those


def pull(config: PullConfig) -> dict[str, Any]:
    """Returns {"source", "output", "fingerprint", "samples", "shards", "bytes", "fetched", "left_out"}.

    Raises StoreIncomplete for half a store at the other end, StoreMismatch where it changes meanwhile or the folder
    holds something else, StoreCorrupt for what is not as its manifest says, OutOfSpace, ConfigError.
    """
    folder = Path(config.output_dir).expanduser()
    check_folder(folder)
    place = open_place(config.source, config.revision)
    made = read_remote_manifest(place)
    whole = manifest.plan_of(made, place.url)
    shards = _chosen(config, place, whole, made)
    plan = partial_plan(whole, made, shards, chosen_fields(whole, config.fields))
    entries = {made["shards"][at]["name"]: made["shards"][at] for at in shards}
    (folder / manifest.SHARDS).mkdir(parents=True, exist_ok=True)
    with take_lock(folder / manifest.LOCK, "pull"), out_of_space(folder):
        job = _Pull(place, made, whole, plan, folder)
        missing = job.begin(entries)
        check_room(folder, sum(entries[shard.name]["bytes"] for shard in missing) if plan is whole else 0)
        with bytes_bar("pull", sum(entries[shard.name]["bytes"] for shard in missing)) as bar:
            job.bar = bar
            at_once(config.jobs, lambda shard: job.shard(shard, entries[shard.name]), missing, job.stop)
            fetch_files(place, folder, made, without=(manifest.SAMPLES,))
        done = job.finish()
    left_out = plan.settings["taken_from"]["left_out"] if plan is not whole else {"shards": 0, "fields": []}
    return {
        "source": place.url,
        "output": str(folder),
        "fingerprint": plan.fingerprint,
        "samples": sum(entry["rows"] for entry in done["shards"]),
        "shards": len(plan.shards),
        "bytes": sum(entry["bytes"] for entry in done["shards"]),
        "fetched": job.fetched,
        "left_out": left_out,
    }


def _chosen(config: PullConfig, place: Place, plan: Plan, made: Mapping[str, Any]) -> list[int]:
    if config.where is None:
        return chosen_shards(plan, made, config, None)
    with open_remote(place.address) as store:
        if store.manifest["sha256"] != made["sha256"]:
            raise StoreMismatch(f"{place.url} changed while it was read: run the same command again")
        return chosen_shards(plan, made, config, store)


class _Pull:
    """From one place into one folder."""

    def __init__(self, place: Place, made: dict[str, Any], whole: Plan, plan: Plan, folder: Path):
        self.place, self.made, self.whole, self.plan, self.folder = place, made, whole, plan, folder
        self.fetched, self._counting = 0, threading.Lock()
        self.bar: Bar | None = None
        self.stop, self._large = threading.Event(), threading.BoundedSemaphore(2)

    @property
    def is_whole(self) -> bool:
        return self.plan is self.whole

    def begin(self, entries: Mapping[str, Any]) -> list[ShardPlan]:
        """The plan into the folder; the shards that are still to come. Raises StoreMismatch."""
        there = manifest.read_plan(self.folder) if (self.folder / manifest.PLAN).exists() else self.plan
        if there.fingerprint != self.plan.fingerprint:
            raise StoreMismatch(
                f"{self.folder} holds another store, or another part of this one, than the command takes: give "
                "another folder"
            )
        manifest.write_json(self.folder / manifest.PLAN, self.plan.to_json())  # one that grows may have grown
        done = manifest.committed(self.folder, self.plan)
        if self.is_whole:  # of a part, the plan says which bytes it was made of
            done = {name: entry for name, entry in done.items() if entry["sha256"] == entries[name]["sha256"]}
        return [shard for shard in self.plan.shards if shard.name not in done]

    def shard(self, shard: ShardPlan, entry: Mapping[str, Any]) -> None:
        path = shard_path(self.folder, shard.name)
        for stale in (path.with_suffix(".json"), self.folder / manifest.MANIFEST):
            stale.unlink(missing_ok=True)
        if self.is_whole:
            fetch(self.place, self._name(shard), path, entry, self._count, self.made)
            self._checked(path, self.whole, shard, entry)
            kept = {key: entry[key] for key in ("sha256", "bytes", "rows", "tokens")}
            manifest.write_json(path.with_suffix(".json"), {**kept, "fingerprint": self.plan.fingerprint})
        elif not self._by_ranges(shard, entry):
            self._cut(shard, entry)

    def _by_ranges(self, shard: ShardPlan, entry: Mapping[str, Any]) -> bool:
        """Only the columns' own bytes; False where they are most of the shard, or it is not laid out for that."""
        if len(self.plan.fields) == len(self.whole.fields):
            return False
        columns = [*ADDRESS_COLUMNS, *(spec.name for spec in self.plan.fields)]
        try:
            reader = ColumnReader(self.place, self._name(shard), entry["bytes"], columns, self._count)
            if reader.cost > SHARE * entry["bytes"]:
                return False
            with self._large if reader.cost > _LARGE else contextlib.nullcontext():
                batch = reader.read()
        except (StoreCorrupt, FileNotFoundError):
            return False  # fetched whole, its checksum says whose fault it is
        if batch.num_rows != entry["rows"]:
            return False
        batch.validate(full=True)
        self._write(batch, shard)
        return True

    def _cut(self, shard: ShardPlan, entry: Mapping[str, Any]) -> None:
        """The whole shard, checked, then written anew with the part's own plan in it."""
        path = shard_path(self.folder, shard.name)
        arrived = path.with_name(f"{path.name}.whole")
        fetch(self.place, self._name(shard), arrived, entry, self._count, self.made)
        self._write(self._checked(arrived, self.whole, shard, entry).batch, shard)
        arrived.unlink()

    def _write(self, batch: Any, shard: ShardPlan) -> None:
        columns = {name: batch.column(name) for name in [*ADDRESS_COLUMNS, *(spec.name for spec in self.plan.fields)]}
        commit(self.folder, shard, shard_batch(columns, self.plan.fields, shard, self.plan.fingerprint),
               self.plan.fingerprint)  # fmt: skip
        path = shard_path(self.folder, shard.name)
        self._checked(path, self.plan, shard, manifest.read_sidecar(path))

    def _checked(self, path: Path, plan: Plan, shard: ShardPlan, entry: Mapping[str, Any]) -> MappedShard:
        try:
            return check_structure(path, plan, shard, entry)
        except StoreCorrupt:
            for file in (path, path.with_suffix(".json")):
                file.unlink(missing_ok=True)
            raise

    def _name(self, shard: ShardPlan) -> str:
        return f"{manifest.SHARDS}/{shard.name}.arrow"

    def _count(self, size: float) -> None:
        if self.stop.is_set():
            raise StoreError("stopped, because another shard failed")
        with self._counting:
            self.fetched += int(size)
            if self.bar is not None:
                self.bar.advance(size)

    def finish(self) -> dict[str, Any]:
        """Index and samples from the shards, the card, and store.json last."""
        done = manifest.committed(self.folder, self.plan)
        made = {
            "format_version": manifest.FORMAT_VERSION,
            "plan": self.plan.to_json(),
            "fingerprint": self.plan.fingerprint,
            "shards": [{"name": shard.name, **done[shard.name]} for shard in self.plan.shards],
        }
        for left in (self.folder / manifest.SHARDS).glob("*.part"):
            os.unlink(left)
        index.build(self.folder, made)
        card = read_card(self.place)
        if not self.is_whole:
            card = store_card(self.folder, made, licences_in(card))
        if card is not None:
            write_text(self.folder / manifest.CARD, card)
        made = manifest.sealed({**made, "files": manifest.described_files(self.folder)})
        manifest.write_json(self.folder / manifest.MANIFEST, made)
        return made
