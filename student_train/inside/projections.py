"""Linear maps from the student's width to the teacher's, one a layer pair, for losses of hidden states that differ.

They are trained with the student and belong to its checkpoints, and not to the student: attached to it, their
parameters are among its `parameters()`, where the optimizer, DDP and gradient clipping find them, and not in its
`state_dict()`, so that whatever is saved of it is the student alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ...store.errors import ConfigError, StoreMismatch
from ..sharded import cut_again, fill, gathered

ATTRIBUTE = "distillation_projections"  # of the student they are attached to
FILE = "projections.safetensors"  # in a checkpoint


class LinearMap(NamedTuple):
    """inputs, outputs: widths of student and teacher; orthogonal: initialised so, rather than as nn.Linear is."""

    inputs: int
    outputs: int
    bias: bool = False
    orthogonal: bool = False


class Projections(nn.Module):
    """`projections("hidden_states/1:3", hidden)`: [..., student's width] -> [..., teacher's width].

    The same seed gives the same weights, and torch's own generator is left as it is. The parameters are this module's
    own, `<key>/weight` [outputs, inputs] and `<key>/bias` [outputs], since a child module would be in the state_dict.
    """

    def __init__(
        self, maps: Mapping[str, LinearMap], *, seed: int = 0, device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for key, one in maps.items():
            for name, value in _initial(one, generator).items():
                self.register_parameter(f"{key}/{name}", nn.Parameter(value.to(device, dtype)))

    def forward(self, key: str, hidden: Tensor) -> Tensor:
        """float16 is left to no autocast: gradients are taken here before a loss scale is on them (gradients.py)."""
        weight, bias = getattr(self, f"{key}/weight"), getattr(self, f"{key}/bias", None)
        device = hidden.device.type
        wide = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float16
        with torch.autocast(device, enabled=wide):
            return functional.linear(hidden.to(weight.dtype), weight, bias)

    def __contains__(self, key: str) -> bool:
        return f"{key}/weight" in self._parameters

    def save(self, path: Path, *, write: bool = True) -> None:
        """write: on one rank; all ranks call, since each may hold a part."""
        values = {name: gathered(value) for name, value in self.named_parameters()}
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(values, path)

    def load(self, path: Path) -> None:
        """Bit for bit what `save` wrote. Raises ConfigError where it is not there, StoreMismatch for other maps."""
        if not path.is_file():
            raise ConfigError(f"{path} is not there: this run learns projections, its checkpoint is of one without any")
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be read ({error}): go on from another checkpoint") from error
        own = dict(self.named_parameters())
        theirs, ours = ({name: list(value.shape) for name, value in each.items()} for each in (saved, own))
        for name in sorted({**ours, **theirs}):
            if ours.get(name) != theirs.get(name):
                raise StoreMismatch(
                    f"{path}: {name} has shape {theirs.get(name)}, this run's has {ours.get(name)}: go on with the "
                    "same student, store and loss terms"
                )
        for name, value in own.items():
            fill(value, saved[name])

    def _save_to_state_dict(self, *_: object) -> None:
        """Nothing of these is in a saved student."""

    def _load_from_state_dict(self, *_: object) -> None:
        """Nothing of these is missed in one."""


def _initial(one: LinearMap, generator: torch.Generator) -> dict[str, Tensor]:
    """float32 on the CPU: uniform within ± 1 / sqrt(inputs), as nn.Linear; or orthogonal, and a bias of zeros."""
    weight, bias = torch.empty(one.outputs, one.inputs), torch.zeros(one.outputs)
    if one.orthogonal:
        nn.init.orthogonal_(weight, generator=generator)
    else:
        bound = one.inputs**-0.5
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)
    return {"weight": weight, "bias": bias} if one.bias else {"weight": weight}


def projections_of(model: nn.Module) -> Projections | None:
    """Those that are attached to a model."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Projections) else None


def attach_projections(model: nn.Module, projections: Projections | None) -> None:
    """In place of those that are there; None takes them away."""
    if projections_of(model) is not None:
        delattr(model, ATTRIBUTE)
    if projections is not None:
        setattr(model, ATTRIBUTE, projections)


def save_projections(model: nn.Module, checkpoint: str, *, write: bool = True) -> None:
    """Those that are attached, if any, beside the weights of a checkpoint. write: on one rank; all ranks call."""
    if (projections := projections_of(model)) is not None:
        projections.save(Path(checkpoint) / FILE, write=write)


def load_projections(model: nn.Module, checkpoint: str) -> None:
    """Those that are attached, if any, as they were in a checkpoint. Raises ConfigError, StoreMismatch."""
    if (projections := projections_of(model)) is not None:
        cut_again(model)
        projections.load(Path(checkpoint) / FILE)
