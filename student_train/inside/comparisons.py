"""One class a family of losses about the inside: which tensors of both models they compare, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...store.activations import Sites
from ...store.errors import ConfigError
from ..layers import HIDDEN_STATES, Pairs
from ..losses import attention, feature_maps, hidden, relations
from ..losses.terms import Term
from .comparison import LETTERS, Comparison
from .projections import LinearMap
from .sides import Sides
from .teacher import MODULE, POOLED, TeacherInside


class HiddenStates(Comparison):
    """Token by token."""

    functions: dict[str, Callable[..., Tensor]] = {"mse": hidden.mse, "cosine": hidden.cosine, "pkd": hidden.pkd}

    def row_size(self, tokens: int) -> int:
        return self._width * (self._positions or tokens)

    def values(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        grid = self.grid(entry)
        own = sides.student(HIDDEN_STATES, entry[0], self._key(*entry), grid)
        return self.functions[self.term.loss](own, sides.teacher(HIDDEN_STATES, entry[1], grid), sides.mask)


class Attentions(Comparison):
    """Probabilities or scores, over the keys that the teacher's queries see."""

    functions: dict[str, Callable[..., Tensor]] = {
        "mse": attention.mse, "kl": attention.kl, "soft_cross_entropy": attention.soft_cross_entropy,
    }  # fmt: skip

    def __init__(self, term: Term, name: str, teacher: TeacherInside, student: Sites) -> None:
        super().__init__(term, name, teacher, student)
        text = term.options["heads"]
        self.heads: attention.Heads = text
        if text not in attention.HEADS:
            self.heads = [(int(own), int(theirs)) for own, theirs in (pair.split(":") for pair in text.split(","))]
        averaged = [layer for _, layer in self.pairs if teacher.is_head_mean(self.kinds[0], layer)]
        if averaged and text not in ("auto", "mean", "repeat"):
            raise ConfigError(
                f"the term {name!r} has heads={text}, but the store holds the mean over heads: leave heads out"
            )

    def values(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        own, theirs = sides.student(self.kinds[0], entry[0]), sides.teacher(self.kinds[0], entry[1])
        return self.functions[self.term.loss](own, theirs, sides.visible(entry[1]), heads=self.heads)

    def row_size(self, tokens: int) -> int:
        return self._width * (self._positions or tokens) ** 2

    def units(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        return sides.visible(entry[1]).sum() if self.term.spec.unit == "pair" else self.tokens(sides, entry).sum()


class TokenRelations(Comparison):
    """MiniLM: queries with queries and so on, the sum over the relations that the term names."""

    def values(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        own, theirs = entry
        heads = self.term.options["relation_heads"] or self.teacher.shape(self.kinds[0], theirs)[0]
        found = []
        for letters in self.term.options["pairs"].split("+"):
            kinds = [LETTERS[letter] for letter in letters]
            (own_left, own_right), (left, right) = (
                [side(kind, layer) for kind in kinds] for side, layer in ((sides.student, own), (sides.teacher, theirs))
            )
            seen, mask = sides.visible(theirs), sides.counting(self.teacher.positions(self.kinds[0], theirs))
            found.append(relations.minilm(own_left, own_right, left, right, mask, heads=heads, visible=seen))
        return torch.stack(found).sum(0)


    def row_size(self, tokens: int) -> int:
        return (self.term.options["relation_heads"] or self._width) * (self._positions or tokens) ** 2


class RowRelations(Comparison):
    """Between the rows of a batch, each a vector: the mean over its tokens, its first token, or the pooler's."""

    functions: dict[str, Callable[..., Tensor]] = {
        "rkd": relations.rkd, "rkd_distance": relations.rkd_distance, "rkd_angle": relations.rkd_angle,
        "similarity": relations.similarity, "pkt": relations.pkt,
    }  # fmt: skip
    features: dict[str, Callable[..., Tensor]] = {"mean": hidden.mean_token, "first": hidden.first_token}

    def _pairs(self) -> Pairs:
        return ((0, 0),) if self.kinds == (POOLED,) else super()._pairs()

    def values(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        vectors = [sides.student(self.kinds[0], entry[0]), sides.teacher(self.kinds[0], entry[1])]
        if self.kinds != (POOLED,):
            feature = self.features[self.term.options["feature"]]
            vectors = [feature(each, sides.mask) for each in vectors]
        return self.functions[self.term.loss](*vectors)


class Maps(Comparison):
    """Where in a row a layer is large."""

    functions: dict[str, Callable[..., Tensor]] = {
        "attention_transfer": feature_maps.attention_transfer, "nst": feature_maps.nst,
    }  # fmt: skip

    def values(self, sides: Sides, entry: tuple[int, int]) -> Tensor:
        grid = self.grid(entry)
        own = sides.student(HIDDEN_STATES, entry[0], grid=grid)
        return self.functions[self.term.loss](own, sides.teacher(HIDDEN_STATES, entry[1], grid), sides.mask)


class Flows(Comparison):
    """From one layer of the map to the next."""

    functions: dict[str, Callable[..., Tensor]] = {"fsp": feature_maps.fsp, "mmd": relations.mmd}

    def _entries(self) -> Sequence[Any]:
        if len(self.pairs) < 2:
            raise ConfigError(
                f"the term {self.name!r} is about what happens between layers, and its layer map "
                f"{self.term.options['layers']} has one pair: give two or more"
            )
        return list(pairwise(self.pairs))

    def values(self, sides: Sides, entry: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
        grid = self.grid(entry)
        own = [sides.student(HIDDEN_STATES, pair[0], self._key(*pair), grid) for pair in entry]
        theirs = [sides.teacher(HIDDEN_STATES, pair[1], grid) for pair in entry]
        return self.functions[self.term.loss](*own, *theirs, sides.mask)


class Modules(Comparison):
    """What modules give, by their names: maps of convolutions, tokens, or vectors."""

    functions: dict[str, Callable[..., Tensor]] = {
        **HiddenStates.functions, **Maps.functions, "rkd": relations.rkd, "similarity": relations.similarity,
        "pkt": relations.pkt,
    }  # fmt: skip

    def _pairs(self) -> Any:
        if not self.term.options["modules"]:
            raise ConfigError(
                f"the term {self.name!r} compares modules: say which, as modules=student_name:teacher_name"
            )
        return tuple(tuple(pair.split(":")) for pair in self.term.options["modules"].split("+"))

    @property
    def projections(self) -> dict[str, LinearMap]:
        asked, found = self.term.options.get("projection", "none"), {}
        for own, theirs in self.pairs if asked != "none" else ():
            shape, (outputs,) = self.student.shapes[MODULE, own], self.teacher.shape(MODULE, theirs)
            inputs = shape[0] if len(shape) == 3 else shape[-1]
            if asked != "auto" or inputs != outputs:
                bias, orthogonal = self.term.options["bias"], asked == "orthogonal"
                found[self._key(own, theirs)] = LinearMap(inputs, outputs, bias, orthogonal)
        return found

    def values(self, sides: Sides, entry: tuple[str, str]) -> Tensor:
        grid, loss = self.grid(entry), self.functions[self.term.loss]
        mask = sides.mask if self.teacher.positions(MODULE, entry[1]) is None else None
        values = [sides.student(MODULE, entry[0], self._key(*entry), grid), sides.teacher(MODULE, entry[1], grid)]
        if self.term.loss in RowRelations.functions:
            return loss(*(one if one.dim() == 2 else hidden.mean_token(one, mask) for one in values))
        return loss(*values, mask)


COMPARISONS: dict[str, type[Comparison]] = {
    "hidden_states": HiddenStates, "embeddings": HiddenStates, "attentions": Attentions,
    "attention_scores": Attentions, "relations/minilm": TokenRelations, "relations/attention_transfer": Maps,
    "relations/nst": Maps, "relations/fsp": Flows, "relations/mmd": Flows, "relations": RowRelations,
    "feature_maps": Modules,
}  # fmt: skip


def compare(term: Term, name: str, teacher: TeacherInside, student: Sites) -> Comparison:
    """The comparison that a term stands for. Raises ConfigError."""
    kind = COMPARISONS.get(f"{term.name}/{term.loss}") or COMPARISONS[term.name]
    return kind(term, name, teacher, student)
