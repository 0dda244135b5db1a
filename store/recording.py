"""One forward pass with hooks on what is wanted, and nothing else kept.

B rows, S tokens, H heads, d head size.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionSettings, attention_probabilities, attention_scores
from .attention_capture import Call, attending, listening
from .attention_probe import visible_of
from .errors import ConfigError
from .probe import EAGER, Site, parts

Key = tuple[str, int | str]
OF_ATTENTION = ("queries", "keys", "values", "attentions", "attention_scores")


@dataclass
class Places:
    """What a probe found in `model`.

    sites: of tensors that a module takes or makes; the others are of attention. layers: of attention, by module and its
    call; settings: by layer. eager: attentions are weights that eager attention returns, ask: if it is asked to.
    """

    model: nn.Module
    eager: bool
    ask: bool = False
    sites: dict[Key, Site] = field(default_factory=dict)
    layers: dict[tuple[nn.Module, int], int] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)


class Record:
    """What one block records. Only inside the model's own forward, in the thread that entered the block."""

    def __init__(self, places: Places, keys: Sequence[Key]):
        self.found: dict[Key, Tensor] = {}
        self._places, self._keys = places, keys
        self._layers = {layer for kind, layer in keys if kind in OF_ATTENTION}
        self._thread, self._open, self._grad = threading.get_ident(), False, False
        self._begun: dict[Any, int] = {}  # calls so far of each hook, and of each attention module
        self._calls: dict[int, Call] = {}
        self._inputs: dict[str, Any] = {}
        self._raw: dict[Key, Tensor] = {}

    def install(self, stack: contextlib.ExitStack) -> None:
        model, sites = self._places.model, self._places.sites
        stack.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True).remove)
        places: dict[tuple[nn.Module, bool], list[Key]] = {}
        for key in self._keys:
            if key in sites:
                site = sites[key]
                places.setdefault((site.module, site.given), []).append(key)
        for (module, given), keys in places.items():
            stack.callback(self._hook(module, given, keys).remove)
        if any(key not in sites for key in self._keys):
            stack.enter_context(listening(model, self._heard))
        elif self._places.eager and self._layers:
            stack.enter_context(attending(model, EAGER))
        stack.callback(model.register_forward_hook(self._end, always_call=True).remove)

    def _hook(self, module: nn.Module, given: bool, keys: Sequence[Key]) -> Any:
        def passed(_: nn.Module, *values: Any) -> None:
            if not self._listens():
                return
            call = self._begun[module, given] = self._begun.get((module, given), -1) + 1
            held = dict(entry for value in (values if given else values[1:]) for entry in parts(value))
            for key in keys:
                site = self._places.sites[key]
                if site.call == call and site.part in held:
                    tensor = self._with_graph(held[site.part])
                    self._raw[key] = tensor.clone() if key[0] == "module" else tensor  # ReLU(inplace=True) may follow

        if given:
            return module.register_forward_pre_hook(passed, with_kwargs=True)
        return module.register_forward_hook(passed)

    def _listens(self) -> bool:
        return self._open and threading.get_ident() == self._thread

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        self._begun, self._calls, self._raw = {}, {}, {}
        self._open, self._grad = True, torch.is_grad_enabled()
        self._inputs = _inputs(model, args, kwargs)
        return (args, {**kwargs, "output_attentions": True}) if self._places.ask and self._layers else None

    def _heard(self, call: Call) -> None:
        if not self._listens():
            return
        count = self._begun[call.module] = self._begun.get(call.module, -1) + 1
        layer = self._places.layers.get((call.module, count))
        if layer in self._layers:
            self._with_graph(call.queries)
            self._calls[layer] = replace(call, weights=None)  # [B, H, S, S] that nobody asks for

    def _with_graph(self, tensor: Tensor) -> Tensor:
        if self._grad and not torch.is_grad_enabled():
            raise ConfigError(
                "inner outputs of a checkpointed block have no gradients with use_reentrant: give "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return tensor

    def _end(self, model: nn.Module, _: Any, outputs: Any) -> None:
        """Everything that is computed is computed here: a block that is checkpointed must do in its recomputation what
        it did the first time."""
        if not self._listens():
            return
        self._open = False
        if outputs is None:  # the forward pass raised
            return
        self.found.clear()
        self.found.update(self._raw)
        seen: dict[Any, Tensor] = {}
        for kind, layer in self._keys:
            if (kind, layer) not in self._places.sites and layer in self._calls:
                self.found[kind, layer] = self._made(kind, int(layer), seen)
        self._calls, self._raw, self._inputs = {}, {}, {}

    def _made(self, kind: str, layer: int, seen: dict[Any, Tensor]) -> Tensor:
        call, settings = self._calls[layer], self._places.settings[layer]
        if kind in ("queries", "keys", "values"):
            return getattr(call, kind).transpose(1, 2)
        if ("scores", layer) not in seen:
            queries, keys = call.queries.transpose(1, 2), call.keys.transpose(1, 2)
            seen["scores", layer] = attention_scores(queries, keys, settings)
        if kind == "attention_scores":
            return seen["scores", layer]
        pattern = (settings.causal, settings.window, id(call.mask), call.queries.device)
        if pattern not in seen:
            seen[pattern] = visible_of(self._inputs, call, settings, told=True)
        return attention_probabilities(seen["scores", layer], seen[pattern], call.options.get("s_aux"))


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was called with, by name."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    return {**bound, **kwargs}
