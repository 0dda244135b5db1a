"""Rows of a store, or of a Dataset that carries teacher columns, into one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..store.schema import ATTENTION_MASK, INPUT_IDS, LABELS, MISSING_LABEL, NO_WORD, WORD_IDS


class DataCollatorForDistillation:
    """Turns what a batch is made of into tensors; integers become int64, as embeddings and losses want them.

    A mapping is a batch already (arrays [B, ...], as `rows[[...]]` and `rows.batches` give it) and is wrapped
    without a copy. A list of rows is right-padded to the longest: `input_ids` with pad_token_id, token-level
    `labels` with -100, `word_ids` with -1, everything else with 0; `attention_mask` is made where it is missing.
    Values that are no numbers are left out.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = features if isinstance(features, Mapping) else self._pad(features)
        found = ((name, as_tensor(value, keep="." in name)) for name, value in batch.items())  # a part as it is stored
        return {name: tensor for name, tensor in found if tensor is not None}

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        batch = {}
        for name in rows[0]:
            values = [np.asarray(_number(row[name], name)) for row in rows]
            if all(value.dtype.kind in "biuf" for value in values):
                batch[name] = pad_rows(values, self._pad_value(name))
        if INPUT_IDS in batch and ATTENTION_MASK not in batch:
            lengths = np.asarray([len(row[INPUT_IDS]) for row in rows])
            batch[ATTENTION_MASK] = (np.arange(batch[INPUT_IDS].shape[1]) < lengths[:, None]).astype(np.int64)
        return batch

    def _pad_value(self, name: str) -> int:
        return {INPUT_IDS: self.pad_token_id, LABELS: MISSING_LABEL, WORD_IDS: NO_WORD}.get(name, 0)


def _number(value: Any, name: str) -> Any:
    return MISSING_LABEL if value is None and name == LABELS else value


def pad_rows(values: Sequence[np.ndarray], pad: int) -> np.ndarray:
    """[n rows of shape (s_i, ...)] -> [n, max s, ...], filled with `pad`."""
    shape = tuple(max(sizes) for sizes in zip(*(value.shape for value in values), strict=True))
    batch = np.full((len(values), *shape), pad, dtype=np.result_type(*values))
    for row, value in enumerate(values):
        own: tuple[Any, ...] = (row, *(slice(0, size) for size in value.shape))
        batch[own] = value
    return batch


def as_tensor(value: Any, keep: bool = False) -> torch.Tensor | None:
    """A tensor over the same memory where the dtype is kept; None for what is no numeric array. keep: it always is."""
    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return None
    if array.dtype.kind in "iu" and not keep:
        array = array.astype(np.int64, copy=False)
    return torch.from_numpy(array)
