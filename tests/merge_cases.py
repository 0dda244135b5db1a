"""Small stores whose rows depend on nothing but the number of a text, and on the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, content_hash

INPUTS = [FieldSpec("input_ids", ("S",), "int32", role="input"), FieldSpec("labels", (), "float32", role="label")]
LOGITS = FieldSpec("teacher_logits", (3,), "float16")
HIDDEN = FieldSpec("teacher_hidden_states_01", ("S", 4), "float32", codec="int8")
ATTENTION = FieldSpec("teacher_attentions_00", (2, "S", "S"), "float16")
TEXT = FieldSpec("text", (), "any", codec="arrow", role="carried")


def write(
    path: Path, rows: Mapping[str, Sequence[int]], *, fields: Sequence[FieldSpec] = (LOGITS, TEXT), shard_rows: int = 7,
    teacher: str = "a", dataset: str = "", source: Any = None, **more: Any,
) -> Path:  # fmt: skip
    """rows: of each split the numbers of texts; text n and what a teacher says of it depend on n (and the teacher)."""
    specs = [*INPUTS, *fields]
    shards = [
        ShardPlan(split, at, start, min(start + shard_rows, len(texts)))
        for split, texts in rows.items()
        for at, start in enumerate(range(0, len(texts), shard_rows))
    ]
    identity = {
        "teacher": {"name": str(path), "weights_sha256": teacher * 64, "attention": "sdpa"},
        "dataset": {
            "name": "data",
            "rows": 1,
            "rows_sha256": dataset or json.dumps({k: [*v] for k, v in rows.items()}),
        },
        "versions": {"torch": "2"},
        **more.pop("identity", {}),
    }
    settings = {"max_length": 9, "splits": list(rows), "shard_size": shard_rows, **more.pop("settings", {})}
    plan = Plan("text-classification", settings, identity, specs, shards, more.pop("label_names", ["x", "y", "z"]))
    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            texts = rows[shard.split][shard.start : shard.stop]
            values = [row(n, teacher) for n in texts]
            lengths = np.asarray([len(value["input_ids"]) for value in values])
            builder = writer.open_shard(shard, len(texts), {"S": lengths})
            for spec in specs:
                if spec.codec == "arrow":
                    builder.put_column(spec.name, pa.array([value["text"] for value in values]))
                    continue
                for at, value in enumerate(values):
                    builder.put(spec.name, np.asarray([at]), np.asarray(value[spec.name])[None])
            hashes = np.stack([np.frombuffer(content_hash([f"text {n}"]), np.uint8) for n in texts])
            numbers = None if source is None else np.asarray(source[shard.split])[shard.start : shard.stop]
            builder.put_addresses(hashes, numbers)
            writer.commit(builder)
        writer.finish()
    return path


def row(n: int, teacher: str = "a") -> dict[str, Any]:
    rng = np.random.default_rng(n)
    size = 1 + n % 6
    said = np.random.default_rng([n, ord(teacher)])
    return {
        "input_ids": rng.integers(1, 99, size), "labels": np.float32(np.nan if n % 3 == 0 else n % 2),
        "text": None if n % 5 == 0 else f"text {n}", "teacher_logits": said.normal(size=3),
        "teacher_hidden_states_01": said.normal(size=(size, 4)), "teacher_attentions_00": said.random((2, size, size)),
    }  # fmt: skip


def content(path: Path, without: Sequence[str] = ()) -> dict[str, list[str]]:
    """split -> its rows, in order, as text, by pyarrow alone."""
    made: dict[str, list[str]] = {}
    for shard in json.loads((path / "store.json").read_text())["plan"]["shards"]:
        name = f"{shard['split']}-{shard['number']:05d}.arrow"
        found = pa.ipc.open_file(pa.memory_map(str(path / "shards" / name))).get_batch(0)
        for one in found.to_pylist():
            made.setdefault(shard["split"], []).append(repr({k: v for k, v in one.items() if k not in without}))
    return made
