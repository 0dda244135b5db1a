"""Columns of a batch as they are stored, decoded where the loss is computed: to a GPU go fewer bytes.

`codecs.stored_parts` says how they are named. What is decoded here equals, bit for bit, what a reader decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..store.codecs import INT8_BLOCK, stored_parts
from ..store.schema import FieldSpec


class StoredBatch(Mapping[str, Tensor]):
    """`batch`, in which columns of `specs` may be as they are stored; each is decoded once, when it is asked for."""

    def __init__(self, batch: Mapping[str, Tensor], specs: Mapping[str, FieldSpec]) -> None:
        self._batch, self._decoded = batch, dict[str, Tensor]()
        self._parts = {
            name: parts for name, spec in specs.items()
            if name not in batch and (parts := stored_parts(spec)) and all(part in batch for part in parts)
        }  # fmt: skip
        self._specs = specs

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._batch[name]
        if name not in self._decoded:
            self._decoded[name] = decoded([self._batch[part] for part in self._parts[name]], self._specs[name])
        return self._decoded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._batch

    def __iter__(self) -> Iterator[str]:
        return iter([*self._batch, *self._parts])

    def __len__(self) -> int:
        return len(self._batch) + len(self._parts)


def decoded(parts: list[Tensor], spec: FieldSpec) -> Tensor:
    """The values of a field, on the device of its parts: bfloat16 of its bits, float32 of int8 levels and scales."""
    if len(parts) == 1:
        return parts[0].view(torch.bfloat16)
    levels, scales = parts
    if isinstance(spec.shape[-1], str):
        return levels.float() * scales.unsqueeze(-1)
    spread = scales if scales.shape[-1] == 1 else scales.repeat_interleave(INT8_BLOCK, -1)[..., : levels.shape[-1]]
    return levels.float() * spread
