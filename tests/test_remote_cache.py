"""Stores that are opened where they are: the index first, shards when they are read, a cache that several share."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import synthetic_store
from classification_store import write_store
from predistill import ConfigError, OutOfSpace, StoreCorrupt, StoreMismatch, TeacherStore
from predistill.store.remote import elsewhere as remote
from predistill.store.remote.cache import Cache
from predistill.store.remote.opened import RemoteStore, open_remote
from predistill.store.verify import describe, verify
from remote_cases import forge, predistill, wide_store

SHARD = 140_000  # bytes, about, of a shard of the wide store


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_store(tmp_path_factory.mktemp("wide") / "store")


def arrived(cache: Path) -> set[str]:
    return {path.stem for path in cache.glob("stores/*/shards/*.arrow")}


def test_rows_are_those_of_the_folder(tmp_path: Path, own_cache: Path) -> None:
    folder = synthetic_store.write(tmp_path / "store")
    with TeacherStore.open(f"file://{folder}") as there, TeacherStore.open(folder) as here:
        assert isinstance(there, RemoteStore) and there.splits == here.splits
        assert arrived(own_cache) == set()
        for settings in ({"split": "validation"}, {"where": "label = 1 AND view = 0"}, {}):
            mine, theirs = there.select(**settings), here.select(**settings)
            assert mine.sample_ids.tolist() == theirs.sample_ids.tolist()
            left, right = mine[range(len(mine))], theirs[range(len(theirs))]
            assert left.keys() == right.keys()
            for name in left:
                np.testing.assert_equal(left[name], right[name])
        query = "SELECT * FROM samples ORDER BY sample_id"
        assert repr(there.sql(query).fetchall()) == repr(here.sql(query).fetchall())
        assert there.sql("FROM shards ORDER BY ALL").fetchall() == here.sql("FROM shards ORDER BY ALL").fetchall()


def test_shards_come_when_they_are_read(wide: Path, own_cache: Path) -> None:
    with TeacherStore.open(f"file://{wide}") as store:
        store.sql("SELECT avg(label) FROM samples").fetchall()
        rows = store.select(split="train")
        assert arrived(own_cache) == set()
        rows[20]
        assert arrived(own_cache) == {"train-00001"}
        list(rows.batches([[0, 1], [2, 60]]))
        assert arrived(own_cache) == {"train-00000", "train-00001", "train-00003"}


def test_a_second_time_nothing_comes(wide: Path, tmp_path: Path, own_cache: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    with TeacherStore.open(f"file://{source}") as store:
        store.select(split="train")[0]
    for path in (*source.glob("shards/*"), source / "samples.parquet"):
        path.unlink()
    with TeacherStore.open(f"file://{source}") as store:
        assert store.select(split="train", where="source_index < 4")[[0, 1]]["teacher_logits"].shape == (2, 2000)
        with pytest.raises(StoreCorrupt, match=r"train-00001\.arrow is not the file"):
            store.select(split="train")[20]


def test_a_truncated_download_is_not_read(wide: Path, tmp_path: Path, own_cache: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    path = source / "shards" / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:-5000])
    with TeacherStore.open(f"file://{source}") as store:
        with pytest.raises(StoreCorrupt, match=r"is not the file that its store\.json says"):
            store.select(split="train")[0]
        assert arrived(own_cache) == set()
        shutil.copy(wide / "shards" / "train-00000.arrow", path)
        assert store.select(split="train")[0]["teacher_logits"].shape == (2000,)


def test_what_a_dead_process_left_is_gone_on_with(wide: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TeacherStore.open(f"file://{wide}") as store:
        part = store.path / "shards" / "train-00000.arrow.part"
        whole = (wide / "shards" / "train-00000.arrow").read_bytes()
        part.write_bytes(whole[:100_000])
        asked: list[int] = []
        read = remote.FilePlace.read

        def noted(place: Any, name: str, start: int = 0, stop: int | None = None) -> bytes:
            asked.append(start)
            return read(place, name, start, stop)

        monkeypatch.setattr(remote.FilePlace, "read", noted)
        store.select(split="train")[0]
        assert asked == [100_000]
        assert (store.path / "shards" / "train-00000.arrow").read_bytes() == whole


# ---- the limit ----


def test_the_least_recently_used_go_first(wide: Path, own_cache: Path) -> None:
    cache = Cache(limit=3 * SHARD)
    for number in (0, 1, 2, 0):  # each opened, read and closed
        with open_remote(f"file://{wide}", cache=cache) as store:
            store.select(split="train")[16 * number]
    assert arrived(own_cache) == {"train-00000", "train-00001", "train-00002"}
    with open_remote(f"file://{wide}", cache=cache) as store:
        store.select(split="train")[48]
    assert arrived(own_cache) == {"train-00000", "train-00002", "train-00003"}
    held = sum(path.stat().st_size for path in own_cache.glob("stores/*/shards/*.arrow"))
    assert held <= cache.limit


def test_what_is_mapped_stays(wide: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE_SIZE", str(2 * SHARD))
    with TeacherStore.open(f"file://{wide}") as store:
        rows = store.select(split="train")
        first = rows[0]["teacher_logits"]
        rows[16]
        with pytest.raises(OutOfSpace, match="mapped by running processes.*PREDISTILL_CACHE_SIZE"):
            rows[32]
        other = TeacherStore.open(f"file://{wide}")
        with pytest.raises(OutOfSpace):
            other.select(split="train")[32]
        other.close()
        assert arrived(own_cache) == {"train-00000", "train-00001"}
        np.testing.assert_array_equal(rows[0]["teacher_logits"], first)
    with TeacherStore.open(f"file://{wide}") as store:  # the one before let go
        store.select(split="train")[32]
    assert "train-00002" in arrived(own_cache) and len(arrived(own_cache)) == 2


_HOLD = """
import sys
from predistill import TeacherStore
store = TeacherStore.open(sys.argv[1])
store.select(split="train")[0]
print("held", flush=True)
sys.stdin.read()
"""


def test_a_living_process_keeps_its_shards_a_killed_one_does_not(
    wide: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE_SIZE", str(SHARD))
    holding = subprocess.Popen(
        [sys.executable, "-c", _HOLD, f"file://{wide}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holding.stdout and holding.stdin and holding.stdout.readline() == "held\n"
    with TeacherStore.open(f"file://{wide}") as store:
        with pytest.raises(OutOfSpace):
            store.select(split="train")[16]
        assert arrived(own_cache) == {"train-00000"}
        holding.kill()
        holding.wait()
        store.select(split="train")[16]
    holding.stdin.close()
    holding.stdout.close()
    assert arrived(own_cache) == {"train-00001"}


def test_a_limit_is_a_size_and_a_cache_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE_SIZE", "a lot")
    with pytest.raises(ConfigError, match="PREDISTILL_CACHE_SIZE: a size is written like 256MB"):
        Cache()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written.*PREDISTILL_CACHE"):
        Cache(tmp_path / "file", "1GB")


# ---- several processes ----

_READ = """
import sys, json
from predistill import TeacherStore
store = TeacherStore.open(sys.argv[1])
rows = store.select(split="train")
print(json.dumps(float(rows[range(64)]["teacher_logits"].astype("float64").sum())))
"""


def test_two_processes_share_it(wide: Path, own_cache: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", _READ, f"file://{wide}"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [json.loads(one.communicate(timeout=120)[0]) for one in both]
    with TeacherStore.open(wide) as store:
        expected = float(store.select(split="train")[range(64)]["teacher_logits"].astype("float64").sum())
    assert said == [expected, expected]
    assert len(list(own_cache.glob("stores/*"))) == 1 and not list(own_cache.rglob("*.part"))
    for name in arrived(own_cache):
        [path] = own_cache.glob(f"stores/*/shards/{name}.arrow")
        assert path.read_bytes() == (wide / "shards" / f"{name}.arrow").read_bytes()


def _in_worker(rows: Any) -> float:
    return float(rows[range(16)]["teacher_logits"].sum())


@pytest.mark.slow
def test_rows_go_to_worker_processes(wide: Path) -> None:
    with TeacherStore.open(f"file://{wide}") as store:
        rows = store.select(split="validation")
        expected = _in_worker(rows)
        again = pickle.loads(pickle.dumps(rows))
        assert _in_worker(again) == expected
        again.store.close()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply(_in_worker, (rows,)) == expected


def test_reopened_it_is_the_same_store_or_none(wide: Path, tmp_path: Path, own_cache: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    with TeacherStore.open(f"file://{source}") as store:
        held = pickle.dumps(store)
    shutil.rmtree(source)
    shutil.copytree(wide_store(tmp_path / "other", seed=3), source)
    pickle.loads(held).close()  # the cache has its index
    shutil.rmtree(own_cache)
    with pytest.raises(StoreMismatch, match="changed while it was read"):
        pickle.loads(held)


def test_a_store_that_changes_underneath(wide: Path, tmp_path: Path) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    with TeacherStore.open(f"file://{source}") as store:
        shutil.rmtree(source)
        shutil.copytree(wide_store(tmp_path / "other", seed=3), source)
        with pytest.raises(StoreMismatch, match="changed while it was read: its store.json is another"):
            store.select(split="train")[0]


# ---- a hostile samples.parquet ----


def _write_samples(folder: Path, query: str) -> None:
    import hashlib

    path = folder / "samples.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW samples AS FROM '{path}'")
        connection.execute(f"COPY ({query}) TO '{path}.new' (FORMAT parquet)")
    os.replace(f"{path}.new", path)
    data = path.read_bytes()

    def seal(made: dict[str, Any]) -> None:
        made["files"]["samples.parquet"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    forge(folder, seal)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM samples LIMIT 79", "has not the 80 rows"),
        ("SELECT * REPLACE (sample_id + 1 AS sample_id) FROM samples", "does not place its rows"),
        ("SELECT * REPLACE (0 AS sample_id) FROM samples", "does not place its rows"),
        ("SELECT * REPLACE ('train-00000' AS shard) FROM samples", "does not place its rows"),
        ("SELECT * REPLACE ('../../x' AS shard) FROM samples", "does not place its rows"),
        ("SELECT * REPLACE (-1 AS row) FROM samples", "does not place its rows"),
        ("SELECT * REPLACE ('x' AS sample_id) FROM samples", "is not a samples table"),
        ("SELECT * EXCLUDE (shard) FROM samples", "has not the columns"),
        ("SELECT 1 AS one FROM samples", "has not the columns"),
    ],
)
def test_samples_that_lie_are_refused(
    wide: Path, tmp_path: Path, own_cache: Path, query: str, message: str
) -> None:
    source = shutil.copytree(wide, tmp_path / "source")
    _write_samples(source, query)
    with pytest.raises(StoreCorrupt, match=message):
        TeacherStore.open(f"file://{source}")
    assert list(own_cache.glob("stores/*")) == []


def test_queries_of_it_cannot_read_this_machine(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("password\n1\n")
    with TeacherStore.open(f"file://{wide}") as store:
        reading = f"FROM read_csv('{tmp_path}/secret.csv')"
        for query in (reading, "ATTACH ':memory:' AS a", "SET threads = 1", "INSTALL httpfs"):
            with pytest.raises(ConfigError):
                store.sql(query).fetchall()
        with pytest.raises(ConfigError, match="is no SQL condition"):
            store.select(where=f"label = (SELECT count(*) FROM read_csv('{tmp_path}/secret.csv'))")


# ---- at the doors ----


def test_a_student_is_trained_from_elsewhere(
    tmp_path: Path, tiny_tokenizer_dir: Path, own_cache: Path
) -> None:
    from predistill.student_train.settings import TrainConfig
    from predistill.student_train.train import train
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    texts = [f"a warm and funny film {number}" for number in range(24)]
    ids = tokenizer(texts)["input_ids"]
    rng = np.random.default_rng(0)
    write_store(
        tmp_path / "store", {"train": ids[:16], "validation": ids[16:]},
        {"train": rng.normal(size=(16, 2)).astype("float32"), "validation": rng.normal(size=(8, 2)).astype("float32")},
        {"train": np.arange(16) % 2, "validation": np.arange(8) % 2}, tokenizer=tokenizer,
        tokenizer_dir=tiny_tokenizer_dir, identity={"teacher": {"weights_sha256": "0" * 64}},
    )  # fmt: skip
    config = {
        "model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "student.json").write_text(json.dumps(config))
    told = train(
        TrainConfig(
            stores=[f"file://{tmp_path}/store"], student_config=str(tmp_path / "student.json"),
            output_dir=str(tmp_path / "run"), training_arguments={"max_steps": 2, "use_cpu": True},
        )
    )  # fmt: skip
    assert "eval_accuracy" in told and arrived(own_cache) == {"train-00000", "validation-00000"}


def test_what_can_be_said_of_it_without_its_shards(wide: Path, own_cache: Path) -> None:
    with TeacherStore.open(wide) as here:
        told = describe(f"file://{wide}")
        assert told["path"] == f"file://{wide}" and told["complete"] and told["fingerprint"] == here.fingerprint
    assert told["splits"] == describe(wide)["splits"] and told["fields"]["teacher_logits"]["bytes"] is None
    assert arrived(own_cache) == set()
    assert "teacher_logits" in predistill("info", f"file://{wide}").stdout
    with pytest.raises(ConfigError, match="predistill pull file://"):
        verify(f"file://{wide}")
