"""Losses of the inside, one after another: the gradient of each is taken at once, and that alone is kept.

What a loss saves for its backward pass is as wide as the teacher and, for attention, as large as H S². Taken together
with the student's own pass, all of that is held for all layers at the same time. Here each pair of layers has a graph
of its own, from the student's tensors (detached) to the loss, which is gone before the next; backward through the
student then begins with the gradients that were kept, each the size of a tensor of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Leaves(Mapping[Any, Tensor]):
    """The student's tensors, detached: what one loss is computed from. Half precision becomes float32, since gradients
    of a mean over many tokens are small."""

    def __init__(self, found: Mapping[Any, Tensor]) -> None:
        self._found, self.used = found, dict[Any, Tensor]()

    def __getitem__(self, key: Any) -> Tensor:
        if key not in self.used:
            value = self._found[key]
            leaf = value.detach().to(torch.promote_types(value.dtype, torch.float32))
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

    def leaves(self) -> Leaves:
        return Leaves(self._found)

    def learn(self, loss: Tensor, leaves: Leaves) -> None:
        """loss: scalar, weighted as it is in the whole."""
        named = {key: leaf for key, leaf in leaves.used.items() if leaf.requires_grad}
        named |= {at: weight for at, weight in enumerate(self._weights) if weight.requires_grad}
        if not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for key, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                before = self._gradients.get(key)
                self._gradients[key] = gradient if before is None else before + gradient

    def total(self, value: Tensor) -> Tensor:
        """`value`, a scalar without a graph, whose backward pass hands on the gradients."""
        tensors = [self._weights[key] if isinstance(key, int) else self._found[key] for key in self._gradients]
        return _Injected.apply(value, len(tensors), *tensors, *self._gradients.values())


class _Injected(torch.autograd.Function):
    """(value, n, n tensors, their n gradients) -> value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *both: Tensor) -> Tensor:
        ctx.dtypes, ctx.gradients = [one.dtype for one in both[:count]], both[count:]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        given = [(one * upstream).to(dtype) for one, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]
        return None, None, *given, *(None for _ in given)
