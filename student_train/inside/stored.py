"""Columns of a batch as they are stored, decoded where the loss is computed: to a GPU go fewer bytes.

`codecs.stored_parts` says how they are named. What is decoded here equals, bit for bit, what a reader decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...store.codecs import INT8_BLOCK, parts_of, stored_parts
from ...store.schema import ATTENTION_MASK, POSITION_IDS, FieldSpec
from .pieces import WHOLE, Piece

_TOKENS = {ATTENTION_MASK: (1,), POSITION_IDS: (1,)}  # axes, whether or not a store has them


class StoredBatch(Mapping[str, Tensor]):
    """`batch`, in which columns of `specs` may be as they are stored; each is decoded once, when it is asked for.

    piece: of the batch, all that is decoded. Columns that are neither of `specs` nor of tokens are whole rows of it.
    """

    def __init__(self, batch: Mapping[str, Tensor], specs: Mapping[str, FieldSpec], piece: Piece = WHOLE) -> None:
        self._batch, self._piece, self._decoded = batch, piece, dict[str, Tensor]()
        self._parts = {
            name: parts for name, spec in specs.items()
            if name not in batch and (parts := stored_parts(spec)) and all(part in batch for part in parts)
        }  # fmt: skip
        self._specs = specs

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._decoded:
            if name in self._parts:
                spec = self._specs[name]
                stored = zip(self._parts[name], parts_of(spec), strict=True)
                parts = [self._piece.of(self._batch[key], token_axes(part.shape)) for key, part in stored]
                self._decoded[name] = decoded(parts, spec)
            else:
                axes = token_axes(self._specs[name].shape) if name in self._specs else _TOKENS.get(name, ())
                self._decoded[name] = self._piece.of(self._batch[name], axes)
        return self._decoded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._batch

    def __iter__(self) -> Iterator[str]:
        return iter([*self._batch, *self._parts])

    def __len__(self) -> int:
        return len(self._batch) + len(self._parts)


def token_axes(shape: Sequence[int | str]) -> tuple[int, ...]:
    """Of a batch of rows of this shape, those that are tokens."""
    return tuple(axis for axis, size in enumerate(shape, 1) if size == "S")


def decoded(parts: list[Tensor], spec: FieldSpec) -> Tensor:
    """The values of a field, on the device of its parts: bfloat16 of its bits, float32 of int8 levels and scales."""
    if len(parts) == 1:
        return parts[0].view(torch.bfloat16)
    levels, scales = parts
    if isinstance(spec.shape[-1], str):
        return levels.float() * scales.unsqueeze(-1)
    spread = scales if scales.shape[-1] == 1 else scales.repeat_interleave(INT8_BLOCK, -1)[..., : levels.shape[-1]]
    return levels.float() * spread
