"""Stores to be shared, and the program as another user's machine would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from classification_store import random_rows, write_store

CLASSES = 2000  # makes a shard of 16 rows 128 kB of logits
SPLITS = {"train": 64, "validation": 16}


def wide_store(folder: Path, seed: int = 0, dtype: str = "float32", **more: Any) -> Path:
    """Five shards of 16 rows; nearly all of their bytes are logits."""
    rng = np.random.default_rng(seed)
    splits = {name: random_rows(count, seed=seed + at) for at, (name, count) in enumerate(SPLITS.items())}
    logits = {name: rng.normal(size=(count, CLASSES)).astype(np.float32) for name, count in SPLITS.items()}
    labels = {name: np.arange(count) % 7 for name, count in SPLITS.items()}
    write_store(folder, splits, logits, labels, dtype=dtype, **more)
    return folder


Done = subprocess.CompletedProcess[str]


def predistill(*words: object, cache: Path | None = None, check: bool = True, **env: str) -> Done:
    """The program in a process of its own, with a cache of its own."""
    settings = {**os.environ, **({"PREDISTILL_CACHE": str(cache)} if cache else {}), **env}
    command = [sys.executable, "-m", "predistill", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, stdin=subprocess.DEVNULL, timeout=200)
    assert not check or done.returncode == 0, done.stderr
    return done


def as_json(done: Done) -> Any:
    return json.loads(done.stdout)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store but locks and index.duckdb, whose bytes are DuckDB's own affair."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "index.duckdb")
    }


def without_card(folder: Path) -> dict[str, bytes]:
    """The same but README.md, which tells where it is read from."""
    return {name: data for name, data in files_of(folder).items() if name != "README.md"}


def forge(folder: Path, change: Any) -> None:
    """Change the manifest of a store as somebody would who knows how it is sealed."""
    from predistill.store import manifest

    made = json.loads((folder / "store.json").read_text())
    change(made)
    (folder / "store.json").write_text(json.dumps(manifest.sealed(made)))
