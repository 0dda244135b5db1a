"""Stores on the Hub, by its HTTP interface: hub_server.py stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import READER, WRITER, Hub, serving
from huggingface_hub import constants
from predistill import PredistillError, TeacherStore
from predistill.store.remote.config import PullConfig, PushConfig
from predistill.store.remote.pull import pull
from predistill.store.remote.push import push
from predistill.store.verify import verify
from remote_cases import Done, as_json, files_of, predistill, wide_store, without_card

URL = "hf://datasets/user/reviews"
FLAGS = ["--license", "cc-by-4.0", "--teacher-license", "apache-2.0", "--dataset-license", "other"]
LICENCES: Any = {"license": "cc-by-4.0", "teacher_license": "apache-2.0", "dataset_license": "other"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_store(tmp_path_factory.mktemp("wide") / "store")


class Machine:
    """A machine whose Hub is the stand-in: the program in a process of its own, or the functions in this one."""

    def __init__(self, hub: Hub, address: str, home: Path, monkeypatch: pytest.MonkeyPatch):
        self.hub, self._home, self._patch = hub, home, monkeypatch
        self._env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "NO_PROXY": "*"}
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("PREDISTILL_CACHE", str(home / "cache"))

    def run(self, *words: object) -> Done:
        return predistill(*words, cache=self._home / "cache", HF_TOKEN=WRITER, **self._env)

    def fails(self, work: Callable[[Any], Any], config: Any, token: str = WRITER) -> str:
        """The one line it says."""
        self._patch.setenv("HF_TOKEN", token)
        with pytest.raises(PredistillError) as caught:
            work(config)
        said = str(caught.value)
        assert "\n" not in said and token not in said
        return said

    def files(self) -> dict[str, bytes]:
        return self.hub.repos["user/reviews"][-1]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with serving() as (hub, address):
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield Machine(hub, address, tmp_path, monkeypatch)


@pytest.fixture
def shared(machine: Machine, wide: Path) -> Machine:
    """With the wide store on its Hub."""
    machine.hub.repos["user/reviews"] = [{}, files_of(wide)]
    return machine


@pytest.mark.slow
def test_there_and_back(machine: Machine, wide: Path, tmp_path: Path) -> None:
    assert "--license, --teacher-license, --dataset-license" in machine.fails(push, PushConfig(str(wide), URL))
    assert machine.hub.repos == {}
    told = as_json(machine.run("push", wide, URL, *FLAGS, "--private", "--json"))
    assert told["sent"] > told["bytes"] > 0 and machine.hub.private == {"user/reviews"}
    assert machine.hub.sent[-1] == ["README.md", "store.json"]  # the last commit
    assert all("store.json" not in sent for sent in machine.hub.sent[:-1])
    mine = {name: data for name, data in machine.files().items() if name not in ("README.md", ".gitattributes")}
    assert mine == without_card(wide)
    assert b"license: cc-by-4.0" in machine.files()["README.md"]

    again = push(PushConfig(str(wide), URL))  # licences are carried
    assert again["sent"] == 0 and again["teacher_license"] == "apache-2.0"
    machine.run("pull", URL, tmp_path / "pulled")
    pulled = files_of(tmp_path / "pulled")
    assert pulled.pop("README.md") == machine.files()["README.md"] and pulled == without_card(wide)
    assert verify(tmp_path / "pulled")["ok"]


@pytest.mark.slow
def test_what_is_there_is_not_sent_again(machine: Machine, wide: Path) -> None:
    """As after a push that died: some shards there, no store.json."""
    there = {name: data for name, data in files_of(wide).items() if "train-0000" in name and "00003" not in name}
    machine.hub.repos["user/reviews"] = [there]
    push(PushConfig(str(wide), URL, **LICENCES))
    sent = {name for names in machine.hub.sent for name in names}
    assert sent == {*files_of(wide), "README.md"} - set(there)


@pytest.mark.slow
def test_another_store_is_not_written_over(shared: Machine, tmp_path: Path) -> None:
    other = wide_store(tmp_path / "other", dtype="float16")
    before = dict(shared.files())
    assert "holds another store" in shared.fails(push, PushConfig(str(other), URL, **LICENCES))
    assert shared.files() == before
    push(PushConfig(str(other), URL, **LICENCES, overwrite=True))
    mine = {name: data for name, data in shared.files().items() if name != "README.md"}
    assert mine == without_card(other)
    removal = next(files for files in shared.hub.repos["user/reviews"][2:] if "store.json" not in files)
    assert not any(name.endswith(".arrow") for name in removal)


def test_a_part_of_a_revision(shared: Machine, wide: Path, tmp_path: Path) -> None:
    shared.hub.repos["user/reviews"].append({"store.json": b"{}"})  # somebody breaks main
    first = shared.hub.commit_id("user/reviews", 1)
    told = pull(
        PullConfig(
            URL, str(tmp_path / "part"), split=["validation"], fields=["teacher_confidence"], where="label = 1",
            revision=first,
        )
    )  # fmt: skip
    assert told["shards"] == 1 and told["left_out"] == {"shards": 4, "fields": ["teacher_logits"]}
    assert told["fetched"] < 60_000  # of 130 kB: columns by ranges
    assert verify(tmp_path / "part")["ok"]
    assert "format_version is a positive int" in shared.fails(pull, PullConfig(URL, str(tmp_path / "broken")))


def test_opened_where_it_is(shared: Machine, wide: Path) -> None:
    """At the commit of the moment when it was opened."""
    with TeacherStore.open(URL) as there, TeacherStore.open(wide) as here:
        shared.hub.repos["user/reviews"].append({"store.json": b"{}"})
        rows = [store.select(split="train", where="label = 2")[[0, 5]]["teacher_logits"] for store in (there, here)]
        assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize(
    ("name", "revision", "token", "said"),
    [
        ("datasets/user/nothing", None, WRITER, "there is no such repository, or this account may not see it"),
        ("datasets/user/secret", None, READER, "there is no such repository, or this account may not see it"),
        ("datasets/user/gated", None, READER, "is gated: ask for access"),
        ("datasets/user/reviews", "v9", WRITER, "no such revision"),
        ("datasets/user/reviews@v1", "v2", WRITER, "says revision v1, --revision says v2"),
        ("datasets/user/empty", None, WRITER, "is not a store"),
        ("datasets/user/half", None, WRITER, "is half a store"),
        ("user/model", None, WRITER, "hf://datasets/USER/NAME"),
    ],
)
def test_refusals_are_one_line(
    shared: Machine, wide: Path, tmp_path: Path, name: str, revision: str | None, token: str, said: str
) -> None:
    files = files_of(wide)
    shared.hub.repos |= {
        "user/secret": [files], "user/gated": [files], "user/empty": [{"README.md": b""}],
        "user/half": [{name: data for name, data in files.items() if name != "store.json"}],
    }  # fmt: skip
    shared.hub.private, shared.hub.gated = {"user/secret"}, {"user/gated"}
    assert said in shared.fails(pull, PullConfig(f"hf://{name}", str(tmp_path / "x"), revision=revision), token)


def test_who_may_not_write(shared: Machine, wide: Path) -> None:
    shared.hub.repos["user/reviews"] = [{}]
    for url in (URL, "hf://datasets/user/new"):
        assert "no permission" in shared.fails(push, PushConfig(str(wide), url, **LICENCES), READER)
    assert "user/new" not in shared.hub.repos


def test_an_unreachable_hub(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in machine.fails(pull, PullConfig(URL, str(tmp_path / "x")))
