"""A language model's head and its losses together, a chunk of token positions at a time.

Neither logits [N, V] nor their gradient ever exist. The forward pass turns each chunk of hidden states into logits,
losses and gradients, and keeps of the latter what belongs to the hidden states [N, D] and to the head [V, D]; the
backward pass only scales them. Gradients in the forward pass, and a chunk as large as memory elsewhere in use, are the
idea of Liger Kernel's FusedLinearCrossEntropy (Hsu et al. 2024, arXiv:2410.10989); cut cross-entropy (Wijmans et al.
2024, arXiv:2411.09009) computes logits twice instead and keeps none.

N token positions, V vocabulary, D width, C positions a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunk import ChunkTerm, losses_by_autograd, losses_by_classes
from .sparse import Classes, SparseTargets, teacher_classes
from .terms import Term, check_truncated

# Of one buffer of logits [C, V]. On a CPU 8 MB take 5 to 20 % more time than 32 MB, and 64 MB as much as 32 (V 8,000 to
# 50,000, D 128 to 512). Elsewhere C should be a few hundred at V 150,000, else reading weights takes most of the time.
CPU_CHUNK_BYTES, CHUNK_BYTES = 32 << 20, 256 << 20

_MISSING_LABEL = -100


class TokenTerm(NamedTuple):
    """One summand: coefficient times the sum of the term's loss over the positions where mask holds.

    coefficient: weight over count, a number or a scalar tensor. mask: bool [N], or None for all. target: labels int64
    [N] (-100 none) of a labels term; SparseTargets or the teacher's logits [N, V] of a logits term, which is at
    temperature 1 where it has none of its own.
    """

    term: Term
    coefficient: Tensor | float
    mask: Tensor | None
    target: Tensor | SparseTargets


class FusedLoss(NamedTuple):
    """loss: scalar, with its graph. sums: [terms], each over its positions, without. predictions: int64 [N] or None."""

    loss: Tensor
    sums: Tensor
    predictions: Tensor | None


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    terms: Sequence[TokenTerm],
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    predictions: bool = False,
) -> FusedLoss:
    """Weighted sum of losses at N positions: hidden [N, D], weight [V, D], bias [V] or None, of any floating dtype.

    logits = softcap tanh(scale (h W^T + b) / softcap), without the tanh where softcap is None. Products are made in the
    narrower dtype of hidden and weight, all else in float32 (float64 where both are); gradients come in the dtypes of
    what was given. chunk_bytes: the size of a buffer of float32 logits [C, V]; None: 32 MB on a CPU, 256 MB elsewhere.
    There is one, and one more for each further temperature, for a softcap, and for a narrower dtype; whole teacher
    logits need several. predictions: give the logits' argmax too. Gradients are computed where they will be needed, and
    serve one backward. Raises ConfigError for a loss that needs every logit of a truncated teacher, ValueError without
    any term.
    """
    prepared, coefficients = _prepared(terms, hidden, weight)
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    by_classes = _share_classes(prepared)
    job = _Job(prepared, coefficients, by_classes, scale, softcap, chunk_bytes, predictions, torch.is_grad_enabled())
    loss, sums, found = _FusedLinearLoss.apply(hidden, weight, bias, job)
    return FusedLoss(loss, sums, found if predictions else None)


class _Job(NamedTuple):
    terms: list[ChunkTerm]  # of all N positions
    coefficients: Tensor  # [terms]
    by_classes: bool  # which function of chunk.py
    scale: float
    softcap: float | None
    chunk_bytes: int
    predictions: bool
    gradient: bool


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        wanted = [job.gradient and needs for needs in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            sums, found, ctx.gradients = _run(hidden, weight, bias, job, wanted)
        ctx.unit = _unit(job.coefficients)
        ctx.mark_non_differentiable(sums, found)
        return (sums * job.coefficients).sum(), sums, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("fused_linear_loss keeps its gradients for one backward; call it again for another")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if each is None else each.mul_(slope * ctx.unit) for each in gradients), None)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(sums [terms], predictions [N] or [0], gradients of hidden, weight and bias over the coefficients' unit)."""
    made = _Chunks(hidden, weight, bias, job, wanted)
    sums = torch.zeros_like(job.coefficients)
    found = torch.empty(len(hidden) if job.predictions else 0, dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden), made.rows):
        at = slice(start, start + made.rows)
        logits = made.logits(at)
        if job.predictions:
            torch.argmax(logits, -1, out=found[at])
        sums += made.losses(at, logits)
        if any(wanted):
            made.add_gradient(at, logits)
    return sums, found, made.gradients()


class _Chunks:
    """The memory that chunks share, and the gradients that they add to."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, wanted: Sequence[bool]) -> None:
        self.given, self.job = (hidden, weight, bias), job
        self.dtype, self.wide = _dtypes(hidden, weight)
        self.hidden, self.weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        fitting = max(1, job.chunk_bytes // (len(weight) * self.wide.itemsize))
        self.rows = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / fitting))) or 1
        self._memory: dict[Any, Tensor] = {}
        self._hidden = torch.empty_like(self.hidden) if wanted[0] else None
        self._weight = torch.zeros_like(weight, dtype=self.wide) if wanted[1] else None
        self._bias = torch.zeros_like(bias, dtype=self.wide) if bias is not None and wanted[2] else None
        self._wanted = any(wanted)

    def _buffer(self, name: Any, at: slice, dtype: torch.dtype | None = None) -> Tensor:
        """[C, V], the same memory whenever asked for by this name."""
        if name not in self._memory:
            self._memory[name] = self.hidden.new_empty(self.rows, len(self.weight), dtype=dtype or self.wide)
        return self._memory[name][: len(self.hidden[at])]

    def logits(self, at: slice) -> Tensor:
        """[C, V], float32 or float64"""
        product = self._buffer("product", at, self.dtype)
        if self.bias is None:
            torch.mm(self.hidden[at], self.weight.T, out=product)
        else:
            torch.addmm(self.bias, self.hidden[at], self.weight.T, out=product)
        logits = product if self.dtype == self.wide else self._buffer("logits", at).copy_(product)
        if self.job.softcap is None:
            return logits if self.job.scale == 1 else logits.mul_(self.job.scale)
        logits.mul_(self.job.scale / self.job.softcap).tanh_()
        if self._wanted:
            torch.square(logits, out=self._buffer("tanh squared", at))
        return logits.mul_(self.job.softcap)

    def losses(self, at: slice, logits: Tensor) -> Tensor:
        """[terms]; the logits become their own gradient."""
        terms = [_sliced(one, at) for one in self.job.terms]
        if self.job.by_classes:
            return losses_by_classes(logits, terms, lambda number: self._buffer(number, at), gradient=self._wanted)
        return losses_by_autograd(logits, terms, gradient=self._wanted)

    def add_gradient(self, at: slice, slope: Tensor) -> None:
        """slope: [C, V], by the logits; used up."""
        if self.job.softcap is not None:
            slope.addcmul_(slope, self._buffer("tanh squared", at), value=-1.0)
        if self.job.scale != 1:
            slope.mul_(self.job.scale)
        if self._bias is not None:
            self._bias += slope.sum(0)
        narrow = slope if self.dtype == self.wide else self._buffer("product", at, self.dtype).copy_(slope)
        if self._hidden is not None:
            torch.mm(narrow, self.weight, out=self._hidden[at])
        if self._weight is None:
            return
        if self.dtype == self.wide:
            self._weight.addmm_(narrow.T, self.hidden[at])
        else:
            self._weight += torch.mm(narrow.T, self.hidden[at])

    def gradients(self) -> tuple[Tensor | None, ...]:
        """By hidden, weight and bias, each in the dtype of what was given; None where not wanted."""
        pairs = zip((self._hidden, self._weight, self._bias), self.given, strict=True)
        return tuple(None if made is None or given is None else made.to(given.dtype) for made, given in pairs)


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of products, the narrower of the two; and of all else."""
    narrow = min(hidden.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return narrow, torch.promote_types(narrow, torch.float32)


def _prepared(terms: Sequence[TokenTerm], hidden: Tensor, weight: Tensor) -> tuple[list[ChunkTerm], Tensor]:
    """What chunks take their slices of, and the coefficients, [terms]."""
    if not terms:
        raise ValueError("fused_linear_loss needs one term at least; got none")
    _, wide = _dtypes(hidden, weight)
    coefficients = torch.stack([torch.as_tensor(one.coefficient, dtype=wide, device=hidden.device) for one in terms])
    coefficients = coefficients.detach()
    prepared = []
    for one, coefficient in zip(terms, coefficients / _unit(coefficients), strict=True):
        mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device) if one.mask is None else one.mask
        target: Any = one.target
        if isinstance(target, SparseTargets):
            check_truncated(one.term)
            target = teacher_classes(target, len(weight))
        elif one.term.name == "labels":
            mask = mask & (target != _MISSING_LABEL)
            target = torch.where(mask, target, 0).long()
        prepared.append(ChunkTerm(one.term, coefficient, mask, target))
    return prepared, coefficients


def _share_classes(terms: Sequence[ChunkTerm]) -> bool:
    """Are all targets labels, or entries kept of the same ids?"""
    classes = [one.target for one in terms if isinstance(one.target, Classes)]
    if len(classes) < sum(one.term.name != "labels" for one in terms):
        return False
    return all(
        torch.equal(each.indices, classes[0].indices) and torch.equal(each.kept, classes[0].kept)
        for each in classes[1:]
    )


def _unit(coefficients: Tensor) -> Tensor:
    """The largest coefficient, which gradients are divided by until backward: float16 has none below 6e-8."""
    largest = coefficients.abs().amax()
    return torch.where(largest > 0, largest, 1.0)


def _sliced(one: ChunkTerm, at: slice) -> ChunkTerm:
    target = Classes(*(each[at] for each in one.target)) if isinstance(one.target, Classes) else one.target[at]
    return one._replace(mask=one.mask[at], target=target)
