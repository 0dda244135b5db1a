"""The columns that imported rows have in a store, and a shard of them.

S tokens of a row, P those of which something is known, K entries of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...store import FieldSpec, ShardBuilder, content_hash, schema
from .config import LOGITS
from .rows import Kept

_PIECE = 1 << 16  # entries that are put into a shard together
_SUMMARIES = ("confidence", "entropy", "loss")
_LOWEST = -65504.0


@dataclass
class Survey:
    """What there is, all of it looked at. rows: of each split; least, most: entries of a position."""

    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 0
    entries: int = 0
    least: int = 2**31
    most: int = 0
    largest_id: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def add(self, split: str, row: Kept) -> None:
        self.rows[split] = self.rows.get(split, 0) + 1
        self.tokens += len(row.tokens)
        self.positions += len(row.positions)
        self.entries += len(row.ids)
        self.least = min(self.least, int(row.counts.min()))
        self.most = max(self.most, int(row.counts.max()))
        self.largest_id = max(self.largest_id, int(row.tokens.max()), int(row.ids.max()))
        for array in (row.tokens, row.labels, row.positions, row.counts, row.ids, row.logits, row.logsumexp):
            self._digest.update(len(array).to_bytes(8, "little"))
            self._digest.update(np.ascontiguousarray(array).data)

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    @property
    def sha256(self) -> str:
        """Of all rows, in order, as they were understood."""
        return str(self._digest.hexdigest())

    @property
    def lengths(self) -> dict[str, float]:
        """Of a row, on average; "K" of a position."""
        return {
            "S": self.tokens / self.total, "P": self.positions / self.total, "K": self.entries / max(self.positions, 1),
        }  # fmt: skip


def fields(found: Survey, values: str, vocabulary: int | None, dtype: str, pad: int) -> list[FieldSpec]:
    """P where not every token has entries, K where they differ in number.

    parameters["imported"]: what the values were; of logits the log-sum-exp is that of the kept ones alone.
    """
    symbol = "S" if found.positions == found.tokens else "P"
    ragged = found.least < found.most
    size: int | str = "K" if ragged else found.most
    said = {"imported": values, **({"vocabulary": vocabulary} if vocabulary else {})}
    said |= {"counts": schema.TOP_K_COUNTS} if ragged else {}
    bits = max(1, (vocabulary - 1 if vocabulary else found.largest_id).bit_length())
    positions = [FieldSpec(schema.POSITIONS, ("P",), "int32")] if symbol == "P" else []
    counts = [FieldSpec(schema.TOP_K_COUNTS, (symbol,), "uint16")] if ragged else []
    return [
        FieldSpec(schema.INPUT_IDS, ("S",), "int32", role="input", pad=pad),
        FieldSpec(schema.LABELS, ("S",), "int32", role="label", pad=schema.MISSING_LABEL),
        *positions,
        *counts,
        FieldSpec(schema.TOP_K_INDICES, (symbol, size), "int32", "bitpack", parameters={"bits": bits, **said}),
        FieldSpec(schema.TOP_K_LOGITS, (symbol, size), dtype, pad=_LOWEST if ragged else 0, parameters=said),
        FieldSpec(schema.LOGSUMEXP, (symbol,), "float32", parameters={"of": "kept"} if values == LOGITS else {}),
        *(FieldSpec(f"teacher_{name}", (), "float32", role="summary") for name in _SUMMARIES),
    ]


def lengths(rows: Sequence[Kept]) -> dict[str, np.ndarray]:
    return {
        "S": np.array([len(row.tokens) for row in rows], np.int64),
        "P": np.array([len(row.positions) for row in rows], np.int64),
    }


def fill(builder: ShardBuilder, rows: Sequence[Kept]) -> None:
    """Put the rows of a shard, all of them."""
    names = {spec.name for spec in builder.fields}
    for first, piece in _pieces(rows):
        at = np.arange(first, first + len(piece))
        counts = np.concatenate([row.counts for row in piece])
        kept = np.arange(counts.max()) < counts[:, None]
        ids, logits = np.zeros(kept.shape, np.int32), np.zeros(kept.shape, np.float32)
        ids[kept] = np.concatenate([row.ids for row in piece])
        logits[kept] = np.concatenate([row.logits for row in piece])
        made = {
            schema.INPUT_IDS: np.concatenate([row.tokens for row in piece]),
            schema.LABELS: np.concatenate([row.labels for row in piece]),
            schema.POSITIONS: np.concatenate([row.positions for row in piece]),
            schema.TOP_K_COUNTS: counts, schema.TOP_K_INDICES: ids, schema.TOP_K_LOGITS: logits,
            schema.LOGSUMEXP: np.concatenate([row.logsumexp for row in piece]),
            "teacher_confidence": np.array([row.confidence for row in piece], np.float32),
            "teacher_entropy": np.full(len(piece), np.nan, np.float32),  # the entries that are not there have some
            "teacher_loss": np.array([row.loss for row in piece], np.float32),
        }  # fmt: skip
        for name, values in made.items():
            if name in names:
                builder.put(name, at, values)
    hashes = [content_hash((row.tokens.astype("<i4").tobytes(),)) for row in rows]
    builder.put_addresses(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16))


def _pieces(rows: Sequence[Kept]) -> Iterator[tuple[int, list[Kept]]]:
    """(number of the first, rows), some _PIECE entries at a time."""
    piece: list[Kept] = []
    first = size = 0
    for number, row in enumerate(rows):
        piece.append(row)
        size += len(row.ids)
        if size >= _PIECE or number + 1 == len(rows):
            yield first, piece
            first, piece, size = number + 1, [], 0
