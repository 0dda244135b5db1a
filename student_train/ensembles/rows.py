"""Rows of several stores that speak of the same, as rows of one teacher: its answers are the ensemble's.

The leading store gives everything but the averaged columns. Each other store is read for those alone, one thread ahead
as well, so K stores of logits cost K reads of logits and one of inputs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...store.errors import DataError
from ...store.reader import TeacherRows
from ...store.schema import ATTENTION_MASK, NO_WORD, WORD_IDS
from ..dataset import narrowed
from ..losses.catalogue import SINGLE_LABEL
from ..rows_over import RowsOver
from .formulas import combined, confidence_weights

TEACHER_MASK = "teacher_mask"
CONFIDENCE = "confidence"
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Combination:
    """How columns of K teachers become one.

    columns: those that are averaged, and the axis of the classes in a batch of each; of_tokens: those of them whose
    classes are the row's tokens. weights: float64 [K], the leading store first; or CONFIDENCE.
    """

    columns: Mapping[str, int]
    average: str
    weights: torch.Tensor | str
    problem_type: str = SINGLE_LABEL
    of_tokens: frozenset[str] = frozenset()

    def weights_of(self, logits: torch.Tensor) -> torch.Tensor:
        """[K], or [K, ..., 1] for logits [K, ..., C]."""
        if isinstance(self.weights, torch.Tensor):
            return self.weights
        return confidence_weights(logits, self.problem_type)

    def __call__(self, name: str, values: Sequence[np.ndarray], mask: np.ndarray | None) -> np.ndarray:
        """One column of K teachers, each [B, ...], float32 or wider. mask: [B, S], of the tokens that there are."""
        logits, there = self.stacked(name, values, mask)
        found = combined(logits, self.weights_of(logits), self.average, self.problem_type)
        if there is not None:
            found = found.masked_fill(~there, 0)
        return found.movedim(-1, self.columns[name]).numpy()

    def stacked(
        self, name: str, values: Sequence[np.ndarray], mask: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([K, ..., C], the mask [B, S] where the classes are a row's tokens: elsewhere logits are -inf)."""
        axis = self.columns[name]
        logits = torch.stack([_float(one) for one in values]).movedim(axis if axis < 0 else axis + 1, -1)
        if name not in self.of_tokens or mask is None:
            return logits, None
        there = torch.from_numpy(mask.astype(bool))
        return logits.masked_fill(~there, -torch.inf), there


@dataclass(frozen=True)
class Member:
    """Another store's rows. order: int64 [N], which of them each row of the ensemble is; None: the same place.

    classes: int64 [C], which of its classes each class of the leading store is; None: the same.
    """

    rows: Any
    order: np.ndarray | None = None
    classes: np.ndarray | None = None

    def places(self, indices: Indices) -> Indices:
        return indices if self.order is None else self.order[np.asarray(indices, np.int64)]

    def narrowed(self, names: Sequence[str]) -> Member:
        return Member(only(self.rows, names), self.order, self.classes)


class EnsembleRows(RowsOver):
    """Rows of the leading store, whose averaged columns are those of all teachers.

    It is read as rows of a store are: `rows[[4, 1]]`, `rows.batches(…)`, `rows.column("labels")`.
    """

    def __init__(self, lead: Any, members: Sequence[Member], combination: Combination) -> None:
        self.rows, self.members, self.combination = lead, list(members), combination
        self.store = lead.store

    @property
    def lengths(self) -> np.ndarray:
        return self.rows.lengths

    @property
    def sample_ids(self) -> np.ndarray:
        """Of the leading store."""
        return self.rows.sample_ids

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(one.rows.nbytes for one in self.members)

    def narrowed(self, fields: Sequence[str], stored: Sequence[str] = ()) -> EnsembleRows:
        """Averaged columns are decoded; where none is asked for, the other stores are not read."""
        averaged = self.combination.columns
        kept = [name for name in stored if name not in averaged]
        wanted = [name for name in averaged if name in fields]
        members = [one.narrowed([*wanted, *({WORD_IDS} & set(fields))]) for one in self.members] if wanted else []
        return EnsembleRows(narrowed(self.rows, fields, kept), members, self.combination)

    def answers_only(self, names: Sequence[str]) -> EnsembleRows:
        """With averaged columns and others of `names`, and no input that need not be made."""
        tokens = any("S" in self.store.fields[name].shape for name in self.combination.columns)
        lead = self.rows if tokens else getattr(self.rows, "rows", self.rows)
        wanted = [name for name in self.combination.columns if name in names]
        members = [one.narrowed([*wanted, *({WORD_IDS} & set(names))]) for one in self.members]
        return EnsembleRows(only(lead, names), members, self.combination)

    def _batch(self, chosen: np.ndarray) -> dict[str, Any]:
        return self.together(self.rows[chosen], [one.rows[one.places(chosen)] for one in self.members])

    def batches(self, indices: Iterable[Indices], **reading: Any) -> Iterator[dict[str, Any]]:
        for batch, others in self.apart(indices, **reading):
            yield self.together(batch, others)

    def apart(self, indices: Iterable[Indices], buffers: int = 2, **reading: Any) -> Iterator[tuple[dict, list[dict]]]:
        """(a batch of the leading store, those of the others): one teacher after another, not averaged yet."""
        first, *feeds = shared(indices, 1 + len(self.members))
        with ExitStack() as opened:
            lead = opened.enter_context(closing(self.rows.batches(first, buffers=buffers, **reading)))
            others = [
                opened.enter_context(closing(one.rows.batches(map(one.places, feed), buffers=buffers)))
                for one, feed in zip(self.members, feeds, strict=True)
            ]
            for batch in lead:
                yield batch, [next(one) for one in others]

    def column(self, name: str) -> Any:
        if name not in self.combination.columns:
            return self.rows.column(name)
        every = np.arange(len(self))
        said = [one.rows.column(name)[one.places(every)] for one in self.members]
        return self.together({name: self.rows.column(name)}, [{name: values} for values in said])[name]

    def answers(self, name: str, batch: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """One averaged column of a batch that `apart` gave, teacher by teacher, classes as the leading store's."""
        found = [batch[name]]
        for member, said in zip(self.members, others, strict=True):
            values = said[name]
            if member.classes is not None:
                values = np.take(values, member.classes, self.combination.columns[name])
            found.append(values)
        if len(shapes := {one.shape for one in found}) > 1:
            raise DataError(f"column {name}: shapes that agree expected of all stores; got {sorted(shapes)}")
        return found

    def together(self, batch: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not self.members:
            return batch
        made = dict(batch)
        for said in others:
            if WORD_IDS in batch and WORD_IDS in said:  # a word that one of the teachers has nothing of
                made[WORD_IDS] = np.where(said[WORD_IDS] == NO_WORD, NO_WORD, made[WORD_IDS])
            if TEACHER_MASK in said and not np.array_equal(said[TEACHER_MASK], batch[TEACHER_MASK]):
                raise DataError("teachers stored at the same positions of a row expected: dump all stores alike")
        for name in self.combination.columns:
            if name in batch:
                values = self.answers(name, batch, others)
                made[name] = self.combination(name, values, batch.get(ATTENTION_MASK))
        return made


def only(rows: Any, names: Sequence[str]) -> Any:
    """Rows with these columns and nothing else, where their tokens do not have to be read along."""
    if not isinstance(rows, TeacherRows):
        return narrowed(rows, names)
    specs = [rows.store.fields[name] for name in names if name in rows.store.fields]
    if any("P" in spec.shape for spec in specs):  # scattered to the row's tokens
        return rows.with_fields(names)
    return TeacherRows(rows.store, rows.sample_ids, specs, rows.split)


def shared(source: Iterable[Any], readers: int) -> list[Iterator[Any]]:
    """Iterators that all give what `source` gives; each may be read by a thread of its own. An error of the source is
    raised in all of them."""
    lock, items = threading.Lock(), iter(source)
    waiting: list[deque[Any]] = [deque() for _ in range(readers)]
    ended: list[BaseException | None] = []

    def read(own: deque[Any]) -> Iterator[Any]:
        while True:
            with lock:
                if not own and not ended:
                    try:
                        item = next(items)
                        for each in waiting:
                            each.append(item)
                    except StopIteration:
                        ended.append(None)
                    except BaseException as error:
                        ended.append(error)
                if not own:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                item = own.popleft()
            yield item

    return [read(own) for own in waiting]


def _float(values: np.ndarray) -> torch.Tensor:
    found = torch.from_numpy(np.ascontiguousarray(values))
    return found.to(torch.promote_types(found.dtype, torch.float32))
