"""One class a family of losses about the inside: which tensors of both models they compare, and how.

A comparison is a term that has met both models: its layer map is pairs of numbers, and its columns are known. It has a
value for each row, token, or (query, key) of each *entry*: a pair of layers, or two pairs that follow each other where
a loss is about what happens between layers. Entries are averaged, or summed where the term says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...store.activations import Sites
from ...store.errors import ConfigError
from ..layers import HIDDEN_STATES, Pairs
from ..losses import attention, feature_maps, hidden, relations
from ..losses.terms import Term
from .projections import LinearMap
from .sides import Sides
from .teacher import MODULE, POOLED, TeacherInside

Key = tuple[str, int | str]  # (kind, layer), or (MODULE, name)
_LETTERS = {"q": "queries", "k": "keys", "v": "values"}


class Comparison(ABC):
    """A term on a student and a store's teacher. Raises ConfigError where they cannot be compared so."""

    def __init__(self, term: Term, name: str, teacher: TeacherInside, student: Sites) -> None:
        self.term, self.name, self.teacher, self.student = term, name, teacher, student
        self.kinds = kinds_of(term, teacher)
        self.pairs = self._pairs()
        for key in self.wanted:
            if key not in student.shapes:
                what = f"module {key[1]}" if key[0] == MODULE else key[0]
                raise ConfigError(f"the term {name!r} needs the student's {what}, which it does not have")
        self.entries: Sequence[Any] = self._entries()

    def _pairs(self) -> Pairs:
        """The same of every kind."""
        if self.student.depth == 0:
            raise ConfigError(
                f"the term {self.name!r} needs the student's layers, which only models of transformers tell: give such "
                "a student, or leave the term out"
            )
        text = self.term.options.get("layers", "0:0")  # embeddings have no map
        return [self.teacher.pairs(text, kind, self.student.depth) for kind in self.kinds][-1]

    def _entries(self) -> Sequence[Any]:
        return self.pairs

    @property
    def wanted(self) -> list[Key]:
        """What is to be recorded of the student."""
        return [(kind, layer) for kind in self.kinds for layer in dict.fromkeys(pair[0] for pair in self.pairs)]

    @property
    def columns(self) -> list[str]:
        """What is read of the store."""
        taught = dict.fromkeys(pair[1] for pair in self.pairs)
        return [name for kind in self.kinds for layer in taught for name in self.teacher.columns(kind, layer)]

    @property
    def projections(self) -> dict[str, LinearMap]:
        """Of hidden states, one a pair of layers: where widths differ, or always where the term says so."""
        asked, found = self.term.options.get("projection", "none"), {}
        for own, theirs in self.pairs if asked != "none" else ():
            inputs = self.student.shapes[HIDDEN_STATES, own][0]
            (outputs,) = self.teacher.shape(HIDDEN_STATES, theirs)
            if asked != "auto" or inputs != outputs:
                bias, orthogonal = self.term.options["bias"], asked == "orthogonal"
                found[self._key(own, theirs)] = LinearMap(inputs, outputs, bias, orthogonal)
        return found

    def _key(self, own: int | str, theirs: int | str) -> str:
        return f"{self.name}/{own}:{theirs}".replace(".", "_")  # names of parameters have no dots

    @abstractmethod
    def values(self, sides: Sides, entry: Any) -> Tensor:
        """[B], [B, S] or [B, S, S], 0 at padding."""

    def grid(self, entry: Any) -> tuple[int, int] | None:
        """(H, W) that maps of convolutions are brought to: the least of the entry's; None where there are none.

        Raises ConfigError where one side has a map and the other has tokens.
        """
        found: list[tuple[int, int] | None] = []
        for own, theirs in pairs_of(entry):
            shape = self.student.shapes[self.kinds[0], own]
            found += [shape[1:] if len(shape) == 3 else None, self.teacher.grid(self.kinds[0], theirs)]
        sizes = [size for size in found if size is not None]
        if sizes and len(sizes) < len(found):
            raise ConfigError(
                f"the term {self.name!r} would compare a map of a convolution with tokens; compare pooled features, as "
                "relations/rkd:feature=mean does, or give a student of the teacher's kind"
            )
        return (min(size[0] for size in sizes), min(size[1] for size in sizes)) if sizes else None

    def tokens(self, sides: Sides, entry: Any) -> Tensor:
        """int64 [B]: positions of an entry that count."""
        grid = self.grid(entry) if self.kinds in ((HIDDEN_STATES,), (MODULE,)) else None
        found = self.teacher.positions(self.kinds[0], pairs_of(entry)[0][1]) if grid is None else grid[0] * grid[1]
        return sides.counting(found).sum(-1)

    def total(self, sides: Sides) -> Tensor:
        """Scalar: the sum over all of all entries."""
        return torch.stack([self.part(sides, entry) for entry in self.entries]).sum()

    def part(self, sides: Sides, entry: Any) -> Tensor:
        """Scalar: what one entry adds to `total`."""
        part = self.values(sides, entry).sum()
        return part * len(self.entries) if self.term.options.get("over_layers") == "sum" else part

    def row_size(self, tokens: int) -> int:
        """Numbers in the largest tensor that the loss makes of a row; 0 where rows are compared with each other."""
        return 0

    @property
    def _width(self) -> int:
        """Of hidden states, or heads: the most of both sides."""
        kind = self.kinds[0]
        both = [(self.student.shapes[kind, own], self.teacher.shape(kind, theirs)) for own, theirs in self.pairs]
        return max(shape[0] for shapes in both for shape in shapes)

    @property
    def _positions(self) -> int | None:
        """Of every row of images."""
        return self.teacher.positions(self.kinds[0], self.pairs[0][1])

    def count(self, sides: Sides) -> Tensor:
        """int64 scalar: how many values that are; the mean over entries is `total` over `count`."""
        return torch.stack([self.units(sides, entry) for entry in self.entries]).sum()

    def units(self, sides: Sides, entry: Any) -> Tensor:
        """int64 scalar: rows, tokens, or pairs of tokens of an entry."""
        if self.term.spec.unit == "row":
            return torch.tensor(sides.rows, device=sides.device)
        tokens = self.tokens(sides, entry)
        return (tokens if self.term.spec.unit == "token" else tokens.square()).sum()


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
            kinds = [_LETTERS[letter] for letter in letters]
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


def pairs_of(entry: Any) -> Sequence[tuple[Any, Any]]:
    """The pairs of layers of an entry, which is one or two of them."""
    return entry if isinstance(entry[0], tuple) else [entry]


def kinds_of(term: Term, teacher: TeacherInside) -> tuple[str, ...]:
    """What of both models' inside a term compares."""
    if term.name == "feature_maps":
        return (MODULE,)
    if term.options.get("or_attentions") and not teacher.layers(term.name):
        return ("attentions",)
    if term.name in ("attentions", "attention_scores"):
        return (term.name,)
    if "pairs" in term.options:
        return tuple(dict.fromkeys(_LETTERS[letter] for letter in term.options["pairs"] if letter != "+"))
    return (POOLED,) if term.options.get("feature") == POOLED else (HIDDEN_STATES,)


def compare(term: Term, name: str, teacher: TeacherInside, student: Sites) -> Comparison:
    """The comparison that a term stands for. Raises ConfigError."""
    kind = COMPARISONS.get(f"{term.name}/{term.loss}") or COMPARISONS[term.name]
    return kind(term, name, teacher, student)


def stored_for(term: Term, teacher: TeacherInside) -> Iterator[str]:
    """Columns that a term may read of a store, as long as its layers are not known."""
    for pair in filter(None, term.options.get("modules", "").split("+")):
        yield from teacher.columns(MODULE, pair.partition(":")[2])
    for kind in kinds_of(term, teacher):
        for layer in [0] if kind == POOLED else teacher.layers(kind):
            yield from teacher.columns(kind, layer)
