"""JSON of a hostile stranger, sealed anew so that every hash agrees: opening says in one line what is wrong, and verify
reports it, without waiting, allocating or any other kind of exception."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predistill.store import FieldSpec, Plan, ShardPlan, StoreCorrupt, StoreWriter, TeacherStore, manifest, strict
from predistill.store.images.processing import Processing
from predistill.store.parts import Part
from predistill.store.verify import verify

FIELDS = [
    FieldSpec("input_ids", ("S",), "int32", role="input"),
    FieldSpec("teacher_logits", (3,), "float32"),
    FieldSpec("packed", ("S", 5), "int32", "bitpack", parameters={"bits": 9}),
]
SECONDS = 10  # of a read that must not wait
NAME = "train-00000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rows = tmp_path_factory.mktemp("hostile") / "whole", np.arange(2)
    plan = Plan("text-classification", {}, {"teacher": {"name": "x"}}, FIELDS, [ShardPlan("train", 0, 0, 2)], ["a"])
    with StoreWriter.begin(path, plan) as writer:
        builder = writer.open_shard(plan.shards[0], 2, {"S": np.full(2, 4)})
        for spec in FIELDS:
            builder.put(spec.name, rows, np.ones([2, *(4 if size == "S" else int(size) for size in spec.shape)], int))
        builder.put_addresses(np.zeros((2, 16), np.uint8))
        writer.commit(builder)
        writer.finish()
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def forge(path: Path, place: str, value: Any) -> None:
    """Another value at a place, as plan.fields.0.name, and the manifest's own hash to match."""
    made = json.loads((path / "store.json").read_text())
    *way, last = (int(step) if step.isdigit() else step for step in place.split("/"))
    inner = made
    for step in way:
        inner = inner[step]
    inner[last] = value
    with contextlib.suppress(UnicodeEncodeError, RecursionError):  # of which nobody has a hash
        made = manifest.sealed(made)
    (path / "store.json").write_text(json.dumps(made))


def refused(path: Path, said: str | None = None) -> None:
    """By opening and by verify, on one short line that names the file."""
    with pytest.raises(StoreCorrupt, match=said) as caught:
        TeacherStore.open(path)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 1000 and "store.json" in line
    found = verify(path)
    assert not found["ok"] and [problem["kind"] for problem in found["problems"]] == ["manifest"]


def nested(levels: int) -> Any:
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


FIRST, SECOND, PACKED, SHARD = (f"plan/{at}" for at in ("fields/0", "fields/1", "fields/2", "shards/0"))
LOOKS = {"split": "train", "number": 0, "start": 0, "stop": 2, "view": 0}
FORGED: dict[str, tuple[str, Any]] = {
    "a plan that is a word": ("plan", "x\n\x1b[31m" * 1000),
    "a task that is a list": ("plan/task", ["x"]),
    "settings of pairs": ("plan/settings", [["a", 1]]),
    "a teacher that is a number": ("plan/identity/teacher", 1.5),
    "a dataset that is a word": ("plan/identity/dataset", "x"),
    "label names that are no strings": ("plan/label_names", [["a"]]),
    "a column's name that is a number": (f"{FIRST}/name", 7),
    "a column's name of two lines": (f"{FIRST}/name", "a\n\x1b[31m"),
    "a column's name of 100,000 letters": (f"{FIRST}/name", "A" * 100_000),
    "a column that is a word": (FIRST, "a\nb"),
    "a column with another key": (f"{FIRST}/x\ny", 1),
    "a codec that is a list": (f"{SECOND}/codec", []),
    "a codec that is unknown": (f"{SECOND}/codec", "zip"),
    "a dtype that is a list": (f"{SECOND}/dtype", []),
    "a role that is an object": (f"{SECOND}/role", {"x": "y" * 5000}),
    "parameters that are a number": (f"{PACKED}/parameters", 2**40),
    "parameters that are pairs": (f"{PACKED}/parameters", [["bits", 9]]),
    "bits that are a word": (f"{PACKED}/parameters", {"bits": "9" * 9999}),
    "a shape that is a word": (f"{FIRST}/shape", "SS"),
    "a shape past int32": (f"{SECOND}/shape", [2**16, 2**16]),
    "a shape past int32 in each token": (f"{SECOND}/shape", ["S", 2**31 - 1, 2]),
    "a shape of 80 axes": (f"{SECOND}/shape", [1] * 80),
    "packed bits of a scalar": (f"{PACKED}/shape", []),
    "packed bits past int32": (f"{PACKED}/shape", ["S", 2**31 - 1]),
    "packed bits of a float": (f"{PACKED}/dtype", "bfloat16"),
    "carried rows that have a shape": (f"{SECOND}/codec", "arrow"),
    "a pad that is a word": (f"{FIRST}/pad", "x"),
    "a pad that is true": (f"{FIRST}/pad", True),
    "a pad that is infinite": (f"{FIRST}/pad", float("inf")),
    "a pad past the dtype": (f"{FIRST}/pad", 2**31),
    "a pad past the bytes that are packed": (f"{PACKED}/pad", -1),
    "a pad past any float": (f"{SECOND}/pad", 10**400),
    "a column twice": (f"{SECOND}/name", "input_ids"),
    "a column of addresses": (f"{SECOND}/name", "view"),
    "a shard's number that is a fraction": (f"{SHARD}/number", 0.5),
    "a shard's start that is true": (f"{SHARD}/start", True),
    "a shard's start below 0": (f"{SHARD}/start", -1),
    "a shard's stop before its start": (SHARD, {**LOOKS, "start": 3}),
    "a shard's stop past int64": (f"{SHARD}/stop", 2**63),
    "a shard's view past int32": (f"{SHARD}/view", 2**31),
    "a shard's view that is an object": (f"{SHARD}/view", {"x": 1}),
    "a fingerprint that is none": ("fingerprint", 7),
    "a shard without a sha256": ("shards/0/sha256", None),
    "a sha256 that is a word": ("shards/0/sha256", "x" * 64),
    "more rows than bytes for them": ("shards/0/rows", 2**33),
    "a file that is a number": ("files/samples.parquet", 1e308),
    "a file's sha256 that is a number": ("files/samples.parquet/sha256", 5),
    "a file's bytes below 0": ("files/samples.parquet/bytes", -1),
    "a file's name with a zero": ("files/a\0b", {"sha256": "0" * 64, "bytes": 0}),
    "a file's name of 300 letters": ("files/" + "a" * 300, {"sha256": "0" * 64, "bytes": 0}),
    "half a character": ("plan/settings/x", "\ud800"),
    "half a character as a key": ("plan/identity/\udc00", 1),
    "lists in lists": ("plan/settings/x", nested(300)),
    "lists in lists in a column": (f"{FIRST}/parameters/x", nested(strict.DEEPEST)),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_manifests_are_refused(path: Path, case: str) -> None:
    place, value = FORGED[case]
    forge(path, place, value)
    refused(path)


def test_deep_and_long_values_of_a_sound_store_are_read(path: Path) -> None:
    forge(path, "plan/settings/x", nested(strict.DEEPEST - 10))
    with TeacherStore.open(path) as store:
        assert copy.deepcopy(store.settings) == store.settings


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "folder", "device"]
)
@pytest.mark.parametrize("name", ["store.json", "plan.json", f"shards/{NAME}.json"])
def test_pipes_devices_and_folders_are_not_read(path: Path, name: str, make: Callable[[Path], None]) -> None:
    (path / name).unlink()
    make(path / name)
    with pytest.raises(StoreCorrupt, match="regular file expected"):
        strict.read_json(path / name)
    assert name in {problem["path"] for problem in verify(path)["problems"]}


def test_a_sidecar_is_small_and_of_its_kind(path: Path) -> None:
    """Of an unfinished store: a shard counts whose sidecar can be believed."""
    sidecar, plan = path / "shards" / f"{NAME}.json", manifest.read_plan(path)
    sound = json.loads(sidecar.read_text())
    assert set(manifest.committed(path, plan)) == {NAME}
    for change in ({"rows": "2"}, {"rows": -1}, {"sha256": 5}, {"tokens": None}, {"x": "y" * strict.LARGEST_SIDECAR}):
        sidecar.write_text(json.dumps({**sound, **change}))
        assert manifest.committed(path, plan) == {}


PART: dict[str, Any] = {
    "format_version": 1, "split": "train", "start": 0, "stop": 2, "ended": True, "rows_sha256": "0" * 64,
    "shards": [LOOKS],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"start": False}, {"stop": 2.0}, {"ended": 1}, {"rows_sha256": "x"},
     {"shards": [{**LOOKS, "view": "0"}]}],
    ids=str,
)  # fmt: skip
def test_a_part_of_a_plan_is_of_its_kind(change: dict[str, Any]) -> None:
    assert Part.from_json(PART, "plan-0001.json").shards == [ShardPlan("train", 0, 0, 2)]
    with pytest.raises(StoreCorrupt, match="^plan-0001.json") as caught:
        Part.from_json({**PART, **change}, "plan-0001.json")
    assert str(caught.value).isprintable()


SIZES = {"mode": "RGB", "size": [8, 8], "scale": 0.5, "normalize": [[[0.4] * 3, [0.2] * 3]]}


@pytest.mark.parametrize(
    "change",
    [{"size": [40_000, 40_000]}, {"size": [0, 0]}, {"size": [8]}, {"size": [8.0, 8]}, {"size": "88"},
     {"crop": [8, 10**6]}, {"size": None, "shortest_edge": 30_000}, {"resample": 6}, {"resample": "2"},
     {"mode": "CMYK"}, {"mode": []}, {"scale": float("nan")}, {"scale": "x"}, {"offset": 1e308}, {"offset": 10**400},
     {"bgr": "no"}, {"normalize": 5}, {"normalize": [[[0.4] * 3, [0.0] * 3]]},
     {"normalize": [[[0.4] * 3, [1e-300] * 3]]}, {"normalize": [[[0.4], [0.2]]]},
     {"normalize": [[["x" * 5000] * 3, [1.0] * 3]]}, {"x\n" * 1000: 1}],
    ids=lambda change: str(change)[:60].replace("\n", " "),
)  # fmt: skip
def test_processing_is_within_its_ranges(change: dict[str, Any]) -> None:
    assert Processing.from_json(SIZES).output == (8, 8)
    with pytest.raises(StoreCorrupt, match="settings.processing does not say how pixels are made") as caught:
        Processing.from_json({**SIZES, **change})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_rows_are_counted_against_a_shards_bytes_before_memory_is_taken(path: Path) -> None:
    """2**40 rows with bytes enough for them, which the file does not have."""
    forge(path, "shards/0/rows", 2**40)
    forge(path, "shards/0/bytes", 2**45)
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match=f"{2**45} bytes by the manifest"):
        store.select()
    with TeacherStore.open(path) as store, pytest.raises(StoreCorrupt, match=f"{2**45} bytes by the manifest"):
        store.mapped(0)


def test_names_of_shards_are_what_file_systems_take(path: Path) -> None:
    forge(path, "plan/shards/0/split", "s" * 300)
    forge(path, "shards/0/name", f"{'s' * 300}-00000")
    refused(path, "is not a plain file name of at most 200 letters")


def test_sums_of_rows_are_what_int64_holds(path: Path) -> None:
    made = json.loads((path / "store.json").read_text())
    large = {**made["shards"][0], "rows": 2**56, "bytes": 2**61}
    made["shards"] = [{**large, "name": f"train-{number:05d}"} for number in range(200)]
    made["plan"]["shards"] = [{**LOOKS, "number": number} for number in range(200)]
    (path / "store.json").write_text(json.dumps(manifest.sealed(made)))
    refused(path, "its shards hold more than")
