"""Small text-classification stores, written through StoreWriter, for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from predistill.store import (
    FieldSpec,
    Plan,
    ShardPlan,
    StoreWriter,
    TeacherStore,
    content_hash,
    tokenizer_sha256,
)

MISSING = -100


def write_store(
    path: Path,
    splits: Mapping[str, Sequence[Sequence[int]]],
    logits: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray] | None,
    *,
    tokenizer: Any = None,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
    texts: Mapping[str, Sequence[str]] | None = None,
    label_names: list[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    shard_rows: int = 16,
) -> TeacherStore:
    """splits: token ids of each row; logits [N, C]; labels [N] or [N, C], None for a store without the column."""
    classes = next(iter(logits.values())).shape[1]
    fields = [FieldSpec("input_ids", ("S",), "int32", role="input", pad=0)]
    if labels is not None:
        sample = next(iter(labels.values()))
        kind = "int64" if sample.dtype.kind == "i" else "float32"
        fields.append(FieldSpec("labels", sample.shape[1:], kind, role="label"))
    fields.append(FieldSpec("teacher_logits", (classes,), dtype))
    fields.append(FieldSpec("teacher_confidence", (), "float32", role="summary"))
    if texts is not None:
        fields.append(FieldSpec("text", (), "string", codec="arrow", role="carried"))
    shards = [
        ShardPlan(split, number, start, min(start + shard_rows, len(rows)))
        for split, rows in splits.items()
        for number, start in enumerate(range(0, len(rows), shard_rows))
    ]
    known = {"tokenizer": {"sha256": tokenizer_sha256(tokenizer)}} if tokenizer is not None else {}
    plan = Plan(
        "text-classification",
        dict(settings or {}),
        {**known, **(identity or {})},
        fields,
        shards,
        label_names,
    )
    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            _write_shard(writer, shard, splits, logits, labels, texts)
        writer.finish(folders={"tokenizer": tokenizer_dir} if tokenizer_dir else None)
    return TeacherStore.open(path)


def _write_shard(writer: Any, shard: ShardPlan, splits: Any, logits: Any, labels: Any, texts: Any) -> None:
    mine = slice(shard.start, shard.stop)
    ids = [np.asarray(row, np.int32) for row in splits[shard.split][mine]]
    every = np.arange(len(ids))
    builder = writer.open_shard(shard, len(ids), {"S": np.array([len(row) for row in ids], np.int64)})
    builder.put("input_ids", every, np.concatenate(ids))
    if labels is not None:
        builder.put("labels", every, labels[shard.split][mine])
    z = logits[shard.split][mine].astype(np.float32)
    builder.put("teacher_logits", every, z)
    probabilities = np.exp(z - z.max(1, keepdims=True))
    builder.put("teacher_confidence", every, (probabilities / probabilities.sum(1, keepdims=True)).max(1))
    if texts is not None:
        builder.put_column("text", pa.array(list(texts[shard.split][mine]), pa.string()))
    hashes = np.stack([np.frombuffer(content_hash([str(row.tolist())]), np.uint8) for row in ids])
    builder.put_addresses(hashes)
    writer.commit(builder)


def random_rows(count: int, seed: int = 0, vocabulary: int = 60, longest: int = 12) -> list[list[int]]:
    """Token ids 1 … vocabulary-1 in rows of 2 … longest tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(1, vocabulary, generator.integers(2, longest + 1)).tolist() for _ in range(count)]
