"""What the originals returned for fixed inputs, and how far from it an answer is. Their README is beside the cases."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ABSENT = "no oracle cases found; set PREDISTILL_ORACLES to their folder"
DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Case:
    """One recorded call: `case["name"]` is its input of that name, or the list of them if numbered (layers, heads)."""

    params: Mapping[str, Any]
    inputs: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name] if name in self.inputs else self.listed(name)

    def get(self, name: str) -> Any:
        """None where there is no such input."""
        return self[name] if name in self.inputs or self.listed(name) else None

    def listed(self, name: str) -> list[torch.Tensor]:
        """`name.0`, `name.1`, … in order."""
        numbers = [key.removeprefix(f"{name}.") for key in self.inputs if key.startswith(f"{name}.")]
        return [self.inputs[f"{name}.{at}"] for at in sorted(int(n) for n in numbers if n.isdecimal())]


Original = Callable[[Case], torch.Tensor]


def recorded() -> tuple[Path, list[dict]]:
    beside = Path(__file__).resolve().parents[2] / "shared" / "oracles"
    folder = Path(os.environ.get("PREDISTILL_ORACLES") or beside)
    index = folder / "index.json"
    return folder, json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []


FOLDER, INDEX = recorded()


def cases_of(originals: Mapping[str, Original]) -> list[Any]:
    """pytest parameters: the index lines of these kinds, or one that is skipped where there are no cases."""
    found = [pytest.param(line, id=line["name"]) for line in INDEX if line["kind"] in originals]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=ABSENT))]


def differences(line: dict, dtype: torch.dtype, original: Original) -> dict[str, float]:
    """Relative difference of our "loss", and the greatest of our "gradient"s, from the recorded ones."""
    from safetensors.torch import load_file

    tensors = load_file(FOLDER / line["file"])
    slopes = {key.removeprefix("out.grad."): value for key, value in tensors.items() if key.startswith("out.grad.")}
    inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    learnt = [inputs[name].requires_grad_() for name in slopes]
    loss = original(Case(line["params"], inputs))
    ours = torch.autograd.grad(loss, learnt, allow_unused=True, materialize_grads=True)
    apart = [relative(slope, theirs) for slope, theirs in zip(ours, slopes.values(), strict=True)]
    return {"loss": relative(loss.detach(), tensors["out.loss"]), "gradient": max(apart)}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|a - b| / max|b|; the plain distance where b is all zero."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().max().item() or 1.0
    return (ours.double() - theirs.double()).abs().max().item() / scale


def tolerance(line: dict, dtype: torch.dtype, what: str) -> float:
    """The cases' README's: 1e-10 in float64; in float32 1e-6, or 10 times the original's own deviation."""
    if dtype == torch.float64 and line["run_dtype"] == "float64":
        return 1e-10
    return max(1e-6, 10 * line["float32_deviation"].get(what, 0.0))


def assert_reproduced(line: dict, dtype: torch.dtype, original: Original) -> None:
    for what, apart in differences(line, dtype, original).items():
        assert apart <= tolerance(line, dtype, what), f"{line['name']}: {what} {apart:.1e} from the recorded"
