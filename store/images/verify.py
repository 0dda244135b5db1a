"""Do stored images still give the pixels that the teacher saw? Of a sample of rows, decoded and replayed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError, StoreCorrupt
from ..reader import TeacherStore
from .files import Files
from .pixels import IMAGE, PIXEL_HASH, Processing, pixel_hash, replay
from .processing import pillow
from .views import VIEW_FIELDS, VIEW_MIX_WITH, mixed

SAMPLE = 256  # rows, spread evenly over the store
_BATCH = 32
_MAKERS = ("pillow", "numpy")


def pixel_problem(folder: Path) -> str | None:
    """What is wrong with the pixels of a sound store; None where nothing is, or it holds no images, or Pillow is not
    here to make any."""
    with TeacherStore.open(folder) as store:
        if not {IMAGE, PIXEL_HASH} <= set(store.fields) or "processing" not in store.settings:
            return None
        try:
            pillow()
        except ConfigError:
            return None
        try:
            processing = Processing.from_json(store.settings["processing"])
        except StoreCorrupt as error:
            return str(error)
        return _compare(store, processing)


def _compare(store: TeacherStore, processing: Processing) -> str | None:
    drawn = [spec.name for spec in VIEW_FIELDS if spec.name in store.fields]
    rows, files = store.select(fields=[PIXEL_HASH, *drawn]), Files(store)
    looked = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))
    differ = []
    for at in range(0, len(looked), _BATCH):
        chosen = looked[at : at + _BATCH]
        batch, ids = rows[chosen], rows.sample_ids[chosen]
        views = {name: batch[name] for name in drawn}
        partners = [b""] * len(chosen)
        try:
            if VIEW_MIX_WITH in views:
                places = np.flatnonzero(mixed(views))
                for place, file in zip(places, files.of(ids[places], views[VIEW_MIX_WITH][places]), strict=True):
                    partners[place] = file
            made = pixel_hash(replay(files.of(ids), partners, views, processing))
        except (DataError, StoreCorrupt) as error:
            return f"among rows {ids[0]} to {ids[-1]}: {error}"
        differ += ids[made != batch[PIXEL_HASH]].tolist()
    if not differ:
        return None
    return (
        f"{len(differ)} of {len(looked)} rows that were looked at, such as row {differ[0]}, give other pixels than the "
        f"teacher saw: {_versions(store)}"
    )


def _versions(store: TeacherStore) -> str:
    """What made the pixels then and now."""
    there = {name: store.identity.get("versions", {}).get(name) for name in _MAKERS}
    here = {name: importlib.metadata.version(name) for name in _MAKERS}
    apart = [f"{name} {there[name]} there, {here[name]} here" for name in _MAKERS if there[name] != here[name]]
    return "; ".join(apart) + ": train with what it was dumped with" if apart else "run the same dump again, elsewhere"
