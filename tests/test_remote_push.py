"""Stores put where others read them, and the cards that tell what they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import synthetic_store
import yaml
from predistill import ConfigError, StoreCorrupt, StoreError, StoreIncomplete, StoreMismatch, TeacherStore
from predistill.store import manifest
from predistill.store.card import licences_in, store_card
from predistill.store.remote import elsewhere as remote
from predistill.store.remote.config import PushConfig
from predistill.store.remote.elsewhere import FilePlace
from predistill.store.remote.push import push
from predistill.store.verify import verify
from remote_cases import as_json, files_of, predistill, wide_store, without_card

LICENCES = {"license": "cc-by-4.0", "teacher_license": "apache-2.0", "dataset_license": "other"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_store(tmp_path_factory.mktemp("wide") / "store")


def send(store: Path, there: Path, **settings: Any) -> dict[str, Any]:
    return push(PushConfig(str(store), f"file://{there}", **settings))


def test_all_but_the_index_arrives(wide: Path, tmp_path: Path) -> None:
    before = files_of(wide)
    found = send(wide, tmp_path / "there", **LICENCES)
    assert without_card(tmp_path / "there") == without_card(wide)
    assert not (tmp_path / "there" / "index.duckdb").exists()
    assert found["sent"] == sum(len(data) for name, data in without_card(wide).items() if name != "store.json")
    assert files_of(wide) == before  # the store itself stays as it is
    again = send(wide, tmp_path / "there")
    assert again["sent"] == 0
    assert licences_in((tmp_path / "there" / "README.md").read_text()) == LICENCES  # those of the first time


def test_the_manifest_arrives_last(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put = FilePlace.put

    def noted(place: FilePlace, local: Path, name: str) -> None:
        put(place, local, name)
        order.append(name)

    monkeypatch.setattr(FilePlace, "put", noted)
    send(wide, tmp_path / "there")
    assert order[-1] == "store.json" and order[0] == "plan.json"
    for name in order:
        if name.endswith(".arrow"):
            assert order.index(name) < order.index(name.replace(".arrow", ".json"))


def test_memory_is_a_place_too(wide: Path) -> None:
    import fsspec

    push(PushConfig(str(wide), "memory://pushed/store"))
    memory = fsspec.filesystem("memory")
    for name, data in without_card(wide).items():
        assert memory.cat_file(f"/pushed/store/{name}") == data
    with TeacherStore.open("memory://pushed/store") as store:
        assert store.select(split="train")[[0]]["teacher_logits"].shape == (1, 2000)


_SLOW = """
import sys, time
from predistill.store.remote import elsewhere as remote
from predistill.store.remote.push import push
from predistill.store.remote.config import PushConfig
put = remote.FilePlace.put
def slow(*words):
    time.sleep(0.1)
    put(*words)
remote.FilePlace.put = slow
push(PushConfig(sys.argv[1], sys.argv[2], jobs=2, verify=False))
"""


def test_killed_anywhere_it_goes_on(wide: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    sent = {"shards": 0}
    for count in (2, 4):
        running = subprocess.Popen([sys.executable, "-c", _SLOW, str(wide), f"file://{there}"])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running.poll() is None:
            if len(list(there.glob("shards/*.json"))) >= count:
                break
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (there / "store.json").exists()
        sent["shards"] = len(list(there.glob("shards/*.json")))
    with pytest.raises(StoreIncomplete, match="half a store"):
        TeacherStore.open(f"file://{there}")
    found = send(wide, there)
    assert found["sent"] < sum(path.stat().st_size for path in wide.glob("shards/*.arrow"))
    assert without_card(there) == without_card(wide)


def test_what_was_lost_there_is_sent_again(wide: Path, tmp_path: Path) -> None:
    send(wide, tmp_path / "there")
    (tmp_path / "there" / "shards" / "train-00001.arrow").unlink()
    (tmp_path / "there" / "shards" / "train-00002.json").write_text("{}")
    assert 0 < send(wide, tmp_path / "there")["sent"] < 400_000
    assert without_card(tmp_path / "there") == without_card(wide)


def test_another_store_is_not_written_over(wide: Path, tmp_path: Path) -> None:
    other = synthetic_store.write(tmp_path / "other")
    send(other, tmp_path / "there")
    before = files_of(tmp_path / "there")
    with pytest.raises(StoreMismatch, match="holds another store.*--overwrite"):
        send(wide, tmp_path / "there")
    assert files_of(tmp_path / "there") == before
    send(wide, tmp_path / "there", overwrite=True)
    assert without_card(tmp_path / "there") == without_card(wide)


def test_a_store_that_is_not_whole_is_not_pushed(wide: Path, tmp_path: Path) -> None:
    store = shutil.copytree(wide, tmp_path / "store")
    path = store / "shards" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"is not pushed: shards/train-00000\.arrow: its sha256"):
        send(store, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    (store / "store.json").unlink()
    with pytest.raises(StoreIncomplete):
        send(store, tmp_path / "there")
    with pytest.raises(StoreError, match="is not a store"):
        send(tmp_path / "nowhere", tmp_path / "there")
    with pytest.raises(ConfigError, match="STORE is a folder"):
        push(PushConfig("s3://bucket/store", "file:///tmp/x"))


def test_links_are_not_followed(wide: Path, tmp_path: Path) -> None:
    store = shutil.copytree(wide, tmp_path / "store")
    (tmp_path / "secret").write_text("password")
    (store / "README.md").unlink()
    (store / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreCorrupt, match="a plain file expected"):
        send(store, tmp_path / "there")


def test_what_arrives_is_read_back(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = FilePlace.put

    def losing(place: FilePlace, local: Path, name: str) -> None:
        put(place, local, name)
        if name.endswith("train-00001.arrow"):
            path = tmp_path / "there" / name
            path.write_bytes(bytes(len(path.read_bytes())))

    monkeypatch.setattr(FilePlace, "put", losing)
    with pytest.raises(StoreError, match=r"train-00001\.arrow is not what was sent"):
        send(wide, tmp_path / "there")
    assert not (tmp_path / "there" / "store.json").exists()
    assert not (tmp_path / "there" / "shards" / "train-00001.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="no permission"):
        send(wide, tmp_path / "there")


def test_refusals_are_one_line(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/there?secret=1")

    monkeypatch.setattr(LocalFileSystem, "put_file", refuse)
    with pytest.raises(StoreError, match="no permission; check the credentials") as caught:
        send(wide, tmp_path / "there")
    assert "secret" not in str(caught.value)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "put_file", full)
    with pytest.raises(remote.OutOfSpace, match="No space left on device; what is there stays"):
        send(wide, tmp_path / "there")


# ---- the card ----


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_says_what_it_is(wide: Path, tmp_path: Path) -> None:
    send(wide, tmp_path / "there", **LICENCES)
    card = (tmp_path / "there" / "README.md").read_text()
    head = head_of(card)
    assert {name: head[name] for name in LICENCES} == LICENCES
    assert head["configs"][0]["data_files"] == [{"split": "samples", "path": "samples.parquet"}]
    made = manifest.read_manifest(wide)
    for said in (
        "| train | 64 |", "| validation | 16 |", "teacher_logits", "float32", "licence | cc-by-4.0",
        made["fingerprint"], f"{sum(entry['bytes'] for entry in made['shards']):,}",
    ):  # fmt: skip
        assert said in card
    from huggingface_hub import DatasetCard

    assert DatasetCard(card).data.to_dict()["license"] == "cc-by-4.0"


def test_its_examples_run(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(wide, tmp_path / "there", **LICENCES)
    card = (tmp_path / "there" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for block, name in zip(blocks, ("TeacherStore", "pyarrow", "load_dataset", "duckdb"), strict=True):
        assert f"import {name}" in block
    held: dict[str, Any] = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line and "import" not in line]) == 1
        exec(block, held)
    assert len(held["rows"]) == 64 and isinstance(held["table"], pa.Table)
    assert held["samples"].num_rows == 80
    assert "validation" in capsys.readouterr().out


def test_figures_are_those_of_the_store(tmp_path: Path) -> None:
    """The synthetic store's predictions are its labels; its 8 labelled validation rows agree."""
    store = synthetic_store.write(tmp_path / "store")
    card = store_card(store, manifest.read_manifest(store))
    assert "agree in 100.00% of the 8 labelled samples of validation" in card


def test_a_strangers_words_stay_words(tmp_path: Path) -> None:
    store = wide_store(tmp_path / "store", identity={"teacher": {"name": "<script>x</script>\n| [a](http://b) |"}})
    card = store_card(store, manifest.read_manifest(store))
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body and "[a](" not in body


@pytest.mark.parametrize(
    "card", ["", "---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 7\n---\n", None]
)
def test_cards_without_licences(card: str | None) -> None:
    assert licences_in(card) == {}


def test_a_part_carries_licences(wide: Path, tmp_path: Path) -> None:
    send(wide, tmp_path / "there", **LICENCES)
    predistill("pull", tmp_path / "there", tmp_path / "part", "--split", "validation", cache=tmp_path / "cache")
    card = (tmp_path / "part" / "README.md").read_text()
    assert licences_in(card) == LICENCES and "without 4 of its 5 shards" in card
    assert verify(tmp_path / "part")["ok"]


def test_the_command(wide: Path, tmp_path: Path) -> None:
    told = as_json(predistill("push", wide, tmp_path / "there", "--license", "mit", "--json"))
    assert told["license"] == "mit" and told["files"] == len(files_of(tmp_path / "there"))
    entries = json.loads((tmp_path / "there" / "store.json").read_text())["shards"]
    for entry in entries:
        data = (tmp_path / "there" / "shards" / f"{entry['name']}.arrow").read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    for words in (["--license", " "], ["--jobs", "0"]):
        done = predistill("push", wide, tmp_path / "there", *words, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
    done = predistill("push", wide, "hf://user/name", check=False)
    assert done.returncode == 1 and "hf://datasets/USER/NAME" in done.stderr
