"""The objective of a task, and losses of what is inside both models beside it.

The student runs once, as its task runs it; what the losses of the inside need is recorded on the way (Sites). The
teacher's side is columns of the store, in the dtype that they are stored in until a loss converts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...store.activations import Sites
from ...store.attention import AttentionSettings
from ...store.errors import ConfigError
from ...store.images.pixels import PIXEL_VALUES
from ...store.probe import evaluating
from ...store.schema import FieldSpec
from ..losses.terms import Term
from ..objective import Batch, Evaluated, Objective, Step, coefficients, term_names
from .comparison import Comparison, kinds_of, stored_for
from .comparisons import compare
from .gradients import Learnt
from .pieces import Pieces
from .projections import Projections, attach_projections
from .rehearsal import find_sites, rehearse
from .sides import Sides
from .stored import StoredBatch
from .teacher import MODULE, TeacherInside

PIECE = (1 << 17, 1 << 22)  # numbers in a loss's tensor at a time: on a CPU, for its cache; on a GPU, for few kernels


class InnerObjective(Objective):
    """`outer`, an objective of a task, which may have no terms, and terms of INNER families after it.

    store_fields: the columns of the store, by name. seed: of projections. Before `attach` has met the student, whose
    depth the layer maps depend on, `fields` are all columns that a term may read. Raises ConfigError for a term that
    the store has nothing for.
    """

    looks_inside = True

    def __init__(
        self, outer: Objective, terms: Sequence[Term], store_fields: Mapping[str, FieldSpec | None], *, seed: int = 0
    ) -> None:
        super().__init__([*outer.terms, *terms])
        self.outer, self.inner, self.seed = outer, self.terms[len(outer.terms) :], seed
        self.keeps_logits, self.judges_rows = outer.keeps_logits, outer.judges_rows
        self.teacher = TeacherInside(store_fields)
        for term, name in zip(self.inner, self._inner_names, strict=True):
            for kind in kinds_of(term, self.teacher):
                self.teacher.check(kind, name)
        self.comparisons: list[Comparison] = []
        self._sites: Sites | None = None
        self._projections: Projections | None = None

    @property
    def _inner_names(self) -> list[str]:
        return term_names(self.terms)[len(self.outer.terms) :]

    @property
    def _columns(self) -> list[str]:
        if self.comparisons:
            return [name for one in self.comparisons for name in one.columns]
        return [name for term in self.inner for name in stored_for(term, self.teacher)]

    @property
    def fields(self) -> list[str]:
        return list(dict.fromkeys([*self.outer.fields, *self._columns]))

    @property
    def evaluation_fields(self) -> list[str]:
        return list(dict.fromkeys([*self.outer.evaluation_fields, *self._columns]))

    @property
    def stored_fields(self) -> list[str]:  # type: ignore[override]
        read_by_others = {*self.outer.fields, *self.outer.evaluation_fields}
        return [name for name in dict.fromkeys(self._columns) if name not in read_by_others]

    def settle(self, settings: Any) -> None:
        self.outer.settle(settings)

    def attach(self, model: nn.Module, inputs: Batch) -> None:
        """Find what the terms compare in the student, and give it its projections. Raises ConfigError.

        inputs: of a batch, of which a few rows are run.
        """
        self.outer.attach(model, inputs)
        kinds = {kind for term in self.inner for kind in kinds_of(term, self.teacher)}
        sites = self._sites = find_sites(model, inputs, kinds)
        named = zip(self.inner, self._inner_names, strict=True)
        self.comparisons = [compare(term, name, self.teacher, sites) for term, name in named]
        maps = {key: one for comparison in self.comparisons for key, one in comparison.projections.items()}
        weight = next(model.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        made = Projections(maps, seed=self.seed, device=weight.device, dtype=dtype) if maps else None
        by_name = any(MODULE in comparison.kinds for comparison in self.comparisons)
        found = self._seen(model, inputs) if PIXEL_VALUES in inputs or by_name else None
        for comparison in self.comparisons:
            rehearse(comparison, made, found, self._attention)
        self._projections = made
        attach_projections(model, made)

    def _seen(self, model: nn.Module, inputs: Batch) -> dict[Any, Tensor]:
        """What is compared of two rows: of images, whose positions are those of every row; of modules, whose shapes
        are their own."""
        two = {name: value[:1].repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        with torch.no_grad(), evaluating(model), self._recording() as found:
            model(**two)
        return dict(found)

    # ---- training ----

    def counts(self, batch: Batch) -> Tensor:
        self._check(batch)
        sides = Sides(batch, self.teacher)
        inner = torch.stack([one.count(sides) for one in self.comparisons])
        return torch.cat([self.outer.counts(batch).to(inner.device), inner])

    def step(self, model: nn.Module, inputs: Batch, batch: Batch, counts: Tensor) -> Step:
        own = len(self.outer.terms)
        with self._recording() as found, self._reached(model):
            loss, sums, outputs = self.outer.step(model, inputs, batch, counts[:own])
        each = coefficients(self.inner, counts[own:].to(torch.promote_types(loss.dtype, torch.float32)))
        taught, inner = self._learn(batch, found, each)
        return Step(loss + taught, torch.cat([sums.to(inner), inner]), outputs)

    def _learn(self, batch: Batch, found: Mapping[Any, Tensor], each: Tensor) -> tuple[Tensor, Tensor]:
        """(scalar with its graph, [comparisons] without): one pair of layers after another, a few rows at a time."""
        learnt, sums = Learnt(found, [] if self._projections is None else list(self._projections.parameters())), []
        whole = Sides(batch, self.teacher)
        batch_pieces = Pieces(whole.mask, whole.rows, whole.device)
        most = PIECE[whole.device.type != "cpu"]
        for one, coefficient in zip(self.comparisons, each, strict=True):
            parts = []
            for entry in one.entries:
                for piece in batch_pieces.of(one.row_size, most):
                    leaves = learnt.leaves(piece)
                    sides = Sides(batch, self.teacher, leaves, self._projections, self._attention, piece)
                    part = one.part(sides, entry)
                    learnt.learn(coefficient * part, leaves)
                    parts.append(part.detach())
            sums.append(torch.stack(parts).sum())
        inner = torch.stack(sums)
        return learnt.total((each * inner).sum()), inner

    def _sums(self, batch: Batch, found: Mapping[Any, Tensor], comparisons: Sequence[Comparison]) -> Tensor:
        """[comparisons], float32 or wider."""
        sides = Sides(batch, self.teacher, found, self._projections, self._attention)
        return torch.stack([one.total(sides) for one in comparisons])

    def _check(self, batch: Batch) -> None:
        there = StoredBatch(batch, self.teacher.specs)
        for one in self.comparisons:
            if missing := [name for name in one.columns if name not in there]:
                raise ConfigError(f"the term {one.name!r} needs {missing[0]}, which these rows do not have")

    @property
    def _attention(self) -> dict[int, AttentionSettings]:
        """Of layers whose attention the losses compute; with sinks, which are learnt, it is recorded as it is."""
        assert self._sites is not None, "attach comes first"
        return {layer: one for layer, one in self._sites.attention.items() if one.sinks is None}

    def _recording(self) -> contextlib.AbstractContextManager[dict[Any, Tensor]]:
        assert self._sites is not None, "attach comes first"
        wanted: dict[str, dict[int | str, None]] = {}
        for kind, layer in (key for one in self.comparisons for key in one.wanted):
            late = kind in ("attentions", "attention_scores") and layer in self._attention
            for name in ("queries", "keys") if late else (kind,):
                wanted.setdefault(name, {})[layer] = None
        modules = [str(name) for name in wanted.pop(MODULE, ())]
        return self._sites.recording({kind: tuple(map(int, layers)) for kind, layers in wanted.items()}, modules)

    @contextlib.contextmanager
    def _reached(self, model: nn.Module) -> Iterator[None]:
        """DDP takes parameters that the outputs do not depend on for unused; here they depend on the projections'."""
        if self._projections is None or not isinstance(model, DistributedDataParallel):
            yield
            return
        weights = list(self._projections.parameters())
        student = extract_model_from_parallel(model, keep_torch_compile=False)
        hook = student.register_forward_hook(lambda _, __, outputs: depending(outputs, weights))
        try:
            yield
        finally:
            hook.remove()

    # ---- evaluation ----

    def evaluate(self, model: nn.Module, inputs: Batch, batch: Batch, rows: int) -> Evaluated:
        with self._recording() as found:
            made = self.outer.evaluate(model, inputs, batch, rows)
        if made.totals is None:
            return made
        batch = {name: value[:rows] for name, value in batch.items()}
        there = StoredBatch(batch, self.teacher.specs)
        known = [one for one in self.comparisons if all(name in there for name in one.columns)]
        places = [at for at, one in enumerate(self.comparisons) if one in known]
        found_totals = torch.zeros(2, len(self.comparisons), dtype=torch.float64)
        loss = None
        if known:
            sums, sides = self._sums(batch, found, known), Sides(batch, self.teacher)
            counts = torch.stack([one.count(sides) for one in known])
            found_totals[:, places] = torch.stack([sums, counts.to(sums)]).cpu().double()
            if made.loss is not None and len(known) == len(self.comparisons):
                loss = made.loss + (coefficients(self.inner, counts.to(sums)) * sums).sum()
        return Evaluated(loss, torch.cat([made.totals.cpu().double(), found_totals.flatten()]), made.logits)

    def row_scores(self, rows: Any, kept: Any) -> dict[str, float]:
        return self.outer.row_scores(rows, kept)

    def scores(self, totals: Tensor) -> dict[str, float]:
        """totals: the outer objective's, then sums and counts of the terms of the inside."""
        size = len(self.inner)
        found = dict(self.outer.scores(totals[: -2 * size]))
        sums, counts = totals[-2 * size :].tolist()[:size], totals[-size:].tolist()
        loss = found.pop("loss", None)
        for term, name, value, count in zip(self.inner, self._inner_names, sums, counts, strict=True):
            if count:
                found[f"loss_{name}"] = value / count
                loss = None if loss is None else loss + term.weight * value / count
        return {"loss": loss, **found} if loss is not None and all(counts) else found


def depending(outputs: Any, weights: Sequence[Tensor]) -> Any:
    """A model's outputs, the first tensor of which depends on `weights`, by nothing."""
    if isinstance(outputs, Tensor):
        return outputs + torch.cat([weight.flatten()[:0] for weight in weights]).sum().to(outputs.dtype)
    if isinstance(outputs, Mapping):
        name = "logits" if "logits" in outputs else next(iter(outputs))
        outputs[name] = depending(outputs[name], weights)  # type: ignore[index]
        return outputs
    first, *others = outputs
    return (depending(first, weights), *others)
