"""A term that has met both models: its layer map is pairs of numbers, and its columns are known.

It has a value for each row, token, or (query, key) of each *entry*: a pair of layers, or two pairs that follow each
other where a loss is about what happens between layers. Entries are averaged, or summed where the term says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...store.activations import Sites
from ...store.errors import ConfigError
from ..layers import HIDDEN_STATES, Pairs
from ..losses.terms import Term
from .projections import LinearMap
from .sides import Sides
from .teacher import MODULE, POOLED, TeacherInside

Key = tuple[str, int | str]  # (kind, layer), or (MODULE, name)
LETTERS = {"q": "queries", "k": "keys", "v": "values"}


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
        return tuple(dict.fromkeys(LETTERS[letter] for letter in term.options["pairs"] if letter != "+"))
    return (POOLED,) if term.options.get("feature") == POOLED else (HIDDEN_STATES,)


def stored_for(term: Term, teacher: TeacherInside) -> Iterator[str]:
    """Columns that a term may read of a store, as long as its layers are not known."""
    for pair in filter(None, term.options.get("modules", "").split("+")):
        yield from teacher.columns(MODULE, pair.partition(":")[2])
    for kind in kinds_of(term, teacher):
        for layer in [0] if kind == POOLED else teacher.layers(kind):
            yield from teacher.columns(kind, layer)
