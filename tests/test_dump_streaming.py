"""Rows that nobody has counted: the same store as of rows that were, wherever it stops, whoever goes on with it."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import image_cases
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import question_cases
from dump_cases import bert, own_cache, rows, settings, shard_bytes, write  # noqa: F401  a fixture
from predistill.store import (
    ConfigError,
    DataError,
    StoreCorrupt,
    StoreError,
    StoreIncomplete,
    StoreMismatch,
    TeacherStore,
    content_hash,
    manifest,
)
from predistill.store.convert.config import DropConfig, MergeConfig
from predistill.store.convert.drop import drop
from predistill.store.convert.merge import merge
from predistill.store.remote.config import PullConfig, PushConfig
from predistill.store.remote.pull import pull
from predistill.store.remote.push import push
from predistill.store.verify import verify
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.dump import dump, plan
from predistill.teacher_dump.streaming import open_stream
from test_dump_faults import Forks

SMALL = 4000  # bytes of a shard: some 20 rows of 20 tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(150))


def streamed(teacher: Path, source: Path | str, folder: Path, **more: Any) -> DumpConfig:
    return settings(teacher, source, folder, **{"streaming": True, "shard_size": SMALL, **more})


def tables(folder: Path) -> dict[str, pa.Table]:
    """All that the shards hold of each split, by row and view."""
    plan_of = manifest.read_manifest(folder)["plan"]
    found: dict[str, list[pa.Table]] = {}
    for entry in plan_of["shards"]:
        file = folder / "shards" / f"{entry['split']}-{entry['number']:05d}.arrow"
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all().replace_schema_metadata(None)
        found.setdefault(entry["split"], []).append(table)
    whole = {split: pa.concat_tables(some) for split, some in found.items()}
    return {split: one.take(pc.sort_indices(one, [("source_index", "ascending"), ("view", "ascending")]))
            for split, one in whole.items()}  # fmt: skip


def check_same(ours: Path, theirs: Path, distance: float = 1e-5) -> None:
    """All columns: what the teacher said within `distance` (its batches were others), all else to the bit."""
    left, right = tables(ours), tables(theirs)
    assert list(left) == list(right)
    for split, table in left.items():
        assert table.schema == right[split].schema
        for name in table.column_names:
            one, other = (each.column(name).combine_chunks() for each in (table, right[split]))
            while hasattr(one.type, "value_type"):
                one, other = one.flatten(), other.flatten()
            if pa.types.is_floating(one.type):
                assert np.allclose(np.asarray(one), np.asarray(other), atol=distance, equal_nan=True), name
            else:
                assert one.equals(other), name


def parts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("plan-*.json"))]


def test_the_store_is_that_of_counted_rows(tiny_teacher_dir: Path, tmp_path: Path, data: Path) -> None:
    """A split ends within a part, another exactly at the end of one; nothing goes into the cache of `datasets`."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*.arrow"))
    more = {"keep_columns": ["text"], "shard_size": SMALL}
    alone = dump(streamed(tiny_teacher_dir, data, tmp_path / "alone", **more))
    size = parts(tmp_path / "alone")[0]["stop"]
    exact = write(tmp_path / "exact.jsonl", rows(2 * size, seed=3))
    both = f"train={data},validation={exact}"
    found = dump(streamed(tiny_teacher_dir, both, tmp_path / "s", **more))
    assert found["complete"] and 5 <= size <= 60 and alone["splits"]["train"]["samples"] == 150
    assert set(cache.rglob("*.arrow")) == before
    plain = dump(settings(tiny_teacher_dir, both, tmp_path / "plain", **more))
    check_same(tmp_path / "s", tmp_path / "plain")
    assert verify(tmp_path / "s")["problems"] == []
    for name in ("rows", "rows_sha256"):
        assert found["dataset"][name] == plain["dataset"][name]
    own = {split: [json.loads(line) for line in path.read_text().splitlines()]
           for split, path in (("train", data), ("validation", exact))}  # fmt: skip
    for split, content in own.items():
        stored = tables(tmp_path / "s")[split]
        assert stored.column("text").to_pylist() == [row["text"] for row in content]
        assert stored.column("labels").to_pylist() == [row["label"] for row in content]
        assert stored.column("content_hash").to_pylist() == [content_hash((row["text"],)) for row in content]
    last = {part["split"]: part for part in parts(tmp_path / "s")}
    assert [(one["stop"], one["ended"]) for one in last.values()] == [(150, True), (2 * size, True)]
    assert [part["ended"] for part in parts(tmp_path / "s")].count(True) == 2
    with TeacherStore.open(tmp_path / "s") as store:
        assert store.sql("SELECT count(*) FROM samples").fetchall() == [(150 + 2 * size,)]


def write_csv(path: Path, content: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a CSV to be collected
def test_every_format_streams_the_same_rows(tmp_path: Path) -> None:
    """Of a CSV too, whose whole numbers are read as real ones where a cell is empty, 10,000 rows further down."""
    content = [{"text": f'row {at}, "quoted"\nand é', "label": at % 2} for at in range(10_050)]
    content[10_020]["label"] = None
    table = pa.Table.from_pylist(content)
    write(tmp_path / "a.jsonl", content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    write_csv(tmp_path / "a.csv", content)
    datasets.Dataset.from_list(content).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    pq.write_table(table, tmp_path / "folder/train.parquet")
    for name in ("a.jsonl", "a.json", "b.jsonl.gz", "a.parquet", "a.arrow", "a.csv", "saved", "folder"):
        config = streamed(tmp_path, tmp_path / name, tmp_path / "s")
        stream = open_stream(config, None)
        read = stream._rows("train", ["text", "label"])
        found = read.peek(4000)
        read.drop(4000)
        assert pa.concat_tables([found, read.peek(10**6)]).to_pylist() == content, name
        assert len(stream.splits["train"]) == 1000 and stream.expected is None


def whole(teacher: Path, data: Path, folder: Path) -> dict[str, bytes]:
    dump(streamed(teacher, data, folder))
    return {**shard_bytes(folder), **{path.name: path.read_bytes() for path in folder.glob("*.json")}}


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    found = Forks(tmp_path)
    yield found
    found.close()


def wait_for_change(folder: Path, what: str, before: set[Path]) -> None:
    deadline = time.monotonic() + 60
    while set(folder.glob(what)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_any_moment_and_joined_by_another(
    forks: Forks, tiny_teacher_dir: Path, tmp_path: Path, data: Path
) -> None:
    """Some kills, each followed by the same command; then one that is killed while another works beside it."""
    reference, rng = whole(tiny_teacher_dir, data, tmp_path / "whole"), random.Random(1)
    config = streamed(tiny_teacher_dir, data, tmp_path / "s")
    given = {name: value for name, value in vars(config).items() if name not in ("text_column", "output_dir")}

    def check(folder: Path) -> None:
        places = {name: folder / ("shards" if name.endswith(".arrow") else ".") / name for name in reference}
        assert {name: path.read_bytes() for name, path in places.items()} == reference
        assert verify(folder)["problems"] == [] and not list(folder.rglob("*.tmp"))

    kills = 0
    while len(list(tmp_path.glob("s/shards/*.json"))) < 6:
        what = rng.choice(["s/plan-*.json", "s/shards/*.json"])
        before = set(tmp_path.glob(what))
        pid = forks.start({**given, "output_dir": str(tmp_path / "s")}, pause=0.05)
        wait_for_change(tmp_path, what, before)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        kills += forks.wait() == -signal.SIGKILL
    assert kills >= 3
    with pytest.raises(StoreIncomplete, match=r"shards are there, and its source was read as far as \d+ rows of train"):
        TeacherStore.open(tmp_path / "s")
    dump(config)
    check(tmp_path / "s")

    pid = forks.start({**given, "output_dir": str(tmp_path / "two")}, pause=0.2)
    wait_for_change(tmp_path, "two/shards/*.json", set())
    os.kill(pid, signal.SIGSTOP)  # it holds what it has claimed until it is dead
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    assert dump(streamed(tiny_teacher_dir, data, tmp_path / "two"))["complete"]
    assert forks.wait() == -signal.SIGKILL
    check(tmp_path / "two")


def test_a_source_that_grew_is_gone_on_with(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    """As far as --max-samples, then further, then what came later; what is done is not done again."""
    content = rows(150)
    source = write(tmp_path / "rows.jsonl", content[:120])

    def made(**more: Any) -> dict[str, Any]:
        found = dump(streamed(tiny_teacher_dir, source, tmp_path / "s", **more))
        assert found["complete"] and verify(tmp_path / "s")["problems"] == []
        return found["splits"]["train"]

    assert made(max_samples=30)["samples"] == 30
    assert not parts(tmp_path / "s")[-1]["ended"]
    first = shard_bytes(tmp_path / "s")
    assert made(max_samples=70)["samples"] == 70
    with pytest.raises(StoreMismatch, match="has 70 rows of split train, and --max-samples 40 asks for fewer"):
        made(max_samples=40)
    assert made()["samples"] == 120 and parts(tmp_path / "s")[-1]["ended"]
    stamp = (tmp_path / "s/store.json").stat().st_mtime_ns
    assert made()["samples"] == made(max_samples=500)["samples"] == 120
    assert (tmp_path / "s/store.json").stat().st_mtime_ns == stamp
    write(source, content)
    assert made()["samples"] == 150
    assert {name: data for name, data in shard_bytes(tmp_path / "s").items() if name in first} == first
    dump(settings(tiny_teacher_dir, source, tmp_path / "plain"))
    check_same(tmp_path / "s", tmp_path / "plain")


def test_the_first_rows_of_what_is_counted(tiny_teacher_dir: Path, tmp_path: Path, data: Path) -> None:
    more = {"streaming": False, "max_samples": 40}
    found = dump(streamed(tiny_teacher_dir, data, tmp_path / "s", **more))
    assert found["dataset"]["rows"] == found["dataset"]["max_samples"] == 40
    dump(streamed(tiny_teacher_dir, data, tmp_path / "streamed", max_samples=40))
    check_same(tmp_path / "s", tmp_path / "streamed")
    with pytest.raises(StoreMismatch, match=r"identity\.dataset\.max_samples differs: the store has 40, this run"):
        dump(streamed(tiny_teacher_dir, data, tmp_path / "s", streaming=False, max_samples=41))
    with pytest.raises(StoreMismatch, match="was dumped without --streaming: leave it away"):
        dump(streamed(tiny_teacher_dir, data, tmp_path / "s"))
    with pytest.raises(StoreMismatch, match="was dumped with --streaming: give it again"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "streamed"))


def test_a_plan_says_what_is_known(tiny_teacher_dir: Path, tmp_path: Path, data: Path) -> None:
    counted = plan(settings(tiny_teacher_dir, data, tmp_path / "s"))
    known = plan(streamed(tiny_teacher_dir, data, tmp_path / "s"))  # it ends within the first rows
    assert known["samples"] == 150 and known["bytes"] == counted["bytes"]
    long = write(tmp_path / "long.jsonl", rows(1200))
    found = plan(streamed(tiny_teacher_dir, long, tmp_path / "s"))
    assert found["bytes_per_sample"] > 0 and found["free_bytes"] > 0
    assert {found[name] for name in ("bytes", "shards", "samples", "tokens", "seconds")} == {None}
    most = plan(streamed(tiny_teacher_dir, long, tmp_path / "s", max_samples=1100))
    assert most["samples"] == 1100 and most["bytes"] == pytest.approx(1100 * found["bytes_per_sample"], rel=0.02)
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def done(tiny_teacher_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "s"
    dump(streamed(tiny_teacher_dir, data, folder))
    return folder


def copied(done: Path, folder: Path) -> Path:
    return Path(shutil.copytree(done, folder))


def test_a_source_that_changed_is_refused(tiny_teacher_dir: Path, tmp_path: Path, data: Path, done: Path) -> None:
    """In a row of the third part, by a row that is gone, or at its end."""
    content, folder = rows(150), copied(done, tmp_path / "s")
    third = parts(folder)[2]
    content[third["start"]]["text"] += " more"

    def refused(changed: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(StoreMismatch, match=message):
            dump(streamed(tiny_teacher_dir, write(tmp_path / "rows.jsonl", changed), folder))

    refused(content, r"identity\.dataset\.first_rows_sha256 differs")  # it is among the rows that were planned by
    plan_of = json.loads((folder / "plan.json").read_text())
    assert plan_of["identity"]["dataset"]["first_rows"] == {"train": 150}
    later = rows(1300)
    source = write(tmp_path / "later.jsonl", later)
    dump(streamed(tiny_teacher_dir, source, tmp_path / "long", shard_size=30 * SMALL))
    last = parts(tmp_path / "long")[-1]
    assert last["start"] >= 1000
    later[last["start"] + 1]["text"] += " more"
    again = streamed(tiny_teacher_dir, write(source, later), tmp_path / "long", shard_size=30 * SMALL)
    name = f"plan-{len(parts(tmp_path / 'long')):04d}.json"
    with pytest.raises(StoreMismatch, match=f"rows {last['start']} to 1300 of split train are not those of {name}: "
                                            "their content differs"):  # fmt: skip
        dump(again)
    write(source, rows(1300)[:-3])
    with pytest.raises(StoreMismatch, match=f"not those of {name}: the source ends at row 1297"):
        dump(again)


@pytest.mark.parametrize("harm", ["edited", "missing", "swapped", "foreign"])
def test_a_part_that_is_not_as_it_was_appended_is_refused(
    harm: str, tiny_teacher_dir: Path, tmp_path: Path, data: Path, done: Path
) -> None:
    folder = copied(done, tmp_path / "s")
    first, second, third = (folder / f"plan-{at:04d}.json" for at in (1, 2, 3))
    if harm == "edited":
        second.write_text(second.read_text().replace('"ended": false', '"ended": true'))
        message = r"plan-0002\.json was changed"
    elif harm == "missing":
        second.unlink()
        message = r"plan-0002\.json is not there, and plan-0003\.json is"
    elif harm == "swapped":
        second.rename(first.with_suffix(".tmp"))
        third.rename(second)
        first.with_suffix(".tmp").rename(third)
        message = r"plan-0002\.json does not follow the part before it"
    else:  # whole in itself, and of another name
        made = json.loads(first.read_text())
        made["shards"][0]["split"] = made["split"] = "../../away"
        first.write_text(json.dumps(manifest.sealed(made)))
        message = "'../../away-00000' is not a plain file name"
    with pytest.raises(StoreCorrupt, match=message):
        dump(streamed(tiny_teacher_dir, data, folder))
    assert any(problem["kind"] == "plan" for problem in verify(folder)["problems"])
    (folder / "store.json").unlink()
    with pytest.raises(StoreCorrupt, match=message):
        TeacherStore.open(folder, allow_partial=True)


def test_bad_rows_are_named_before_the_teacher_sees_them(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    content = rows(1300)
    content[1234]["label"] = 7
    source = write(tmp_path / "rows.jsonl", content)
    config = streamed(tiny_teacher_dir, source, tmp_path / "s", shard_size=20 * SMALL)
    with pytest.raises(DataError, match=r"split train, row 1234: column 'label' is 7"):
        dump(config)
    before = parts(tmp_path / "s")
    assert before and before[-1]["stop"] <= 1234
    content[1234]["label"] = 1
    write(source, content)
    assert dump(config)["splits"]["train"]["samples"] == 1300
    pad = "x" * 1100  # so that the file is read in several pieces, and the last has another type
    wide = [{"text": "a film", "label": 1, "pad": pad} for _ in range(10_000)] + [
        {"text": "b", "label": "no", "pad": ""}
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read, split train, after row 9\d\d\d: "):
        dump(streamed(tiny_teacher_dir, write(source, wide), tmp_path / "t", shard_size=10**7))


def test_what_lists_of_numbers_mean_is_settled_by_the_first_rows(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """0/1 a class in all the first rows, and then class ids: a dump that went on would hold both."""
    teacher = bert(tiny_tokenizer_dir, tmp_path / "bert", num_labels=3, problem_type="multi_label_classification")
    content = rows(1010, label=lambda at: [at % 2, 1, 0] if at < 1005 else [2])
    source = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(DataError, match="row 1005: column 'label' has 1 numbers; one for each of 3 classes expected"):
        dump(streamed(teacher, source, tmp_path / "s", shard_size=2**20))


def test_what_cannot_stream_says_why(tiny_teacher_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    words = tmp_path / "a.conll"
    words.write_text("word\tO\n\n")
    with pytest.raises(ConfigError, match=r"--streaming: a\.conll is read whole, as all CoNLL files are"):
        open_stream(streamed(tiny_teacher_dir, words, tmp_path / "s"), None)
    squad = question_cases.write(tmp_path / "squad.json", question_cases.articles(question_cases.squad(4)))
    with pytest.raises(ConfigError, match=r"--streaming: split train of .*squad\.json holds articles"):
        open_stream(streamed(tiny_teacher_dir, squad, tmp_path / "s"), None)
    for name, content in (("empty.jsonl", ""), ("head.csv", "text,label\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"empty|no rows"):
            open_stream(streamed(tiny_teacher_dir, tmp_path / name, tmp_path / "s"), None)
    given: dict[str, Any] = {
        "teacher": str(tiny_teacher_dir),
        "dataset": "any/hub",
        "output_dir": "s",
        "streaming": True,
    }
    with pytest.raises(ConfigError, match="--budget is of the whole store, and nobody knows how many rows come"):
        DumpConfig(**given, task="causal-lm", budget=10**9)
    with pytest.raises(ConfigError, match="--view-transforms mixup mixes any two images, and a stream has few"):
        DumpConfig(**given, task="image-classification", views=2, view_transforms=["crop", "mixup"])
    with pytest.raises(ConfigError, match="--max-samples is a whole number from 1; got 0"):
        DumpConfig(**given, task="causal-lm", max_samples=0)


def test_views_of_images_stream(tmp_path: Path) -> None:
    teacher = image_cases.vit(tmp_path / "vit", id2label={0: "a", 1: "b", 2: "c"})
    train, test = image_cases.write(tmp_path / "a.parquet", 25), image_cases.write(tmp_path / "b.parquet", 9)
    source = f"train={train},test={test}"
    for name, streaming in (("s", True), ("plain", False)):
        dump(image_cases.settings(teacher, source, tmp_path / name, views=2, shard_size=8000, streaming=streaming))
    check_same(tmp_path / "s", tmp_path / "plain", 1e-4)
    assert verify(tmp_path / "s")["problems"] == []
    assert len(parts(tmp_path / "s")[0]["shards"]) == 2 and len(parts(tmp_path / "s")) >= 3


def test_a_streamed_store_is_a_store_like_any_other(
    tiny_teacher_dir: Path, tmp_path: Path, data: Path, done: Path
) -> None:
    """Pushed, pulled, pushed again once it grew, merged with one that was counted, rows dropped; copies do not grow."""
    source = write(tmp_path / "rows.jsonl", rows(170))
    mine, there = copied(done, tmp_path / "mine"), tmp_path / "there"
    push(PushConfig(str(mine), f"file://{there}"))
    pull(PullConfig(f"file://{there}", str(tmp_path / "pulled")))
    assert verify(tmp_path / "pulled")["problems"] == []
    with pytest.raises(StoreError, match="is a copy of what was dumped with --streaming"):
        dump(streamed(tiny_teacher_dir, data, tmp_path / "pulled"))
    dump(streamed(tiny_teacher_dir, source, mine))
    push(PushConfig(str(mine), f"file://{there}"))
    pull(PullConfig(f"file://{there}", str(tmp_path / "pulled")))
    assert verify(tmp_path / "pulled")["problems"] == []
    check_same(tmp_path / "pulled", mine, 0)
    pull(PullConfig(f"file://{there}", str(tmp_path / "part"), fields=["teacher_logits"], split=["train"]))
    assert verify(tmp_path / "part")["problems"] == []

    other = write(tmp_path / "other.jsonl", [{"text": f"film {at}", "label": 1} for at in range(30)])
    dump(settings(tiny_teacher_dir, other, tmp_path / "counted"))
    merge(MergeConfig([str(mine), str(tmp_path / "counted")], str(tmp_path / "merged")))
    with TeacherStore.open(tmp_path / "merged") as store:
        assert len(store.select("train")) == 200
    drop(DropConfig(str(mine), where="source_index = 3", yes=True))
    assert verify(mine)["samples"] == 169 and verify(mine)["problems"] == []
    with pytest.raises(StoreError, match="or lost rows to predistill drop"):
        dump(streamed(tiny_teacher_dir, source, mine))
