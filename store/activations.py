"""A model's hidden states, attentions and modules' outputs, only those that are wanted.

`output_hidden_states` keeps every layer; a hook where one layer's tensor passes keeps that one. Where that is differs
by architecture: it is found once (probe.py), and then recorded (recording.py).

B rows, S tokens, D width, H heads, K key heads, d head size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionSettings
from .attention_capture import Call
from .attention_probe import settings_of
from .errors import ConfigError
from .probe import EAGER, QUERIES_KEYS, Seen, Site, evaluating, few, field, locate, locate_first, look, unwrapped
from .recording import OF_ATTENTION, Key, Places, Record


class Sites:
    """Where a model's inner outputs are. Made by `Sites.find`.

    depth: blocks N; hidden states are 0..N, attentions 0..N-1. A model that is not from transformers has depth 0.
    shapes: of each, without rows and tokens: ("hidden_states", 3): (D,); ("queries", 0): (H, d); ("attentions", 0) and
    ("attention_scores", 0): (H,); ("pooled", 0): (D,); ("module", name): all but the rows, as it was with `inputs`.
    whole: of each hidden state, all but the rows, as it was with `inputs`: (S, D), or (C, h, w) of a feature map.
    attention: settings a layer, with "queries-keys".
    names: modules that run once a forward pass and give a tensor.
    """

    def __init__(self, model: nn.Module, attention: str | None, seen: Seen, inputs: Mapping[str, Any]):
        self._model, self._attention = model, attention
        self._places = Places(model, eager=attention == EAGER)
        self.depth = max(len(seen.hidden_states) - 1, 0)
        self.shapes: dict[Key, tuple[int, ...]] = {}
        self.whole = [tuple(state.shape[1:]) for state in seen.hidden_states]
        self.attention: dict[int, AttentionSettings] = self._places.settings
        self._find_states(seen)
        self._find_modules(seen)
        if attention == QUERIES_KEYS:
            self._find_calls(seen.calls, inputs)
        elif attention == EAGER:
            self._find_attentions(seen, inputs)

    @classmethod
    def find(cls, model: nn.Module, inputs: Mapping[str, Any], *, attention: str | None = None) -> Sites:
        """Run a few rows and tokens of `inputs`, without gradients and dropout; the model stays as it was.

        attention: None; "queries-keys", through transformers' AttentionInterface, whatever implementation the model
        has; "eager", the weights that eager attention returns. Raises ConfigError where the model lacks what is asked.
        """
        model, inputs = unwrapped(model), few(inputs)
        with torch.no_grad():
            return cls(model, attention, look(model, inputs, attention), inputs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(name) for kind, name in self._places.sites if kind == "module")

    def _find_states(self, seen: Seen) -> None:
        events = seen.events[: seen.inside]
        sites = [locate(state, events) for state in seen.hidden_states]
        if sites:
            sites[0] = locate_first(seen.hidden_states[0], sites[1] if self.depth else None, events)
        for layer, (state, site) in enumerate(zip(seen.hidden_states, sites, strict=True)):
            if site is None:
                raise ConfigError(
                    f"hidden state {layer} of {type(self._model).__name__} is no module's input or output, so that it "
                    "cannot be had alone"
                )
            self._add(("hidden_states", layer), site, state.shape[2:] if state.dim() == 3 else state.shape[1:])
        pooled = [event for event in seen.events if event.site.part == "pooler_output" and not event.site.given]
        if pooled:
            made = [event for event in seen.events if event.site.part != "pooler_output"]
            site = locate(pooled[0].tensor, made[: seen.inside]) or pooled[0].site
            self._add(("pooled", 0), site, pooled[0].tensor.shape[1:])

    def _find_modules(self, seen: Seen) -> None:
        made = [event for event in seen.events if event.name and not event.site.given]
        again = {event.name for event in made if event.site.call > 0}
        for event in made:
            key = ("module", event.name)
            if event.name not in again and event.tensor.is_floating_point() and key not in self.shapes:
                self._add(key, event.site, event.tensor.shape[1:])

    def _find_calls(self, calls: Sequence[Call], inputs: Mapping[str, Any]) -> None:
        begun: dict[nn.Module, int] = {}
        for layer, call in zip(self._layers_of(calls), calls, strict=True):
            settings = self.attention[layer] = settings_of(call, inputs, layer)
            begun[call.module] = begun.get(call.module, -1) + 1
            self._places.layers[call.module, begun[call.module]] = layer
            self.shapes["queries", layer] = (settings.heads, settings.head_dim)
            self.shapes["keys", layer] = (settings.key_heads, settings.head_dim)
            self.shapes["values", layer] = (call.values.shape[1], call.values.shape[-1])
            self.shapes["attentions", layer] = self.shapes["attention_scores", layer] = (settings.heads,)

    def _layers_of(self, calls: Sequence[Call]) -> list[int]:
        """One a layer, in order; else each by the number that its module has, where some layers have no attention."""
        if calls and len(calls) == self.depth:
            return list(range(self.depth))
        layers = [getattr(call.module, "layer_idx", None) for call in calls]
        known = [layer for layer in layers if type(layer) is int and 0 <= layer < self.depth]
        if not calls or len(set(known)) != len(calls):
            raise ConfigError(
                f"attention of {type(self._model).__name__} does not come through transformers' AttentionInterface "
                f"once a layer ({len(calls)} calls, {self.depth} layers): use exact attentions (--attention-storage "
                "exact)"
            )
        return known

    def _find_attentions(self, seen: Seen, inputs: Mapping[str, Any]) -> None:
        layers = []
        for layer, weights in enumerate(field(seen.outputs, "attentions") or ()):
            site = None if weights is None else locate(weights, seen.events[: seen.inside])
            if site is not None:
                self._add(("attentions", layer), site, (weights.shape[1],))
                layers.append(layer)
        if not layers:
            raise ConfigError(f"{type(self._model).__name__} returns no attentions, with eager attention either")
        try:
            with evaluating(self._model), self.recording({"attentions": layers}):
                self._model(**inputs)
        except ConfigError:  # they did not come unasked
            self._places.ask = True

    def _add(self, key: Key, site: Site, shape: Sequence[int]) -> None:
        self._places.sites[key], self.shapes[key] = site, tuple(shape)

    @contextlib.contextmanager
    def recording(
        self, wanted: Mapping[str, Sequence[int]], modules: Sequence[str] = ()
    ) -> Iterator[dict[Key, Tensor]]:
        """Inside the block, what is wanted of the model's last forward pass is in the dict, with its graph.

            with sites.recording({"hidden_states": (0, 3), "attentions": (2,)}, modules=("layer3",)) as found:
                model(**inputs)
            found["hidden_states", 3]                                # [B, S, D]

        wanted: layers by kind: hidden_states [B, S, D]; queries, keys, values [B, S, H or K, d], after rotary
        embedding; attentions [B, H, S, S], 0 where a key is not visible; attention_scores [B, H, S, S], not masked;
        pooled, layer 0, [B, D]. With "queries-keys" the last four are of the queries and keys, without dropout, and
        visible keys are told from the model's own `attention_mask` and `position_ids`; with "eager", attentions
        are the model's own. modules: names, found["module", name].
        Nothing else is kept. Raises ConfigError for what there is not, and at the end for what did not come.
        """
        keys: list[Key] = [(kind, layer) for kind, layers in wanted.items() for layer in layers]
        keys += [("module", name) for name in modules]
        for key in keys:
            self._check(key)
        record = Record(self._places, keys)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_uncompiled())
            record.install(stack)
            yield record.found
        missing = [key for key in keys if key not in record.found]
        if missing:
            kind, name = missing[0]
            raise ConfigError(
                f"{kind} {name} of {type(self._model).__name__} did not come: run the model itself, not a part or a "
                "copy of it, as it was when its inner outputs were looked for"
            )

    def _check(self, key: Key) -> None:
        if key in self.shapes:
            return
        kind, name = key
        model = type(self._model).__name__
        if kind == "module":
            raise ConfigError(f"{model} has no module {name!r} that runs once and gives a tensor; {_some(self.names)}")
        if kind in OF_ATTENTION and self._attention != QUERIES_KEYS and not (kind == "attentions" and self._attention):
            how = "" if self._attention is None else ", not of eager attention's weights"
            raise ConfigError(f"{kind} are made of queries and keys{how}: Sites.find(..., attention='queries-keys')")
        has = sorted(int(layer) for one, layer in self.shapes if one == kind)
        there = f"{has[0]} to {has[-1]}" if has else "none"
        raise ConfigError(f"{model} has no {kind} {name}; it has {there}")


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """torch.compile does not look again at a module's hooks, so what it compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"it has {shown or 'none'}{', …' if len(names) > 4 else ''}"
