"""A tiny batch through a model with everything looked at: where its hidden states and attentions are made.

A hidden state that `output_hidden_states` returns is some module's output or input, found again by identity, or else by
equality. Without dropout a module may hand on what it was given, so that one tensor has several places, and only one of
them is right in training: looked for among what ran inside the model that collects the hidden states, outputs first,
then the module with most parameters (a block, not the dropout or the norm at its end).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_capture import Call, attending, listening
from .errors import ConfigError

QUERIES_KEYS, EAGER = "queries-keys", "eager"
_ROWS, _TOKENS = 2, 32  # of the batch


class Site(NamedTuple):
    """A tensor's place. call: which call of the module in a forward pass; part: None, or its place among several."""

    module: nn.Module
    call: int
    given: bool  # an input, not an output
    part: int | str | None


class Event(NamedTuple):
    name: str  # of the module
    site: Site
    tensor: Tensor


class Seen(NamedTuple):
    """One forward pass. events: in the order of inputs taken and outputs made; calls: of the attention function."""

    events: list[Event]
    calls: list[Call]
    outputs: Any
    hidden_states: tuple[Tensor, ...]
    inside: int  # events of the model that collects the hidden states


def unwrapped(model: nn.Module) -> nn.Module:
    """Out of torch.compile, DDP and their kin."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "FullyShardedDataParallel",
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def few(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first rows of a batch, and of their tokens some about where the first row's padding is."""
    ids = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    start = 0
    if ids is not None and isinstance(mask, Tensor) and mask.dim() == 2:
        changes = mask[0].bool().diff().nonzero()
        start = int(changes[0]) - _TOKENS // 2 if len(changes) else 0
        start = min(max(start, 0), max(mask.shape[1] - _TOKENS, 0))
    made = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim():
            of_tokens = ids is not None and value.dim() == 2 and value.shape[1] == ids.shape[1]
            value = value[:_ROWS, start : start + _TOKENS] if of_tokens else value[:_ROWS]
        made[name] = value
    return made


def is_transformers(model: nn.Module) -> bool:
    """Is it a model of transformers, as it is or inside something that has its config (PEFT)?"""
    return getattr(model, "config", None) is not None and any(
        isinstance(module, PreTrainedModel) for module in model.modules()
    )


def look(model: nn.Module, inputs: Mapping[str, Any], attention: str | None) -> Seen:
    """Run `model` in evaluation mode, without gradients. Raises ConfigError for an encoder-decoder."""
    events: list[Event] = []
    calls: list[Call] = []
    ends: list[tuple[Any, int]] = []  # hidden_states of each module that returns some, events until then
    asked = _flags(model, inputs, attention)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(_watching(model, events, ends))
        if attention == QUERIES_KEYS:
            stack.enter_context(listening(model, calls.append, probing=True))
        elif attention == EAGER:
            stack.enter_context(attending(model, EAGER))
        outputs = model(**{**asked, **inputs})
    found = field(outputs, "hidden_states")
    states = tuple(found) if isinstance(found, (tuple, list)) else ()
    inside = next((end for one, end in ends if states and one[0] is states[0] and len(one) == len(states)), len(events))
    return Seen(events, calls, outputs, states, inside)


def locate(tensor: Tensor, events: Sequence[Event]) -> Site | None:
    """Where `tensor` is made, or else taken; None where it is neither."""
    same = _same(tensor, events)
    made = [event for event in same if not event.site.given]
    if made:
        return max(reversed(made), key=lambda event: _size(event.site.module)).site
    return max(same, key=lambda event: _size(event.site.module)).site if same else None


def locate_first(tensor: Tensor, after: Site | None, events: Sequence[Event]) -> Site | None:
    """Hidden state 0: what the first block takes, since dropout may come after the embeddings' module. after: of 1."""
    taken = [event for event in _same(tensor, events) if event.site.given]
    block = [event for event in taken if after is not None and event.site.module is after.module]
    if block or taken:
        return max(block or taken, key=lambda event: _size(event.site.module)).site
    return locate(tensor, events)


def _same(tensor: Tensor, events: Sequence[Event]) -> list[Event]:
    same = [event for event in events if event.tensor is tensor]
    return same or [one for one in events if one.tensor.shape == tensor.shape and torch.equal(one.tensor, tensor)]


def field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def parts(value: Any) -> Iterator[tuple[int | str | None, Tensor]]:
    """Tensors in what a module takes or returns, with their place."""
    if isinstance(value, Tensor):
        yield None, value
    elif isinstance(value, Mapping):
        yield from ((name, part) for name, part in value.items() if isinstance(part, Tensor))
    elif isinstance(value, (tuple, list)):
        yield from ((place, part) for place, part in enumerate(value) if isinstance(part, Tensor))


def _flags(model: nn.Module, inputs: Mapping[str, Any], attention: str | None) -> dict[str, bool]:
    """What to ask a transformers model for; nothing of others."""
    if not is_transformers(model):
        return {}
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder; an encoder or a decoder expected")
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    asked = {"output_hidden_states": True, **({"output_attentions": True} if attention == EAGER else {})}
    if "position_ids" in inputs and inputs.get("attention_mask") is None:
        asked["use_cache"] = False  # with a cache, transformers does not look for several documents in a row
    return {name: value for name, value in asked.items() if takes_any or name in parameters}


@contextlib.contextmanager
def _watching(model: nn.Module, events: list[Event], ends: list[tuple[Any, int]]) -> Iterator[None]:
    """Inside the block everything that modules take and return goes to `events`."""
    begun: dict[nn.Module, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def took(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun[module] = begun.get(module, -1) + 1
        for part, tensor in (*parts(args), *parts(kwargs)):
            events.append(Event(names[module], Site(module, begun[module], True, part), tensor))

    def made(module: nn.Module, _: Any, output: Any) -> None:
        for part, tensor in parts(output):
            events.append(Event(names[module], Site(module, begun[module], False, part), tensor))
        states = field(output, "hidden_states")
        if isinstance(states, (tuple, list)) and states:
            ends.append((states, len(events)))

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(took, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(made).remove)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
