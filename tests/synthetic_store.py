"""A store that holds every kind of field, beside the plain values it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter

FIELDS = [
    FieldSpec("input_ids", ("S",), "int32", role="input", pad=0),
    FieldSpec("token_type_ids", ("S",), "int8", role="input"),
    FieldSpec("labels", (), "int64", role="label"),
    FieldSpec("teacher_logits", (3,), "float16"),
    FieldSpec("teacher_hidden_states_00", ("S", 8), "float32"),
    FieldSpec("teacher_hidden_states_02", ("S", 8), "bfloat16"),
    FieldSpec("teacher_hidden_states_06", ("S", 200), "float32", codec="int8"),
    FieldSpec("teacher_attentions_01", (2, "S", "S"), "float16"),
    FieldSpec("teacher_attentions_02", (2, "S", "S"), "float32", codec="int8"),
    FieldSpec("teacher_top_k_logits", ("S", 5), "float16"),
    FieldSpec("teacher_top_k_indices", ("S", 5), "int32", codec="bitpack", parameters={"bits": 17}),
    FieldSpec("teacher_logsumexp", ("S",), "float32"),
    FieldSpec("teacher_kept_counts", ("S",), "uint8"),
    FieldSpec("teacher_kept_logits", ("S", "K"), "float16", pad=-65504, parameters={"counts": "teacher_kept_counts"}),
    FieldSpec(
        "teacher_kept_indices",
        ("S", "K"),
        "int32",
        codec="bitpack",
        parameters={"bits": 13, "counts": "teacher_kept_counts"},
    ),
    FieldSpec("teacher_below", ("S", 6), "float32", codec="uint8"),
    FieldSpec("teacher_feature_map", (2, 3, 4), "float32"),
    FieldSpec("teacher_positions", ("P",), "int32", pad=-1),
    FieldSpec("teacher_completion_logits", ("P", 3), "float32"),
    FieldSpec("teacher_sizes", ("P",), "uint16"),
    FieldSpec("teacher_samples", ("P", "K"), "float32", codec="uint8", pad=-9, parameters={"counts": "teacher_sizes"}),
    FieldSpec("teacher_prediction", (), "int64", role="summary"),
    FieldSpec("teacher_loss", (), "float32", role="summary"),
    FieldSpec("image", (), "binary", codec="bytes", role="input"),
    FieldSpec("meta", (), "any", codec="arrow", role="carried"),
]
SHARDS = [
    ShardPlan("train", 0, 0, 30),
    ShardPlan("train", 1, 30, 50),
    ShardPlan("train", 2, 0, 20, view=1),  # another view of the first twenty rows
    ShardPlan("validation", 0, 0, 10),
]
EXACT = {
    "teacher_hidden_states_02": 2**-8,
    "teacher_hidden_states_06": 1 / 254,
    "teacher_attentions_01": 2**-11,
    "teacher_attentions_02": 1 / 254,
    "teacher_logits": 2**-11,
    "teacher_top_k_logits": 2**-11,
    "teacher_kept_logits": 2**-11,
    "teacher_below": 1 / 510,
    "teacher_samples": 1 / 510,
}  # of the row's peak


def plan(**settings: Any) -> Plan:
    identity = {"teacher": {"name": "a/path", "weights_sha256": "0" * 64}, "tokenizer": {"sha256": "1" * 64}}
    return Plan("text-classification", {"dtype": "float16", **settings}, identity, FIELDS, SHARDS, ["a", "b", "c"])


def truth(shard: ShardPlan) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(lengths, stored positions of each row, one dict of values a row), from the shard's own seed."""
    rng = np.random.default_rng([shard.number, shard.view, len(shard.split)])
    count = shard.stop - shard.start
    lengths = rng.integers(0, 7, count)
    lengths[0] = 7  # the others are shorter, and some are empty
    rows, stored = [], np.zeros(count, np.int64)
    for at, size in enumerate(lengths.tolist()):
        positions = np.flatnonzero(rng.random(size) < 0.5)
        stored[at] = len(positions)
        kept, drawn = rng.integers(0, 6, size), rng.integers(1, 4, len(positions))
        rows.append(
            {
                "input_ids": rng.integers(1, 1000, size),
                "token_type_ids": rng.integers(0, 2, size),
                "labels": np.int64(-100 if at % 5 == 4 else at % 3),
                "teacher_logits": rng.normal(size=3),
                "teacher_hidden_states_00": rng.normal(size=(size, 8)),
                "teacher_hidden_states_02": rng.normal(size=(size, 8)),
                "teacher_hidden_states_06": rng.normal(size=(size, 200)) * 50,
                "teacher_attentions_01": rng.random((2, size, size)),
                "teacher_attentions_02": rng.random((2, size, size)),
                "teacher_top_k_logits": rng.normal(size=(size, 5)),
                "teacher_top_k_indices": rng.integers(0, 2**17, (size, 5)),
                "teacher_logsumexp": rng.normal(size=size),
                "teacher_kept_counts": kept,
                "teacher_kept_logits": ragged(rng.normal(size=(size, 5)), kept, -65504),
                "teacher_kept_indices": ragged(rng.integers(0, 2**13, (size, 5)), kept, 0),
                "teacher_below": -rng.random((size, 6)) * 20,
                "teacher_feature_map": rng.normal(size=(2, 3, 4)),
                "teacher_positions": positions,
                "teacher_completion_logits": rng.normal(size=(len(positions), 3)),
                "teacher_sizes": drawn,
                "teacher_samples": ragged(-rng.random((len(positions), 3)), drawn, -9),
                "teacher_prediction": np.int64(at % 3),
                "teacher_loss": np.float32(np.nan if at % 5 == 4 else at / 10),
                "image": bytes(rng.integers(0, 256, at % 9, np.uint8)),
                "meta": {"id": f"row {at}", "spans": [[at, None], []][: at % 3]},
            }
        )
    return lengths, stored, rows


def ragged(values: np.ndarray, counts: np.ndarray, pad: float) -> np.ndarray:
    """[S, most of these positions], `pad` past each position's own entries."""
    values = np.where(np.arange(values.shape[1]) < counts[:, None], values, pad)
    return values[:, : counts.max(initial=0)]


def all_rows() -> list[dict[str, Any]]:
    return [row for shard in SHARDS for row in truth(shard)[2]]


def pad(values: list[np.ndarray]) -> np.ndarray:
    """Right-padded with garbage, to show that no padding is ever stored."""
    shape = np.max([value.shape for value in values], axis=0) if np.ndim(values[0]) else ()
    out = np.full((len(values), *np.asarray(shape, int)), 77, np.asarray(values[0]).dtype)
    for at, value in enumerate(values):
        out[(at, *(slice(size) for size in np.shape(value)))] = value
    return out


def fill(writer: StoreWriter, shard: ShardPlan) -> Any:
    """A builder of the shard, its rows put in three pieces in random order."""
    lengths, stored, rows = truth(shard)
    builder = writer.open_shard(shard, len(rows), {"S": lengths, "P": stored})
    order = np.random.default_rng(1).permutation(len(rows))
    for piece in np.array_split(order, 3):
        for spec in FIELDS:
            if spec.codec not in ("bytes", "arrow"):
                builder.put(spec.name, piece, pad([np.asarray(rows[at][spec.name]) for at in piece]))
    builder.put_column("image", pa.array([row["image"] for row in rows]))
    builder.put_column("meta", pa.array([row["meta"] for row in rows]))
    builder.put_addresses(np.random.default_rng(shard.number).integers(0, 256, (len(rows), 16)).astype(np.uint8))
    return builder


def write(path: Path, **settings: Any) -> Path:
    with StoreWriter.begin(path, plan(**settings)) as writer:
        for shard in writer.missing():
            writer.commit(fill(writer, shard))
        writer.finish()
    return path
