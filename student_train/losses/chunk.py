"""Losses of a chunk of token positions, and their gradient by the logits, in the logits' own memory.

With labels and truncated teachers the logits [C, V] are read and written a few times: the kept ids' logits are taken
out, the others become their softmax, and all that any loss needs of these is their log-sum-exp. The gradient by the
K + 1 classes (sparse.py) is a matter of [C, K + 1]; that of the last class is spread over its ids by their softmax. The
label's cross entropy is taken from the same classes, so that at temperature 1 one exponential serves both.

C positions of a chunk, V vocabulary, K kept entries, T temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .labels import label_loss
from .rows import row_loss
from .sparse import Classes, class_logits, class_loss, hide_kept
from .terms import Term

Buffer = Callable[[int], Tensor]  # number -> memory as large as the logits, [C, V], its contents of no meaning


class ChunkTerm(NamedTuple):
    """coefficient: scalar tensor. mask: bool [C]. target: labels int64 [C], each an id; Classes; or logits [C, V]."""

    term: Term
    coefficient: Tensor
    mask: Tensor
    target: Tensor | Classes

    @property
    def temperature(self) -> float:
        return 1.0 if self.term.name == "labels" or self.term.temperature is None else self.term.temperature


class _Tempered(NamedTuple):
    """At one temperature. rest: [C, V], exp((z - largest) / T) of the ids not kept; total: [C, 1], its sum; classes:
    [C, K + 1], logits / T of the classes, less one number a position."""

    temperature: float
    rest: Tensor
    total: Tensor
    classes: Tensor


def losses_by_classes(logits: Tensor, terms: Sequence[ChunkTerm], buffer: Buffer, *, gradient: bool) -> Tensor:
    """[terms], each summed over its positions; logits [C, V] become the gradient of their weighted sum.

    Targets are labels and Classes, the latter of the same ids in every term. Without `gradient` the logits are lost.
    """
    found = next((one.target for one in terms if isinstance(one.target, Classes)), None) or _no_classes(logits)
    labels = [one for one in terms if one.term.name == "labels"]
    own = logits.gather(-1, found.indices).masked_fill(~found.kept, -math.inf)
    label_logits = logits.gather(-1, _ids(labels, found))
    rest = hide_kept(logits, found).amax(-1, keepdim=True)
    rest = rest.masked_fill(torch.isneginf(rest), 0.0)  # where every id is kept
    top = torch.cat([own, rest], -1).amax(-1, keepdim=True)
    tempered = [
        _tempered(temperature, each, (own - top) / temperature, (rest - top) / temperature)
        for temperature, each in _exponentials(logits.sub_(rest), terms, buffer).items()
    ]
    with torch.set_grad_enabled(gradient):
        for each in tempered:
            each.classes.requires_grad_(gradient)
        sums = _sums(terms, {each.temperature: each.classes for each in tempered}, label_logits - top)
        if gradient:
            slopes = torch.autograd.grad(_weighted(sums, terms), [each.classes for each in tempered])
            _spread(tempered, slopes, found, labels)
    return sums.detach()


def losses_by_autograd(logits: Tensor, terms: Sequence[ChunkTerm], *, gradient: bool) -> Tensor:
    """The same for any targets, in several buffers [C, V]."""
    with torch.set_grad_enabled(gradient):
        own = logits.detach().requires_grad_(gradient)
        sums = torch.stack([torch.where(one.mask, _position_loss(one, own), 0.0).sum() for one in terms])
        if gradient:
            logits.copy_(torch.autograd.grad(_weighted(sums, terms), own)[0])
    return sums.detach()


def _position_loss(one: ChunkTerm, logits: Tensor) -> Tensor:
    """[C]"""
    if isinstance(one.target, Classes):
        classes = class_logits(logits / one.temperature, one.target)
        return class_loss(one.term, classes, one.target.logprobs, one.temperature)
    if one.term.name == "labels":
        return label_loss(logits, one.target)[0]
    return row_loss(one.term, logits, one.target)[0]


def _no_classes(logits: Tensor) -> Classes:
    """K = 0: all ids are the rest."""
    none = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    return Classes(none, none.bool(), logits.new_zeros(len(logits), 1))


def _ids(labels: Sequence[ChunkTerm], found: Classes) -> Tensor:
    """int64 [C, label terms]"""
    ids = [one.target for one in labels if isinstance(one.target, Tensor)]
    return torch.stack(ids, -1) if ids else found.indices[:, :0]


def _exponentials(logits: Tensor, terms: Sequence[ChunkTerm], buffer: Buffer) -> dict[float, Tensor]:
    """exp(z / T) [C, V] by T, the last of them in place of the logits."""
    made: dict[float, Tensor] = {}
    *others, last = sorted({one.temperature for one in terms}, reverse=True)
    for number, temperature in enumerate([*others, last]):
        out = logits if temperature == last else buffer(number)
        if 2 * temperature in made:  # 0.2 ns an entry instead of 1 (one core, float32)
            torch.square(made[2 * temperature], out=out)
        else:
            scaled = logits if temperature == 1 else torch.mul(logits, 1 / temperature, out=out)
            torch.exp(scaled, out=out)
        made[temperature] = out
    return made


def _tempered(temperature: float, exponentials: Tensor, own: Tensor, rest: Tensor) -> _Tempered:
    """own: [C, K], kept ids' logits / T; rest: [C, 1], the same of the largest that is not kept."""
    total = exponentials.sum(-1, keepdim=True)
    return _Tempered(temperature, exponentials, total, torch.cat([own, rest + total.log()], -1))


def _sums(terms: Sequence[ChunkTerm], classes: dict[float, Tensor], label_logits: Tensor) -> Tensor:
    """[terms]; classes: [C, K + 1] by temperature; label_logits: [C, label terms]."""
    found, of_labels = [], iter(label_logits.unbind(-1))
    for one in terms:
        logits = classes[one.temperature]
        if isinstance(one.target, Classes):
            each = class_loss(one.term, logits, one.target.logprobs, one.temperature)
        else:
            each = logits.logsumexp(-1) - next(of_labels)
        found.append(torch.where(one.mask, each, 0.0).sum())
    return torch.stack(found)


def _weighted(sums: Tensor, terms: Sequence[ChunkTerm]) -> Tensor:
    return (sums * torch.stack([one.coefficient for one in terms])).sum()


def _spread(
    tempered: Sequence[_Tempered], slopes: Sequence[Tensor], found: Classes, labels: Sequence[ChunkTerm]
) -> None:
    """From the gradients by the classes, [C, K + 1] a temperature, to that by the logits, in place of the last rest."""
    slopes = [slope / each.temperature for slope, each in zip(slopes, tempered, strict=True)]
    shares = [slope[:, -1:] / each.total.clamp(min=1.0) for slope, each in zip(slopes, tempered, strict=True)]
    out = tempered[-1].rest.mul_(shares[-1])
    for each, share in zip(tempered[:-1], shares[:-1], strict=True):
        out.addcmul_(each.rest, share)
    at_labels = [torch.where(one.mask, -one.coefficient, 0.0).unsqueeze(-1) for one in labels]
    values = torch.cat([torch.stack(slopes).sum(0)[:, :-1], *at_labels], -1)
    out.scatter_add_(-1, torch.cat([found.indices, _ids(labels, found)], -1), values.to(out.dtype))
