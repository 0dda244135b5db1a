"""Losses of the inside, one after another: the gradient of each is taken at once, and that alone is kept.

What a loss saves for its backward pass is as wide as the teacher and, for attention, as large as H S². Taken together
with the student's own pass, all of that is held for all layers at the same time. Here each pair of layers, and of it a
few rows at a time, has a graph of its own, from the student's tensors (detached) to the loss, which is gone before the
next; backward through the student then begins with the gradients that were kept, each the size of a tensor of the
student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .pieces import Piece


class Leaves(Mapping[Any, Tensor]):
    """A piece of the student's tensors, detached: what one loss is computed from. Half precision becomes float32, since
    gradients of a mean over many tokens are small."""

    def __init__(self, found: Mapping[Any, Tensor], piece: Piece) -> None:
        self._found, self.piece, self.used = found, piece, dict[Any, Tensor]()

    def __getitem__(self, key: Any) -> Tensor:
        if key not in self.used:
            value = self._found[key]
            leaf = self.piece.of(value.detach(), axes_of(key)).to(torch.promote_types(value.dtype, torch.float32))
            self.used[key] = leaf.requires_grad_(value.requires_grad)
        return self.used[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class Learnt:
    """Gradients of several losses with respect to the student's tensors and to `weights`.

    found: the student's tensors by key, with their graph. weights: parameters of the losses' own (projections).
    """

    def __init__(self, found: Mapping[Any, Tensor], weights: Sequence[Tensor]) -> None:
        self._found, self._weights = found, list(weights)
        self._gradients: dict[Any, Tensor] = {}

    def leaves(self, piece: Piece) -> Leaves:
        return Leaves(self._found, piece)

    def learn(self, loss: Tensor, leaves: Leaves) -> None:
        """loss: scalar, weighted as it is in the whole."""
        named = {key: leaf for key, leaf in leaves.used.items() if leaf.requires_grad}
        named |= {at: weight for at, weight in enumerate(self._weights) if weight.requires_grad}
        if not loss.requires_grad:
            return
        with torch.autocast(loss.device.type, enabled=False):  # a backward pass is in the dtypes of its forward
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for key, gradient in zip(named, gradients, strict=True):
            if gradient is None:
                continue
            if key not in self._gradients:
                whole = self._weights[key] if isinstance(key, int) else self._found[key]
                self._gradients[key] = gradient.new_zeros(whole.shape)
            if isinstance(key, int):
                self._gradients[key] += gradient
            else:
                leaves.piece.add(self._gradients[key], gradient, axes_of(key))

    def total(self, value: Tensor) -> Tensor:
        """`value`, a scalar without a graph, whose backward pass hands on the gradients."""
        tensors = [self._weights[key] if isinstance(key, int) else self._found[key] for key in self._gradients]
        return _Injected.apply(value, len(tensors), *tensors, *self._gradients.values())


def axes_of(key: tuple[str, Any]) -> tuple[int, ...]:
    """Of a tensor of the student, those that are tokens; key: (kind, layer)."""
    if key[0] in ("attentions", "attention_scores"):
        return 2, 3
    return (1,) if key[0] in ("hidden_states", "queries", "keys", "values") else ()


class _Injected(torch.autograd.Function):
    """(value, n, n tensors, their n gradients) -> value. The gradients are its own; backward, once, scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *both: Tensor) -> Tensor:
        ctx.dtypes, ctx.gradients = [one.dtype for one in both[:count]], list(both[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if len(ctx.gradients) < len(ctx.dtypes):
            raise RuntimeError("losses of the inside go backward once: compute the loss again")
        given = [ctx.gradients.pop(0).mul_(upstream).to(dtype) for dtype in ctx.dtypes]
        return None, None, *given, *(None for _ in given)
