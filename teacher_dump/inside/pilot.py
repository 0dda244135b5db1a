"""What pilot rows tell of the teacher's inside: where it is, its shapes, whether attentions that are made again from
queries and keys are the teacher's own, and what each way of keeping it costs and loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...store import ConfigError, bytes_per_row
from ...store.activations import Sites
from ...store.attention import visible_keys
from ...store.attention_capture import attending
from ...store.codecs import check_values
from ...store.schema import POSITION_IDS
from .. import planning
from ..capture import Capture
from ..config import DumpConfig
from ..tasks import TASKS
from .fidelity import Cost, host
from .inner import Inner, Place, Way, find_sites, make_inner, place_of
from .layers import EXACT, HEAD_MEAN, INNER, LAYERED, QUERIES_KEYS, SQUARE, attention_source
from .task import recorded

_ROWS, _TOKENS = 8, 256  # pilot rows that are looked at, each alone, and how much of each
_CHECKED = 4  # rows of the batch that attentions are made again of
_BOUND = 1e-5  # probabilities made again, against eager attention in float32; rounding gives 2e-7
_ROUNDINGS = 16  # units in the last place, for teachers of half precision, which round their scores
_DTYPES = ("float16", "bfloat16", "int8")


class InnerPilot:
    """A teacher whose inside is looked at, on a few pilot rows. Raises ConfigError for what it does not have."""

    def __init__(self, config: DumpConfig, capture: Capture, pilot: planning.Pilot):
        self.config, self.pilot = config, pilot
        self._capture, self._model, self._samples = capture, capture.model, pilot.samples
        self._rows = planning.shuffled(pilot.samples)[:_ROWS]
        self._of_images = TASKS[config.task].of_images  # whose inputs are of one size, and are not cut
        self.square = tuple(kind for kind in SQUARE if kind in config.fields)
        self._sites = self._find()
        self._shapes = self._look_at_shapes()

    @property
    def storages(self) -> tuple[str, ...]:
        """Ways of keeping attentions that this teacher allows."""
        if not self.square:
            return (EXACT,)
        return (EXACT, QUERIES_KEYS, HEAD_MEAN) if self._sites.attention else (EXACT, HEAD_MEAN)

    def inner(self, way: Way) -> Inner:
        """The columns, stored in this way."""
        return make_inner(self.config, way, self._sites, self._shapes)

    def costs(self, dtypes: Sequence[str] = _DTYPES) -> list[Cost]:
        """Every field in every way, measured."""
        names = [*(name for name in INNER if name in self.config.fields), *self.config.capture]
        made = [
            self._cost(name, Way(storage, dtype))
            for name in names
            for storage in (self.storages if name in SQUARE else (EXACT,))
            for dtype in dtypes
        ]
        places = {place_of(spec) for cost in made for spec in cost.specs}
        for row in self._rows:
            inputs = self._inputs([row])
            found = self._run(inputs, places)
            for cost in made:
                cost.add(found, lambda settings, inputs=inputs: _visible(inputs, settings), self._sites.attention)  # type: ignore[misc]
        return made

    def check_held(self, inner: Inner) -> None:
        """Raises DataError where these columns cannot hold what the teacher says of the pilot rows."""
        places = {place_of(spec) for spec in inner.specs}
        for row in self._rows:
            source, found = self._samples.source_index[row], self._run(self._inputs([row]), places)
            for spec in inner.specs:
                check_values(host(found[place_of(spec)]), spec, lambda _, source=source: source)  # type: ignore[misc]

    def check_recomputed(self, inner: Inner) -> None:
        """Raises ConfigError where attentions made again from queries and keys are not those of eager attention."""
        places = [place_of(spec) for spec in inner.specs]
        numbers = sorted({int(number) for kind, number in places if kind in (*SQUARE, "queries", "keys")})
        if attention_source(self.config.fields, inner.way.storage) != QUERIES_KEYS or not numbers:
            return
        rows = self._rows[:_CHECKED]
        inputs, lengths = self._inputs(rows), self._samples.lengths["S"][rows].tolist()
        try:
            own = Sites.find(self._model, inputs, attention="eager")
        except ConfigError:  # weights that nobody can look at
            return
        wanted: set[Place] = {("attentions", number) for number in numbers}
        with attending(self._model, "eager"):
            made, exact = (self._run(inputs, wanted, sites) for sites in (self._sites, own))
        for number in numbers:
            self._compare(number, host(made["attentions", number]), host(exact["attentions", number]), lengths)

    def _compare(self, number: int, made: np.ndarray, exact: np.ndarray, lengths: Sequence[int]) -> None:
        """Probabilities [B, H, S, S] of rows of these lengths."""
        dtype = self._capture.dtype
        half = dtype not in (torch.float32, torch.float64)
        bound = _ROUNDINGS * torch.finfo(dtype).eps if half else _BOUND
        errors = [np.abs(a[:, :s, :s] - b[:, :s, :s]).max() for a, b, s in zip(made, exact, lengths, strict=True)]
        if not max(errors) <= bound:
            raise ConfigError(
                f"teacher_attentions_{number:02d}: probabilities made again from queries and keys that are within "
                f"{bound:.1g} of the teacher's own expected; they differ by {max(errors):.2g}: keep attentions with "
                "--attention-storage exact, and neither scores nor queries, keys or values"
            )

    def _find(self) -> Sites:
        """By queries and keys where the model tells them: all else of attention follows from them."""
        inputs = self._inputs(self._rows[:2])
        storage = self.config.attention_storage
        try:
            return find_sites(self.config, QUERIES_KEYS if self.square else storage, self._model, inputs)
        except ConfigError:
            if not self.config.needs_eager:
                raise
            return find_sites(self.config, storage, self._model, inputs)

    def _look_at_shapes(self) -> dict[Place, tuple[int | str, ...]]:
        """Of a row of what modules and the pooler give; from one row twice, and from half of it twice."""
        places: set[Place] = {("module", name) for name in self.config.capture}
        places |= {("pooled", 0)} if "pooled" in self.config.fields else set()
        longest = self._rows[self._samples.lengths["S"][self._rows].argmax()]
        seen = []
        if places:
            whole = self._inputs([longest, longest])
            width = next(iter(whole.values())).shape[1]
            for size in dict.fromkeys((width, max(width // 2, 1))) if not self._of_images else (0,):
                cut = whole if self._of_images else {name: value[:, :size] for name, value in whole.items()}
                found = self._run(cut, places)
                seen.append((size, {place: tuple(value.shape) for place, value in found.items()}))
        return {place: _row_shape(place, [(size, shapes[place]) for size, shapes in seen]) for place in places}

    def _cost(self, name: str, way: Way) -> Cost:
        fields, modules = ([name], []) if name in INNER else (["logits"], [name])
        layers = self.config.layers if name in LAYERED else None
        alone = replace(
            self.config, fields=fields, capture=modules, layers=layers, budget=None, attention_storage=EXACT,
            attention="auto", dtype="float16",
        )  # fmt: skip
        specs = make_inner(alone, way, self._sites, self._shapes).specs
        size = bytes_per_row(specs, self.pilot.lengths) - bytes_per_row([], self.pilot.lengths)
        return Cost(name, way, specs, size / self.pilot.lengths["S"])

    def _inputs(self, rows: Any) -> dict[str, Tensor]:
        inputs = self._capture.inputs(self._samples, np.asarray(rows, np.int64))
        if self._of_images:
            return {name: value.to(self._capture.dtype) for name, value in inputs.items()}
        return {name: value[:, :_TOKENS] for name, value in inputs.items()}

    def _run(self, inputs: Mapping[str, Tensor], places: set[Place], sites: Sites | None = None) -> dict[Place, Tensor]:
        """What is at these places; for queries or keys also what is made of them, where that is kept."""
        wanted: dict[str, tuple[int, ...]] = {}
        for kind, number in sorted(places, key=str):
            if isinstance(number, int):
                wanted[kind] = (*wanted.get(kind, ()), number)
        if sites is None and "queries" in wanted:
            wanted |= dict.fromkeys(self.square, wanted["queries"])
        modules = [number for _, number in places if isinstance(number, str)]
        with self._capture.no_grad(), recorded(self._model, sites or self._sites, wanted, modules) as parts:
            self._model(**inputs)
        return parts[0]


def _visible(inputs: Mapping[str, Tensor], settings: Any) -> Tensor:
    """Which keys the queries of one row see, bool [1, 1, S, S]."""
    mask = torch.ones_like(next(iter(inputs.values())), dtype=torch.bool)
    return visible_keys(mask, settings, inputs.get(POSITION_IDS))


def _row_shape(place: Place, seen: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[int | str, ...]:
    """seen: (tokens, shape of a batch of two rows). Raises ConfigError for a shape that no column has."""
    name = f"--capture {place[1]}" if place[0] == "module" else "--fields pooled"
    shapes = [shape for _, shape in seen]
    if any(shape[:1] != (2,) or len(shape) < 2 or len(shape) != len(shapes[0]) for shape in shapes):
        raise ConfigError(f"{name}: one entry for each row of a batch, here of 2, expected; its shape is {shapes[0]}")
    made: list[int | str] = []
    for axis in range(1, len(shapes[0])):
        sizes = [shape[axis] for shape in shapes]
        if sizes == [tokens for tokens, _ in seen]:
            made.append("S")
        elif len(set(sizes)) == 1:
            made.append(sizes[0])
        else:
            raise ConfigError(f"{name}: sizes fixed, or the number of tokens, expected; its shape is {shapes[0]}")
    return tuple(made)
