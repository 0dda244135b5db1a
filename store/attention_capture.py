"""What attention is given, layer by layer: a function registered under one name with transformers' interfaces.

A model set to this name runs the implementation that it had (sdpa, eager, ...) and tells who listens what that was
called with. Both interfaces know the name: a model whose attention is not in AttentionMaskInterface gets no mask at
all, so that padding would be seen. [B, H, S, d] here, as transformers passes queries, keys and values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .errors import ConfigError

NAME = "predistill"
_EAGER = "eager"


class Pattern(NamedTuple):
    """What a mask says of positions alone. window: |query - key| < window; None is all."""

    causal: bool
    window: int | None


@dataclass(frozen=True)
class Call:
    """One call of the attention function.

    queries: [B, H, S, d]; keys, values: [B, K, S, d]. mask: what the implementation takes. weights: [B, H, S, S] where
    eager attention made them. pattern: of the mask, None where it was not told; window: what the mask was asked for.
    """

    module: torch.nn.Module
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Any
    options: Mapping[str, Any]
    weights: Tensor | None
    pattern: Pattern | None
    window: int | None


class _Listener:
    def __init__(self, heard: Callable[[Call], None], probing: bool):
        self.heard, self.probing = heard, probing
        self.masks: dict[int, tuple[Tensor, Pattern | None, int | None]] = {}  # by id of the mask, which is kept alive


_listeners: ContextVar[tuple[_Listener, ...]] = ContextVar("predistill_attention", default=())
_wrapped: dict[int, str] = {}  # id of a config whose attention is NAME now -> what it was


@contextlib.contextmanager
def listening(model: torch.nn.Module, heard: Callable[[Call], None], *, probing: bool = False) -> Iterator[None]:
    """Inside the block, `heard` is told of every attention call that this thread's forward passes make.

    probing: eager attention whatever the model had, with the patterns of masks.
    """
    token = _listeners.set((*_listeners.get(), _Listener(heard, probing)))
    try:
        with attending(model, NAME):
            yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def attending(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Inside the block the model's attention implementation is `name`."""
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config, was in zip(configs, before, strict=True):
            if was != name:
                _wrapped[id(config)] = _EAGER if was is None else was
                config._attn_implementation_internal = name
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config._attn_implementation_internal = was
            if was != NAME:
                _wrapped.pop(id(config), None)


def _configs(model: torch.nn.Module) -> list[Any]:
    """Configs that the modules look their attention up in, each once."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def eager_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that a module's class is in. Raises ConfigError where there is none."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ConfigError(f"{type(module).__name__} has no eager attention function; store its attention as `exact`")


def _implementation(config: Any) -> str:
    probing = any(listener.probing for listener in _listeners.get())
    return _EAGER if probing else _wrapped.get(id(config), "sdpa")


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *given: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    name = _implementation(getattr(module, "config", None))
    function = eager_attention(module) if name == _EAGER else AttentionInterface._global_mapping[name]
    made, weights = function(module, query, key, value, attention_mask, *given, **options)
    for listener in _listeners.get():
        _, pattern, window = listener.masks.get(id(attention_mask), (None, None, None))
        listener.heard(Call(module, query, key, value, attention_mask, options, weights, pattern, window))
    return made, weights


def _mask(*given: Any, **options: Any) -> Any:
    function: Any = AttentionMaskInterface._global_mapping[_implementation(options.get("config"))]
    probing = [listener for listener in _listeners.get() if listener.probing]
    if not probing:
        return function(*given, **options)
    mask = function(*given, **{**options, "allow_is_bidirectional_skip": False})
    visible, window = options.get("mask_function", causal_mask_function), options.get("local_size")
    if isinstance(mask, Tensor):
        for listener in probing:
            listener.masks[id(mask)] = (mask, _pattern(visible, window), window)
    return mask


def _pattern(visible: Any, size: int | None) -> Pattern | None:
    """Told from two queries of a row longer than the window; None where the mask depends on what is in the row.

    visible: bool of (row, head, query, key), transformers' mask_function. size: its window, where it has one; the key
    that far away is visible or not. Raises ConfigError for a mask that is another function of the positions.
    """
    if _holds_tensor(visible):  # several documents, images in the text, ...
        return None
    places = torch.arange(4 + (size or 0))
    queries = places[-3:-1, None]
    row = torch.zeros(1, 1, dtype=torch.long)
    seen = visible(row, row, queries, places[None]).expand(2, len(places))
    windows = (None,) if size is None else (None, size, size + 1)
    for pattern in (Pattern(causal, window) for causal in (True, False) for window in windows):
        distance = queries - places
        made = (distance if pattern.causal else distance.abs()) >= 0
        if pattern.window is not None:
            made = made & (distance.abs() < pattern.window)
        if torch.equal(made, seen):
            return pattern
    raise ConfigError("a model that masks keys other than by a window is not modelled: use exact attentions")


def _holds_tensor(function: Any) -> bool:
    """Whether a mask function looks anything up; one that is no plain function may."""
    if not isinstance(function, FunctionType):
        return True
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    inner = [part for value in held for part in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(part, Tensor) or callable(part) and _holds_tensor(part) for part in inner)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
