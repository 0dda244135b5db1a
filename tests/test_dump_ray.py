"""Workers as Ray tasks: the same bytes, a killed one retried, errors as they are raised elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dump_cases import settings, write
from predistill.store import ConfigError, StoreMismatch
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump
from torch import nn

ROWS = [{"text": f"row {at} " + "word " * (at % 17), "label": at % 2} for at in range(400)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray of two CPUs, whose workers find the package and the tests where this process does."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    above = str(Path(__file__).resolve().parent.parent.parent)
    found = {"PYTHONPATH": os.pathsep.join([above, os.environ.get("PYTHONPATH", "")])}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, runtime_env={"env_vars": found}, **quiet)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_make_the_store_of_one_process_though_one_is_killed(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    dump(settings(tiny_teacher_dir, data, tmp_path / "one", shard_size=1000))
    killed: list[int] = []
    hunter = threading.Thread(target=_kill_one, args=(tmp_path / "ray", killed))
    hunter.start()
    found = dump(settings(tiny_teacher_dir, data, tmp_path / "ray", shard_size=1000, ray_workers=2))
    hunter.join()
    assert killed and found["complete"] and verify(tmp_path / "ray")["ok"]
    for file in sorted((tmp_path / "one/shards").glob("*.arrow")):
        assert (tmp_path / "ray/shards" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(StoreMismatch, match="settings.dtype differs"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "ray", shard_size=1000, ray_workers=2, dtype="float16"))


def _kill_one(folder: Path, killed: list[int]) -> None:
    """A worker, once there are shards and not all."""
    began = psutil.Process().create_time()
    for _ in range(2000):
        workers = [
            one for one in psutil.process_iter(["cmdline", "create_time"])
            if "ray::work" in " ".join(one.info["cmdline"] or []) and one.info["create_time"] > began
        ]  # fmt: skip
        if workers and len(list((folder / "shards").glob("*.json"))) > 1:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)
            return
        time.sleep(0.05)


def test_what_ray_cannot_do_is_refused(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS[:4])
    with pytest.raises(ConfigError, match="--ray-workers load the teacher themselves"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", ray_workers=2), nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="--overwrite by several at once"):
        dump(settings(tiny_teacher_dir, data, tmp_path / "s", ray_workers=2, overwrite=True))
    with pytest.raises(ConfigError, match="--ray-workers is a whole number from 1"):
        settings(tiny_teacher_dir, data, tmp_path / "s", ray_workers=0)
