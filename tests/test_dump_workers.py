"""Two ranks under torchrun, and what is asked of one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dump_cases import settings, write
from predistill.store import ConfigError
from predistill.store.verify import verify
from predistill.teacher_dump.dump import dump
from predistill.teacher_dump.teachers.teacher import resolve_device


def rows(count: int) -> list[dict[str, object]]:
    return [{"text": f"row {at} " + "word " * (at % 17), "label": at % 2} for at in range(count)]


@pytest.mark.slow
def test_two_ranks_make_the_store_of_one_process(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows(200))
    dump(settings(tiny_teacher_dir, data, tmp_path / "one", shard_size=2000, tokens_per_batch=128))
    flags = [
        "--teacher", str(tiny_teacher_dir), "--dataset", str(data), "--task", "text-classification",
        "--output-dir", str(tmp_path / "two"), "--shard-size", "2000", "--tokens-per-batch", "128", "--device", "cpu",
        "--dtype", "float32",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "predistill", "dump", *flags,
         "--json"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parent.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["complete"] and verify(tmp_path / "two")["ok"]
    for file in sorted((tmp_path / "one/shards").iterdir()):
        assert (tmp_path / "two/shards" / file.name).read_bytes() == file.read_bytes(), file.name


def test_overwriting_is_for_one_process(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = settings(tiny_teacher_dir, write(tmp_path / "rows.jsonl", rows(4)), tmp_path / "s", overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite by several at once"):
        dump(given)


def test_each_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda:3")


def test_whoever_joins_takes_batches_and_shards_as_they_were_planned(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that would like other batches, and other shards, goes on with the first one's."""
    from predistill.teacher_dump import planning

    data = write(tmp_path / "rows.jsonl", rows(60))
    given = settings(tiny_teacher_dir, data, tmp_path / "s", shard_size=2000, tokens_per_batch=None)
    dump(given)
    before = (tmp_path / "s/plan.json").read_bytes()
    (tmp_path / "s/shards/train-00001.json").unlink()
    monkeypatch.setattr(planning, "TOKENS_PER_BATCH", {"cpu": 512})
    monkeypatch.setattr(planning, "SHARD_WORK", {"cpu": 1.0})
    assert dump(given)["complete"] and (tmp_path / "s/plan.json").read_bytes() == before
