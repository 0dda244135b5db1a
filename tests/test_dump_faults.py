"""What can go wrong while a dump runs: killed at any moment, interrupted, no room left. Nothing is lost, nothing torn.

Dumps run in forks of one process that has everything imported already, so that a kill costs tenths of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from dump_cases import SENTENCE
from predistill.store import OutOfSpace, TeacherStore
from predistill.store.verify import verify

SERVER = """
import json, os, resource, sys, time
import predistill.store.index, predistill.store.verify
import datasets, torch, transformers
import transformers.models.bert.modeling_bert
from predistill.store import PredistillError
from predistill.teacher_dump import disk, dump as story
from predistill.teacher_dump.capture import Capture
from predistill.teacher_dump.config import DumpConfig

def work(order):
    if order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
    if order.get("blind"):
        story.check_room = lambda *_: None
    if order.get("pause"):
        call = Capture.__call__
        Capture.__call__ = lambda self, *given: (time.sleep(order["pause"]), call(self, *given))[1]
    try:
        story.dump(DumpConfig(**order["config"]))
        return 0
    except PredistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130

for line in sys.stdin:
    if not (child := os.fork()):
        code = work(json.loads(line))
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Starts dumps in forks of a warm process."""

    def __init__(self, folder: Path):
        self.errors = folder / "stderr"
        here = Path(__file__).resolve().parent
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(folder / "xdg"),
        }
        with open(self.errors, "a") as errors:  # appended to, so that `start` may empty it
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=here.parent.parent,
            )

    def start(self, config: dict[str, Any], **order: Any) -> int:
        """Returns the process id of the dump. stderr begins anew: a limit on file size holds for it too."""
        os.truncate(self.errors, 0)
        self._pipe("stdin").write(json.dumps({"config": config, **order}) + "\n")
        self._pipe("stdin").flush()
        return int(self._pipe("stdout").readline())

    def wait(self) -> int:
        """Exit code of the dump, negative for a signal."""
        return int(self._pipe("stdout").readline())

    def run(self, config: dict[str, Any], **order: Any) -> int:
        self.start(config, **order)
        return self.wait()

    def last_line(self) -> str:
        return self.errors.read_text().splitlines()[-1]

    def close(self) -> None:
        self._pipe("stdin").close()
        self._process.wait(30)
        self._pipe("stdout").close()

    def _pipe(self, name: str) -> IO[str]:
        return getattr(self._process, name)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def config(tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dump of 240 rows in some 20 shards."""
    rng = random.Random(0)
    words = SENTENCE.split()
    rows = [
        {"text": " ".join(rng.choices(words, k=rng.randint(1, 30))), "label": rng.randint(-1, 1)} for _ in range(240)
    ]
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "teacher": str(tiny_teacher_dir),
        "dataset": str(data),
        "task": "text-classification",
        "device": "cpu",
        "shard_size": 2000,
        "tokens_per_batch": 128,
        "keep_columns": ["text"],
    }


@pytest.fixture(scope="module")
def whole(forks: Forks, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted dump, and its seconds once files are cached."""
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp("whole") / name
        began = time.perf_counter()
        assert forks.run({**config, "output_dir": str(folder)}) == 0, forks.last_line()
    return folder, time.perf_counter() - began


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.arrow"))}


def committed(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "shards").glob("*.json"))


def wait_for_shards(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(committed(folder)) < count:
        assert time.monotonic() < deadline, f"{folder} has {committed(folder)}"
        time.sleep(0.005)


def check_equal(folder: Path, whole: Path) -> None:
    assert shards(folder) == shards(whole)
    found = verify(folder)
    assert found["ok"], found["problems"]


@pytest.mark.slow
def test_killed_at_any_moment(forks: Forks, config: dict[str, Any], whole: tuple[Path, float], tmp_path: Path) -> None:
    """At least 30 kills, at random moments, each followed at once by the same command."""
    rng, reference = random.Random(1), shards(whole[0])
    kills = finished = at = 0
    while kills < 30 or not finished:
        folder = tmp_path / f"store-{at}"
        mine = {**config, "output_dir": str(folder)}
        pid = forks.start(mine)
        time.sleep(rng.uniform(0, 0.8) * whole[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = forks.wait()
        assert code in (0, -signal.SIGKILL), forks.last_line()
        kills += code != 0
        for name in committed(folder):
            assert (folder / "shards" / f"{name}.arrow").read_bytes() == reference[f"{name}.arrow"]
        if code == 0:
            check_equal(folder, whole[0])
            finished, at = finished + 1, at + 1
        assert kills < 300, "never came to an end"
    folder = tmp_path / f"store-{at}"
    assert forks.run({**config, "output_dir": str(folder)}) == 0, forks.last_line()
    check_equal(folder, whole[0])


@pytest.mark.slow
def test_killed_while_it_writes(
    forks: Forks, config: dict[str, Any], whole: tuple[Path, float], tmp_path: Path
) -> None:
    """One dump that is killed again and again right after a commit, or within the next one."""
    folder, rng, kills = tmp_path / "store", random.Random(2), 0
    total = len(shards(whole[0]))
    while len(committed(folder)) < total - 1:
        target = len(committed(folder)) + rng.randint(1, 3)
        pid = forks.start({**config, "output_dir": str(folder)}, pause=0.01)
        wait_for_shards(folder, min(target, total))
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        kills += forks.wait() == -signal.SIGKILL
    assert kills >= 4
    assert forks.run({**config, "output_dir": str(folder)}) == 0, forks.last_line()
    check_equal(folder, whole[0])


def test_interrupted_by_a_person(
    forks: Forks, config: dict[str, Any], whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    mine = {**config, "output_dir": str(folder)}
    pid = forks.start(mine, pause=0.3)  # of some 30 shards: time enough to be seen and stopped
    wait_for_shards(folder, 3)
    os.kill(pid, signal.SIGINT)
    assert forks.wait() == 130
    kept = committed(folder)
    assert 3 <= len(kept) < len(shards(whole[0])) and not list(folder.rglob("*.tmp"))
    with TeacherStore.open(folder, allow_partial=True) as store:
        assert sum(split["shards"] for split in store.splits.values()) == len(kept)
    stamps = {name: (folder / "shards" / f"{name}.arrow").stat().st_mtime_ns for name in kept}
    assert forks.run(mine) == 0
    assert stamps == {name: (folder / "shards" / f"{name}.arrow").stat().st_mtime_ns for name in kept}
    check_equal(folder, whole[0])


def test_another_dump_joins_and_goes_on_for_one_that_is_killed(
    forks: Forks, config: dict[str, Any], whole: tuple[Path, float], tmp_path: Path
) -> None:
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    folder = tmp_path / "store"
    pid = forks.start({**config, "output_dir": str(folder)}, pause=0.3)
    wait_for_shards(folder, 1)
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    assert dump(DumpConfig(**config, output_dir=str(folder)))["complete"]
    assert forks.wait() == -signal.SIGKILL
    check_equal(folder, whole[0])


def test_another_dump_of_other_settings_is_kept_out(forks: Forks, config: dict[str, Any], tmp_path: Path) -> None:
    from predistill.store import StoreError, StoreMismatch
    from predistill.teacher_dump.config import DumpConfig
    from predistill.teacher_dump.dump import dump

    mine = {**config, "output_dir": str(tmp_path / "store")}
    pid = forks.start(mine, pause=0.1)
    wait_for_shards(tmp_path / "store", 1)
    with pytest.raises(StoreMismatch, match="settings.dtype differs"):
        dump(DumpConfig(**mine, dtype="float32"))
    with pytest.raises(StoreError, match="is being written by another dump"):
        dump(DumpConfig(**mine, overwrite=True))
    os.kill(pid, signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL


@pytest.mark.parametrize("limit", [4000, 20_000, 300_000], ids=["no shard fits", "no index", "half an index"])
def test_files_may_not_grow(
    limit: int, forks: Forks, config: dict[str, Any], whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    mine = {**config, "output_dir": str(folder)}
    assert max(map(len, shards(whole[0]).values())) > 4000
    assert forks.run(mine, file_limit=limit) == 1
    assert forks.last_line().startswith("OutOfSpace: ") and "make room, then run the same " in forks.last_line()
    assert not (folder / "store.json").exists() and not list((folder / "shards").glob("*.tmp"))
    assert len(committed(folder)) == (0 if limit == 4000 else len(shards(whole[0])))
    assert forks.run(mine) == 0, forks.last_line()
    check_equal(folder, whole[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 kB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_disk_fills_up(forks: Forks, config: dict[str, Any], whole: tuple[Path, float], small_disk: Path) -> None:
    folder = small_disk / "store"
    mine = {**config, "output_dir": str(folder)}
    assert forks.run(mine, blind=True) == 1
    assert forks.last_line().startswith("OutOfSpace: ") and " GB free" in forks.last_line()
    kept = committed(folder)
    assert 0 < len(kept) < len(shards(whole[0])) and not list(folder.rglob("*.tmp"))
    for name in kept:
        assert (folder / "shards" / f"{name}.arrow").read_bytes() == shards(whole[0])[f"{name}.arrow"]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert forks.run(mine) == 0, forks.last_line()
    check_equal(folder, whole[0])


def test_room_is_looked_for_before(forks: Forks, config: dict[str, Any], small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(60_000))
    assert forks.run({**config, "output_dir": str(small_disk / "store")}) == 1
    line = forks.last_line()
    assert line.startswith("OutOfSpace: ") and " needs " in line and "are free: nothing was started" in line
    assert not (small_disk / "store").exists()


def test_room_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from predistill.teacher_dump import disk

    monkeypatch.setattr(disk, "free_bytes", lambda folder: 12 * 10**9)
    disk.check_room(tmp_path, 12 * 10**9)
    with pytest.raises(OutOfSpace, match="needs 31 GB, 12 GB are free"):
        disk.check_room(tmp_path, 31 * 10**9)
