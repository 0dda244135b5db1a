"""Several processes on one store: who makes what, what a dead or a slow one leaves, and who finishes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predistill.store import FieldSpec, Plan, ShardPlan, StoreError, StoreMismatch, StoreWriter
from predistill.store import lease as leases
from predistill.store.shared import SharedWriter
from predistill.store.verify import verify

CONTEXT = multiprocessing.get_context("fork")
SHARDS, ROWS = 12, 20
BRIEF = 1.0  # seconds of a heartbeat lease


def plan(dtype: str = "float32") -> Plan:
    shards = [ShardPlan("train", at, at * ROWS, (at + 1) * ROWS) for at in range(SHARDS)]
    return Plan("text-classification", {"dtype": dtype}, {}, [FieldSpec("teacher_logits", (3,), dtype)], shards)


def fill(writer: StoreWriter, shard: ShardPlan) -> Any:
    builder = writer.open_shard(shard, ROWS, {})
    builder.put("teacher_logits", np.arange(ROWS), np.random.default_rng(shard.number).normal(size=(ROWS, 3)))
    builder.put_addresses(np.zeros((ROWS, 16), np.uint8))
    return builder


def work(path: Path, kind: str = "auto", pause: float = 0.0, slow: int | None = None, log: Path | None = None) -> None:
    """One worker; slow: the shard that it sleeps over."""
    with SharedWriter.begin(path, plan(), kind=kind, timeout=BRIEF) as writer:
        for shard in writer.claim():
            time.sleep(3 if shard.number == slow else pause)
            made = writer.commit(fill(writer, shard))
            if log and made:
                with open(log, "a") as lines:
                    lines.write(f"{os.getpid()} {shard.name}\n")
        writer.finish()


def start(*given: Any, **more: Any) -> Any:
    process = CONTEXT.Process(target=work, args=given, kwargs=more)
    process.start()
    return process


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "shards").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, that wants the folder alone."""
    path = tmp_path_factory.mktemp("whole") / "s"
    with StoreWriter.begin(path, plan()) as writer:
        for shard in writer.missing():
            writer.commit(fill(writer, shard))
        writer.finish()
    return path


@pytest.mark.parametrize("kind", ["lock", "heartbeat"])
def test_workers_share_the_shards_and_one_finishes(kind: str, tmp_path: Path, whole: Path) -> None:
    log = tmp_path / "log"
    workers = [start(tmp_path / "s", kind, pause=0.05, log=log) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert shards(tmp_path / "s") == shards(whole)
    assert (tmp_path / "s/store.json").read_bytes() == (whole / "store.json").read_bytes()
    makers, made = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert len(set(makers)) > 1 and max(Counter(made).values()) == 1 and len(set(made)) == SHARDS


@pytest.mark.parametrize("kind", ["lock", "heartbeat"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_killed_worker_held_is_made_by_another(kind: str, seed: int, tmp_path: Path, whole: Path) -> None:
    workers = [start(tmp_path / "s", kind, pause=0.1) for _ in range(2)]
    time.sleep(random.Random(seed).uniform(0.05, 0.5))
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[1].join(60)
    assert (workers[1].exitcode, verify(tmp_path / "s")["ok"]) == (0, True)
    assert shards(tmp_path / "s") == shards(whole)
    workers[0].join()


def test_a_slow_worker_does_not_hold_the_others(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = start(tmp_path / "s", "lock", slow=0, log=log)
    while not (tmp_path / "s/shards/train-00000.lease").exists():
        time.sleep(0.01)
    began = time.monotonic()
    with SharedWriter.begin(tmp_path / "s", plan()) as writer:
        told: list[int] = []
        for shard in writer.claim(told.append):
            writer.commit(fill(writer, shard))
            spent = time.monotonic() - began
        assert told == [1] and spent < 2.5
        writer.finish()
    slow.join()
    assert slow.exitcode == 0 and log.read_text().split() == [str(slow.pid), "train-00000"]


def test_a_worker_that_lost_its_lease_throws_its_work_away(tmp_path: Path, whole: Path) -> None:
    with SharedWriter.begin(tmp_path / "s", plan(), kind="heartbeat", timeout=60) as late:
        shard = next(late.claim())
        held = late._leases[shard.name]
        os.utime(tmp_path / "s/shards/train-00000.lease", (0, 0))  # as if it had not beaten since 1970
        with SharedWriter.begin(tmp_path / "s", plan(), kind="heartbeat", timeout=60) as other:
            again = next(other.claim())
            assert again == shard and not held.held()
            assert late.commit(fill(late, shard)) is None
            assert not (tmp_path / "s/shards/train-00000.json").exists()
            assert other.commit(fill(other, again))
    assert (tmp_path / "s/shards/train-00000.arrow").read_bytes() == shards(whole)["train-00000.arrow"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["lock", "heartbeat"])
def test_one_lease_at_a_time(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    held = leases.take(path, kind)
    assert held is not None and held.held() and leases.take(path, kind) is None
    held.release()
    held.release()
    assert not path.exists() and not held.held()
    again = leases.take(path, kind)
    assert again is not None
    again.release()


def test_a_heart_that_beats_keeps_its_lease(tmp_path: Path) -> None:
    held = leases.take(tmp_path / "a.lease", "heartbeat", 1.0)
    assert held is not None
    for _ in range(8):
        time.sleep(0.2)
        assert leases.take(tmp_path / "a.lease", "heartbeat", 1.0) is None
    held.release()


@pytest.mark.parametrize(
    ("system", "kind"), [("ext4", "lock"), ("nfs4", "heartbeat"), ("fuse.gcsfuse", "heartbeat"), ("tmpfs", "lock")]
)
def test_the_file_system_decides(system: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"root / ext4 rw 0 0\nserver:/x {tmp_path}/on\\040it {system} rw 0 0\n")
    monkeypatch.setattr(leases, "_MOUNTS", mounts)
    assert leases.kind_for(tmp_path / "on it" / "store") == kind
    assert leases.kind_for(tmp_path) == "lock"


def test_those_who_must_be_alone_wait_for_workers_and_workers_for_them(tmp_path: Path) -> None:
    with SharedWriter.begin(tmp_path / "s", plan()) as writer:
        writer.commit(fill(writer, next(writer.claim())))
        for alone in (StoreWriter.begin, SharedWriter.begin):
            with pytest.raises(StoreError, match="is being written by another dump"):
                alone(tmp_path / "s", plan("float16"), overwrite=True)
        with pytest.raises(StoreMismatch, match="settings.dtype differs"):
            SharedWriter.begin(tmp_path / "s", plan("float16"))
    SharedWriter.begin(tmp_path / "s", plan("float16"), overwrite=True).close()


def test_a_plan_of_which_nothing_is_committed_holds_nobody_to_it(tmp_path: Path) -> None:
    SharedWriter.begin(tmp_path / "s", plan()).close()
    with SharedWriter.begin(tmp_path / "s", plan("float16")) as writer:
        assert writer.plan.settings == {"dtype": "float16"}
        with pytest.raises(StoreMismatch, match="settings.dtype differs"):
            SharedWriter.begin(tmp_path / "s", plan())  # somebody is at work on it


def test_a_writer_that_is_left_gives_back_what_it_claimed(tmp_path: Path) -> None:
    with SharedWriter.begin(tmp_path / "s", plan()) as writer:
        claimed = writer.claim()
        assert next(claimed).number == 0
    assert list(claimed) == [] and not list((tmp_path / "s/shards").iterdir())
