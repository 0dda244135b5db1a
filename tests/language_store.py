"""Small causal-lm stores of every kind, written through StoreWriter from a teacher's exact logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter, TeacherStore, content_hash, tokenizer_sha256

MISSING = -100
Row = tuple[Sequence[int], Sequence[int]]  # token ids, labels
DRAWS = 12


def write_store(
    path: Path,
    splits: Mapping[str, Sequence[Row]],
    teacher: Callable[[Sequence[int]], torch.Tensor],
    *,
    kind: str = "top-k",
    k: int = 5,
    dtype: str = "float32",
    temperatures: Sequence[float] = (),
    top_p: float | None = None,
    completion: bool = False,
    position_ids: Mapping[str, Sequence[Sequence[int]]] | None = None,
    tokenizer: Any = None,
    tokenizer_dir: Path | None = None,
    shard_rows: int = 16,
    **more: Any,
) -> TeacherStore:
    """teacher: token ids of a row -> logits [S, V]. kind: "top-k", "dense" or "sampled". more: of the plan."""
    vocabulary = teacher(next(iter(splits.values()))[0][0]).shape[-1]
    options: dict[str, Any] = {"kind": kind, "k": k, "dtype": dtype, "temperatures": temperatures, "top_p": top_p}
    fields = _fields(vocabulary, "P" if completion else "S", completion, position_ids is not None, **options)
    shards = [
        ShardPlan(split, number, start, min(start + shard_rows, len(rows)))
        for split, rows in splits.items()
        for number, start in enumerate(range(0, len(rows), shard_rows))
    ]
    identity = {"tokenizer": {"sha256": tokenizer_sha256(tokenizer)}} if tokenizer is not None else {}
    plan = Plan("causal-lm", {}, {**identity, **more.pop("identity", {})}, fields, shards, None)
    with StoreWriter.begin(path, plan) as writer:
        for shard in writer.missing():
            rows = splits[shard.split][shard.start : shard.stop]
            values = [_row(ids, labels, teacher, fields, **options) for ids, labels in rows]
            if position_ids is not None:
                for at, value in enumerate(values):
                    value["position_ids"] = np.asarray(position_ids[shard.split][shard.start + at])
            _write(writer, shard, values, fields)
        writer.finish(folders={"tokenizer": tokenizer_dir} if tokenizer_dir else None)
    return TeacherStore.open(path)


def _fields(
    vocabulary: int, each: str, completion: bool, packed: bool, *, kind: str, k: int, dtype: str,
    temperatures: Sequence[float], top_p: float | None,
) -> list[FieldSpec]:  # fmt: skip
    bits = {"bits": math.ceil(math.log2(vocabulary)), "vocabulary": vocabulary}
    fields = [
        FieldSpec("input_ids", ("S",), "int32", role="input"),
        FieldSpec("labels", ("S",), "int32", role="label", pad=MISSING),
    ]
    fields += [FieldSpec("position_ids", ("S",), "int32", role="input")] if packed else []
    fields += [FieldSpec("teacher_positions", ("P",), "int32")] if completion else []
    if kind == "dense":
        fields += [FieldSpec("teacher_logits", (each, vocabulary), dtype)]
    elif kind == "top-k":
        last: int | str = "K" if top_p else k
        counted = {"counts": "teacher_top_k_counts"} if top_p else {}
        fields += [FieldSpec("teacher_top_k_counts", (each,), "uint16")] if top_p else []
        fields += [
            FieldSpec("teacher_top_k_indices", (each, last), "int32", codec="bitpack", parameters={**bits, **counted}),
            FieldSpec("teacher_top_k_logits", (each, last), dtype, pad=-65504 if top_p else 0, parameters=counted),
            FieldSpec("teacher_logsumexp", (each,), "float32"),
            *(FieldSpec(f"teacher_logsumexp_at_{one:g}", (each,), "float32") for one in temperatures),
        ]
    else:
        sized = {"counts": "teacher_sample_sizes"}
        fields += [
            FieldSpec("teacher_sample_sizes", (each,), "uint16"),
            FieldSpec("teacher_sample_indices", (each, "K"), "int32", codec="bitpack", parameters={**bits, **sized}),
            FieldSpec("teacher_sample_counts", (each, "K"), "uint8", parameters={**sized, "draws": DRAWS}),
            FieldSpec("teacher_logsumexp", (each,), "float32"),
        ]
    return [*fields, FieldSpec("teacher_loss", (), "float32", role="summary")]


def _row(
    ids: Sequence[int], labels: Sequence[int], teacher: Callable[[Sequence[int]], torch.Tensor],
    fields: Sequence[FieldSpec], *, kind: str, k: int, dtype: str, temperatures: Sequence[float], top_p: float | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    z = teacher(ids).double()
    relative = z - z.amax(-1, keepdim=True)
    following = torch.tensor([*labels[1:], MISSING])
    kept = torch.arange(len(ids))
    if any(spec.name == "teacher_positions" for spec in fields):
        kept = (following != MISSING).nonzero()[:, 0]
    values: dict[str, Any] = {"teacher_positions": kept, "teacher_logits": z[kept]}
    logprobs = relative.log_softmax(-1)
    known = following != MISSING
    values["teacher_loss"] = -logprobs[known].gather(-1, following[known, None]).mean()
    relative = relative[kept]
    values["teacher_logsumexp"] = relative.logsumexp(-1)
    for one in temperatures:
        values[f"teacher_logsumexp_at_{one:g}"] = (relative / one).logsumexp(-1)
    if kind == "sampled":
        values |= _samples(relative.softmax(-1), len(ids))
    else:
        top, indices = relative.topk(min(k, z.shape[-1]))
        values |= {"teacher_top_k_logits": top, "teacher_top_k_indices": indices}
    if top_p:
        mass = (top - values["teacher_logsumexp"][:, None]).exp().cumsum(-1)
        values["teacher_top_k_counts"] = ((mass < top_p).sum(-1) + 1).clamp(max=k)
    values |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return {name: np.asarray(value) for name, value in values.items()}


def _samples(p: torch.Tensor, seed: int) -> dict[str, Any]:
    """Draws at (i + u) / DRAWS of the cumulated distribution."""
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    thresholds = (torch.arange(DRAWS) + u) / DRAWS
    ids = torch.searchsorted(p.cumsum(-1), thresholds).clamp(max=p.shape[-1] - 1)
    found = [torch.unique(row, return_counts=True) for row in ids]
    most = max((len(one) for one, _ in found), default=0)
    indices, counts = torch.zeros(len(p), most, dtype=torch.int64), torch.zeros(len(p), most, dtype=torch.int64)
    for at, (one, many) in enumerate(found):
        indices[at, : len(one)], counts[at, : len(one)] = one, many
    sizes = torch.tensor([len(one) for one, _ in found], dtype=torch.int64)
    return {"teacher_sample_indices": indices, "teacher_sample_counts": counts, "teacher_sample_sizes": sizes}


def _write(writer: Any, shard: ShardPlan, values: list[dict[str, np.ndarray]], fields: Sequence[FieldSpec]) -> None:
    lengths = np.array([len(row["input_ids"]) for row in values])
    stored = np.array([len(row["teacher_positions"]) for row in values])
    builder = writer.open_shard(shard, len(values), {"S": lengths, "P": stored})
    for spec in fields:
        for at, row in enumerate(values):
            builder.put(spec.name, np.array([at]), row[spec.name][None])
    hashes = [np.frombuffer(content_hash([str(row["input_ids"].tolist())]), np.uint8) for row in values]
    builder.put_addresses(np.stack(hashes))
    writer.commit(builder)


def random_rows(count: int, seed: int = 0, vocabulary: int = 40, longest: int = 12, prompt: bool = False) -> list[Row]:
    """Token ids 1 … vocabulary-1 in rows of 3 … longest tokens; prompt: the first third has no labels."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        ids = generator.integers(1, vocabulary, generator.integers(3, longest + 1)).tolist()
        first = len(ids) // 3 if prompt else 0
        rows.append((ids, [MISSING] * first + ids[first:]))
    return rows
