"""What fused_linear_loss does not compute, and never has in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from predistill.student_train.losses.fused import TokenTerm, fused_linear_loss
from predistill.student_train.losses.sparse import SparseTargets
from predistill.student_train.losses.terms import Term
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """What operations allocate: shapes, entries of the largest, and bytes alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self.known.add(given.untyped_storage()._cdata)
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in self.known:
                self.shapes.add(tuple(made.shape))
                self.largest = max(self.largest, made.numel())
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def big(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, list[TokenTerm]]:
    """600 positions of 5000 ids, 32 wide: logits of 12 MB, a head of 640 kB."""
    n, v, d, k = 600, 5000, 32, 16
    drawn = torch.Generator().manual_seed(0)
    indices = torch.rand(n, v, generator=drawn).topk(k).indices
    logprobs = torch.randn(n, k, generator=drawn).log_softmax(-1) - 0.5
    targets = SparseTargets(indices, logprobs, (1 - logprobs.exp().sum(-1)).log())
    hidden, weight = ((torch.randn(size, d, generator=drawn) * 0.3).to(dtype).requires_grad_() for size in (n, v))
    ids = torch.randint(v, (n,), generator=drawn)
    return (
        hidden,
        weight,
        [TokenTerm(Term("labels"), 1 / n, None, ids), TokenTerm(Term("logits"), 1 / n, None, targets)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_all_positions_are_ever_in_memory(dtype: torch.dtype) -> None:
    hidden, weight, terms = big(dtype)
    chunk = 1 << 20
    with Memory() as memory:
        fused_linear_loss(hidden, weight, terms, chunk_bytes=chunk, predictions=True).loss.backward()
    assert memory.largest < len(hidden) * len(weight) / 8
    head_bytes, narrow = weight.numel() * 4, dtype != torch.float32
    ids, targets = (one.target for one in terms)
    copies = 40 * sum(each.numel() for each in targets)  # bytes
    assert memory.peak <= chunk * (1.5 if narrow else 1) + head_bytes * (2 if narrow else 1) + copies
    assert isinstance(ids, torch.Tensor)
    with Memory() as plain:
        F.cross_entropy(F.linear(hidden, weight), ids).backward()
    assert plain.largest >= len(hidden) * len(weight) and memory.peak < plain.peak / 3


def test_a_weight_that_is_not_trained_has_no_gradient_buffer() -> None:
    hidden, weight, terms = big()
    loss = fused_linear_loss(hidden, weight, terms).loss
    expected = torch.autograd.grad(loss, hidden)[0]
    with Memory() as memory:
        slope = torch.autograd.grad(fused_linear_loss(hidden, weight.detach(), terms).loss, hidden)[0]
    assert torch.equal(slope, expected) and tuple(weight.shape) not in memory.shapes


def test_hidden_states_that_need_no_gradient_get_none() -> None:
    hidden, weight, terms = big()
    whole_slope = torch.autograd.grad(fused_linear_loss(hidden, weight, terms).loss, weight)[0]
    with Memory() as memory:
        slope = torch.autograd.grad(fused_linear_loss(hidden.detach(), weight, terms).loss, weight)[0]
    assert torch.equal(slope, whole_slope) and tuple(hidden.shape) not in memory.shapes


def test_without_gradients_only_losses_are_computed() -> None:
    hidden, weight, terms = big()
    expected = fused_linear_loss(hidden, weight, terms)
    with torch.no_grad(), Memory() as memory:
        found = fused_linear_loss(hidden, weight, terms)
    assert not found.loss.requires_grad and not memory.shapes & {tuple(hidden.shape), tuple(weight.shape)}
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.sums, expected.sums)


def test_gradients_go_into_parameters_without_a_copy() -> None:
    hidden, weight, terms = big()
    loss = fused_linear_loss(hidden, weight, terms).loss
    with Memory() as memory:
        loss.backward()
    assert weight.grad is not None and not memory.shapes & {tuple(hidden.shape), tuple(weight.shape)}
