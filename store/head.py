"""The head of a language model apart from its backbone: [B, S, D] instead of [B, S, V].

Both phases run the head over chunks of positions. B rows, S tokens, D width, V vocabulary.

The model's own forward is left as it is, in whatever wrapper; a hook takes the head's input and hands on one position
a row, so that no [B, S, V] is made. What models do to logits after the head differs by architecture (Gemma: soft-cap,
Gemma Team 2024; Cohere, Granite, Falcon-H1 and HyperCLOVA X: a factor): config names that are known are tried against
the model's own logits, and a model that none of them explains has no head apart.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .probe import evaluating

_FACTORS: Mapping[str, Callable[[float], tuple[float, ...]]] = {  # config name -> factors it may stand for
    "logit_scale": lambda value: (value,),  # Cohere
    "logits_scaling": lambda value: (1 / value, value),  # Granite divides, HyperCLOVA X multiplies
    "lm_head_multiplier": lambda value: (value,),  # Falcon-H1
    "output_multiplier": lambda value: (value,),
}
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_LARGEST = 64.0  # |logit| that is tried where there is no soft-cap
_ROUNDINGS = 16  # the model's own logits may differ by as many units in the last place of the largest


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), or without the tanh where there is no soft-cap.

    weight: [V, D], the model's own parameter; bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D], on any device. [..., V] on the head's device: the product is made in the weight's dtype (or
        autocast's), everything after it in float32 (float64 stays)."""
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        made = torch.nn.functional.linear(hidden, self.weight, self.bias)
        made = made if made.dtype == torch.float64 else made.float()
        if self.softcap is None:
            return made if self.scale == 1 else made * self.scale
        return torch.tanh(made * (self.scale / self.softcap)) * self.softcap


class BeforeHead:
    """hidden: what the head was given last, [B, S, D], with its autograd graph; output: what it made of it."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None
        self.output: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        if self._hidden is None:
            raise ConfigError("the model's forward did not call its head; use a model that split_head accepts")
        return self._hidden

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self._hidden = hidden


@contextlib.contextmanager
def hidden_before_head(model: torch.nn.Module) -> Iterator[BeforeHead]:
    """Inside the block, `model(**inputs)` computes logits of one position a row, and `.hidden` is the head's input.

    model: a causal language model that `split_head` accepts, as it is or wrapped (DDP, PEFT, torch.compile). Raises
    ConfigError where it has no head.
    """
    head = head_module(model)
    if head is None:
        raise ConfigError(f"{type(model).__name__} has no output embeddings; a causal language model expected")
    with _given(head, lambda hidden: hidden, lambda hidden: hidden[:, :1]) as found:
        yield found


def head_module(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that turns hidden states into logits, whatever the model is wrapped in; None where there is none.

    Where PEFT trains a copy of the head (modules_to_save), that is the copy.
    """
    inner = _unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    copies, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", None)
    if isinstance(copies, torch.nn.ModuleDict) and active and active[0] in copies:
        return copies[active[0]]
    return head


def logits_of(outputs: Any) -> Tensor:
    """Of what a model's forward gives: a tensor, a mapping or an object that has `logits`, or a tuple that begins with
    them. Raises ConfigError for anything else."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"a forward that gives logits expected (a tensor, something that has `logits`, or a tuple that begins with "
            f"them); it gives {type(outputs).__name__}"
        )
    return found


def split_head(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Head | None:
    """The head of a causal language model; None where it is no plain Linear or its logits are not those of the model.

    inputs: of a tiny batch; the model runs on it two times, without gradients and without dropout. A head that is
    wrapped (LoRA, quantised), a model with an encoder, and logits that nothing known in the config explains give None.
    """
    model, module = _unwrapped(model), head_module(model)
    config = getattr(model, "config", None)
    if type(module) is not torch.nn.Linear or module.weight.is_meta or config is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return None
    with torch.no_grad(), evaluating(model):
        hidden = _hidden(model, inputs)
        if hidden is None or hidden.shape != (*inputs["input_ids"].shape, module.in_features):
            return None
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return _explained(model, module, inputs, hidden, list(_candidates(module, text)))


@contextlib.contextmanager
def _given(
    head: torch.nn.Module, record: Callable[[Tensor], Tensor], hand_on: Callable[[Tensor], Tensor]
) -> Iterator[BeforeHead]:
    """Inside the block the head is given hand_on(record(input)). Its `forward` is replaced, since torch.compile does
    not look again at a module's hooks (skip_nnmodule_hook_guards) but does at its forward."""
    found, inner, own = BeforeHead(), head.forward, head.__dict__.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        found.hidden = record(hidden)
        found.output = inner(hand_on(found.hidden))
        return found.output

    head.forward = forward
    try:
        yield found
    finally:
        if own is None:
            del head.forward
        else:  # accelerate, where devices are mapped, has put its own there
            head.forward = own


def _unwrapped(model: torch.nn.Module) -> Any:
    """Out of torch.compile, and of DDP and its kin, into a model that knows its head; PEFT models do."""
    inner: Any = model
    while True:
        around = "module" if not hasattr(inner, "get_output_embeddings") else "_orig_mod"
        inside = getattr(inner, "_orig_mod", None) or getattr(inner, around, None)
        if not isinstance(inside, torch.nn.Module):
            return inner
        inner = inside


def _candidates(module: torch.nn.Linear, config: Any) -> Iterator[Head]:
    """Heads that the config may mean, all it says first."""
    said = {name: value for name in _FACTORS if (value := getattr(config, name, None))}
    caps = [value for name in _CAPS if (value := getattr(config, name, None))]
    factors = dict.fromkeys([factor for name, value in said.items() for factor in _FACTORS[name](value)] + [1.0])
    for softcap, scale in itertools.product([*caps, None], factors):
        yield Head(module.weight, module.bias, float(scale), None if softcap is None else float(softcap))


def _hidden(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The head's input; None where the model does not run with one position a row behind its head."""
    try:
        with hidden_before_head(model) as found:
            model(**inputs)
        return found.hidden
    except (RuntimeError, ValueError, IndexError, TypeError, ConfigError):
        model(**inputs)  # raises where it is not the missing positions that it stumbles over
        return None


def _explained(
    model: torch.nn.Module, module: torch.nn.Linear, inputs: Mapping[str, Tensor], hidden: Tensor, heads: list[Head]
) -> Head | None:
    """The first of `heads` that gives the model's own logits, made large so that a soft-cap shows."""
    product = torch.nn.functional.linear(hidden.to(module.weight.device, module.weight.dtype), module.weight)
    peak = float(product.abs().max())
    if peak == 0 and len(heads) > 1:  # any scaling would explain it
        return None
    largest = 2 * max((head.softcap / head.scale for head in heads if head.softcap), default=_LARGEST / 2)
    with _given(module, lambda hidden: hidden * (largest / peak if peak else 1.0), lambda hidden: hidden) as found:
        own = logits_of(model(**inputs))
    assert found.output is not None
    bound = _ROUNDINGS * torch.finfo(found.output.dtype).eps
    return next((head for head in heads if _same(head.logits(found.hidden), own, bound)), None)


def _same(made: Tensor, own: Tensor, bound: float) -> bool:
    if made.shape != own.shape:
        return False
    error = (made - own.to(made.device)).abs().max()
    return bool(error <= bound * own.abs().max().to(error.device))  # False for NaN too
