"""Images taken out: those that others are mixed with, and those whose file moves to another view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from predistill.store import TeacherStore
from predistill.store.convert.config import DropConfig, MergeConfig
from predistill.store.convert.drop import drop
from predistill.store.convert.merge import merge
from predistill.store.verify import verify

image_store = pytest.importorskip("image_store", reason="needs Pillow")
COUNT, VIEWS = 14, 3


@pytest.fixture
def store(tmp_path: Path) -> Path:
    files = {"train": image_store.pictures(COUNT), "validation": image_store.pictures(4, 1)}
    labels = {name: np.arange(len(rows)) % 3 for name, rows in files.items()}
    transforms = ("crop", "flip", "mixup")
    image_store.write_images(
        tmp_path / "store", image_store.convnet(), files, labels, views=VIEWS, transforms=transforms
    )
    return tmp_path / "store"


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    made = []
    for path in sorted((folder / "shards").glob(f"{split}-*.arrow")):
        made += pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).to_pylist()
    return made


def test_an_image_goes_with_its_views_and_with_what_it_is_mixed_into(store: Path) -> None:
    before = {(row["source_index"], row["view"]): row for row in rows_of(store)}
    files = {row["source_index"]: row["image"] for row in before.values() if row["view"] == 0}
    mixed = {key for key, row in before.items() if row["view_mix_with"] == 5 and key[0] != 5}
    assert any(view == 0 for _, view in mixed) or mixed
    found = drop(DropConfig(str(store), "split = 'train' AND source_index = 5 AND view = 0", yes=True))
    gone = {(5, view) for view in range(VIEWS)} | mixed
    assert (found["rows"], found["along"]) == (len(gone), len(gone) - 1)
    after = {(row["source_index"], row["view"]): row for row in rows_of(store)}
    assert set(after) == set(before) - gone
    assert files[5] not in b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    for source in range(COUNT):
        own = sorted(key for key in after if key[0] == source)
        assert [after[key]["image"] for key in own] == [files[source], *[b""] * (len(own) - 1)][: len(own)]
    said = verify(store)
    assert said["ok"], said["problems"]


def test_a_file_moves_where_the_row_that_had_it_goes(store: Path) -> None:
    """Of an image whose first view has another one in it that goes."""
    rows = rows_of(store)
    partner = next(row for row in rows if row["view"] == 0 and row["view_mix_with"] not in (-1, row["source_index"]))
    source, other = partner["source_index"], partner["view_mix_with"]
    drop(DropConfig(str(store), f"split = 'train' AND source_index = {other} AND view = 0", yes=True))
    left = sorted((row for row in rows_of(store) if row["source_index"] == source), key=lambda row: row["view"])
    assert [row["view"] for row in left][:1] != [0]
    assert left[0]["image"] == partner["image"]
    assert verify(store)["ok"]
    drop(DropConfig(str(store), f"split = 'train' AND source_index = {source} AND view = {left[0]['view']}", yes=True))
    assert source not in {row["source_index"] for row in rows_of(store)}  # its first view that is left
    assert verify(store)["ok"]


def test_partners_have_new_numbers_in_a_merged_store(store: Path, tmp_path: Path) -> None:
    files, labels = {"train": image_store.pictures(9, 3)}, {"train": np.zeros(9, np.int64)}
    image_store.write_images(tmp_path / "other", image_store.convnet(), files, labels, views=VIEWS,
                             transforms=("crop", "flip", "mixup"))  # fmt: skip
    merge(MergeConfig([str(store), str(tmp_path / "other")], str(tmp_path / "merged")))
    said = verify(tmp_path / "merged")
    assert said["ok"], said["problems"]
    with TeacherStore.open(tmp_path / "merged") as merged:
        assert merged.splits["train"]["samples"] == VIEWS * (COUNT + 9)
        last = rows_of(tmp_path / "merged")[-9:]
    assert [row["source_index"] for row in last] == list(range(COUNT, COUNT + 9))
    assert {row["view_mix_with"] for row in last} <= {-1, *range(COUNT, COUNT + 9)}
