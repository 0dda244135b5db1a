"""Stores of random values in the shapes that teachers leave, with the same rows beside them as one plain file.

    narrow   float32[4] a row: 16 bytes, a sentence's logits
    map      float16[384, 16, 16] a row: 196,608 bytes, a feature map
    tokens   4 layers of float16[S, 384]; S from 29 to 128, 78.5 in the mean: 241 KB a row, input_ids beside them

The plain file is what `limit` reads: rows one after another, nothing else. A row of `tokens` holds its
layers one after another, so that the limit makes one copy a row whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from predistill.store import FieldSpec, Plan, ShardPlan, StoreWriter

LAYERS = tuple(f"teacher_hidden_states_{layer:02d}" for layer in (0, 2, 4, 6))
WIDTH = 384

SPECS: dict[str, list[FieldSpec]] = {
    "narrow": [FieldSpec("teacher_logits", (4,), "float32")],
    "map": [FieldSpec("teacher_feature_map", (384, 16, 16), "float16")],
    "tokens": [FieldSpec("input_ids", ("S",), "int32", role="input"),
               *(FieldSpec(name, ("S", WIDTH), "float16") for name in LAYERS)],
}  # fmt: skip
ROW_BYTES = {"narrow": 16, "map": 196_608, "tokens": 241_152}  # in the mean


@dataclass(frozen=True)
class Synthetic:
    """A kind of store of so many rows in so many shards; equal arguments give equal values."""

    kind: str
    rows: int
    shards: int = 1
    fields: tuple[str, ...] = field(default=())  # teacher fields of the plain file; () for all

    @property
    def specs(self) -> list[FieldSpec]:
        return SPECS[self.kind]

    @property
    def teacher_fields(self) -> list[str]:
        return [spec.name for spec in self.specs if spec.role == "teacher"]

    def plans(self) -> list[ShardPlan]:
        edges = [self.rows * number // self.shards for number in range(self.shards + 1)]
        return [ShardPlan("train", n, a, b) for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]

    def lengths(self, shard: ShardPlan) -> dict[str, np.ndarray]:
        """Tokens a row, int64; none for kinds without tokens."""
        if self.kind != "tokens":
            return {}
        return {"S": np.random.default_rng(shard.number + 1).integers(29, 129, shard.stop - shard.start)}

    def values(self, shard: ShardPlan) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Rows of the shard, 256 at a time (65,536 narrow ones), with their fields' values; token-level ones flat."""
        random = np.random.default_rng(shard.number)
        step = 65_536 if self.kind == "narrow" else 256
        lengths = self.lengths(shard)
        for start in range(0, shard.stop - shard.start, step):
            rows = slice(start, min(start + step, shard.stop - shard.start))
            count = rows.stop - rows.start if not lengths else int(lengths["S"][rows].sum())
            yield rows, {spec.name: _random(random, spec, count) for spec in self.specs}

    def write_store(self, path: Path) -> Path:
        """The store, unless it is there already."""
        if (path / "store.json").exists():
            return path
        plan = Plan(
            "benchmark", {"rows": self.rows, "shards": self.shards}, {"kind": self.kind}, self.specs, self.plans()
        )
        with StoreWriter.begin(path, plan) as writer:
            for shard in writer.missing():
                count = shard.stop - shard.start
                builder = writer.open_shard(shard, rows=count, lengths=self.lengths(shard))
                for rows, values in self.values(shard):
                    for name, value in values.items():
                        builder.put(name, np.arange(rows.start, rows.stop), value)
                builder.put_addresses(np.zeros((count, 16), np.uint8))
                writer.commit(builder)
            writer.finish()
        return path

    def write_plain(self, path: Path) -> np.ndarray:
        """The plain file of the chosen teacher fields, unless it is there; returns where rows start in it, in bytes."""
        sizes = np.concatenate([self._row_bytes(shard) for shard in self.plans()])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        if path.exists() and path.stat().st_size == starts[-1]:
            return starts
        chosen = self.fields or tuple(self.teacher_fields)
        with open(path, "wb") as file:
            for shard in self.plans():
                lengths = self.lengths(shard)
                for rows, values in self.values(shard):
                    if not lengths:
                        file.write(values[chosen[0]].tobytes())
                        continue
                    cuts = np.cumsum(lengths["S"][rows])[:-1]
                    layers = [np.split(values[name], cuts) for name in chosen]
                    for row in zip(*layers, strict=True):
                        file.write(b"".join(layer.tobytes() for layer in row))
        return starts

    def _row_bytes(self, shard: ShardPlan) -> np.ndarray:
        if self.kind == "tokens":
            return self.lengths(shard)["S"] * (WIDTH * 2 * len(self.fields or self.teacher_fields))
        return np.full(shard.stop - shard.start, ROW_BYTES[self.kind])


def _random(random: np.random.Generator, spec: FieldSpec, count: int) -> np.ndarray:
    """Finite values of the field's dtype: [count, *entry]."""
    if spec.role == "input":
        return random.integers(1, 30_000, count, dtype=np.int32)
    entry = tuple(size for size in spec.shape if isinstance(size, int))
    bits = random.integers(0, 0x3C00, (count, *entry), dtype=np.uint16)  # float16 from 0 to 1
    return bits.view(np.float16).astype(spec.dtype, copy=False)
