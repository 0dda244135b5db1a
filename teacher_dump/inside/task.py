"""A batch through a task's teacher, with what is inside it: recorded, sent from the device, put among its columns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...store import ConfigError, FieldSpec
from ...store.activations import Sites
from ...store.codecs import LIMITS, check_values
from ...store.schema import POSITIONS
from ..config import DumpConfig
from ..tasks import Samples, Task
from .inner import Inner, Place, find_sites, place_of, settings_of

_PEAK = "/peak"  # beside a column that was rounded on the device
_NOT_COPIED = ("cpu",)  # devices whose memory is the host's


class InnerTask:
    """A task whose teacher's inside is kept too. known: the model that ran last, and where its inside is."""

    def __init__(self, task: Task, config: DumpConfig, inner: Inner, known: tuple[Any, Sites] | None = None):
        self._task, self._config, self.inner, self._known = task, config, inner, known
        self.model_class, self.columns, self.label_names, self.notices = (
            task.model_class, task.columns, task.label_names, task.notices,
        )  # fmt: skip
        own = [spec for spec in task.fields if "logits" in config.fields or not is_of_logits(spec)]
        self.fields = [*own, *inner.specs]
        self.settings = {**task.settings, **settings_of(config, inner)}
        self._names = {spec.name for spec in own}

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        self._task.check(split, start, rows)

    def prepare(self, split: str, source_index: np.ndarray, rows: pa.Table, **of_view: int) -> Samples:
        return self._task.prepare(split, source_index, rows, **of_view)

    def collate(self, samples: Samples, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._task.collate(samples, rows)

    def ready(self, model: Any, inputs: dict[str, Any]) -> None:
        self._task.ready(model, inputs)
        if self._known is None or self._known[0] is not model:
            self._known = (model, find_sites(self._config, self.inner.way.storage, model, inputs))

    def forward(
        self, model: Any, inputs: dict[str, Any], samples: Samples, rows: np.ndarray, **given: Any
    ) -> dict[str, Any]:
        """What the task gives, and each column by its name: [B, Smax, …], [B, H, Smax, Smax] or [B, …]."""
        self.ready(model, inputs)
        assert self._known is not None
        with recorded(model, self._known[1], self.inner.wanted, self.inner.modules) as parts:
            fields = self._task.forward(model, inputs, samples, rows, **given)
        sizes = {"S": next(iter(inputs.values())).shape[1]}
        for spec in self.inner.specs:
            fields |= _sent(spec, _column(spec, parts, len(rows), sizes))
        return fields

    def outputs(self, samples: Samples, rows: np.ndarray, captured: dict[str, np.ndarray]) -> dict[str, Any]:
        own = self._task.outputs(samples, rows, captured)
        for spec in self.inner.specs:
            if spec.name + _PEAK in captured:
                _check_peaks(spec, captured, samples, rows)
        inside = {spec.name: captured[spec.name] for spec in self.inner.specs}
        return {**{name: values for name, values in own.items() if name in self._names}, **inside}


def is_of_logits(spec: FieldSpec) -> bool:
    """A column that is there for the logits alone."""
    return spec.role == "teacher" and spec.name != POSITIONS and not place_of(spec)[0]


@contextlib.contextmanager
def recorded(
    model: Any, sites: Sites, wanted: Mapping[str, Sequence[int]], modules: Sequence[str] = ()
) -> Iterator[list[dict[Place, Tensor]]]:
    """What each forward pass of the model gives, in order: a task may run a batch in pieces."""
    parts: list[dict[Place, Tensor]] = []
    with sites.recording(wanted, modules) as found:
        after = model.register_forward_hook(lambda *_: parts.append(dict(found)))  # after those that record
        try:
            yield parts
        finally:
            after.remove()


def _column(spec: FieldSpec, parts: list[dict[Place, Tensor]], rows: int, sizes: Mapping[str, int]) -> Tensor:
    """Raises ConfigError where a module gives something of another shape than in the pilot."""
    place = place_of(spec)
    pieces = [part[place].detach() for part in parts]
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if spec.parameters.get("mean_over_heads"):
        values = values.mean(dim=1, keepdim=True)
    if place[0] == "pooled":
        values = values.flatten(1)  # [B, D, 1, 1] of convolutional networks
    expected = (rows, *(sizes[size] if isinstance(size, str) else size for size in spec.shape))
    if tuple(values.shape) != expected:
        raise ConfigError(f"{spec.name}: values of shape {list(expected)} expected; got {list(values.shape)}")
    return values


def _sent(spec: FieldSpec, values: Tensor) -> dict[str, Tensor]:
    """What of a column [B, …] leaves the device: where that is a copy, float16 rather than float32, and the largest of
    each row, [B], which tells what was too large for it."""
    rounded = spec.codec == "dense" and spec.dtype == "float16" and values.dtype != torch.float16
    if not rounded or values.device.type in _NOT_COPIED:
        return {spec.name: values}
    least, most = values.flatten(1).aminmax(dim=1)
    return {spec.name: values.half(), spec.name + _PEAK: torch.maximum(-least, most).float()}


def _check_peaks(spec: FieldSpec, captured: Mapping[str, np.ndarray], samples: Samples, rows: np.ndarray) -> None:
    """Raises DataError where a value was too large for float16, other than in padding."""
    peaks = captured[spec.name + _PEAK]
    for at in np.flatnonzero(np.isfinite(peaks) & (peaks > LIMITS["float16"])):
        length = int(samples.lengths["S"][rows[at]])
        own = captured[spec.name][at][tuple(slice(length if size == "S" else None) for size in spec.shape)]
        if np.isinf(own).any():
            check_values(peaks[at : at + 1], spec, lambda _, at=at: samples.source_index[rows[at]])  # type: ignore[misc]
