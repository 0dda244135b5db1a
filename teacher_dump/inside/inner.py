"""What is inside the teacher, kept beside what its task keeps: which columns, and where they come from.

B rows, S tokens, D width, H heads, K key heads, d head size, N blocks.

    teacher_hidden_states_NN    (S, D)      transformers' own `hidden_states`: 0 the embeddings, N after the last norm
    teacher_attentions_NN       (H, S, S)   probabilities [query, key], 0 where a key is not visible; or the heads' mean
    teacher_attention_scores_NN (H, S, S)   before the softmax: scaled, soft-capped, not masked
    teacher_queries_NN          (S, H, d)   after rotary embedding, as keys; keys and values (S, K, d)
    teacher_pooled              (D,)        the pooler's output
    teacher_module_NAME                     what a module gives, dots written as underscores

Of images S is a number, and a convolutional network's hidden states are (C, h, w).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...store import ConfigError, FieldSpec, manifest
from ...store.activations import Sites
from ...store.head import head_module
from ...store.probe import is_transformers
from ...store.schema import layer_column
from ..config import DumpConfig
from ..tasks import TASKS
from .layers import (
    ALL_LAYERS,
    HEAD_MEAN,
    INNER,
    LAYERED,
    SQUARE,
    attention_source,
    chosen_layers,
    columns_of,
    stored_kinds,
)  # fmt: skip

Place = tuple[str, int | str]  # ("hidden_states", 3), ("module", "blocks.5.mlp"): as Sites names it
POOLED = "teacher_pooled"
STORAGE, DTYPE = "attention_storage", "inner_dtype"  # settings of a plan: as asked for, or as a budget chose
_MODULE = "teacher_module_"
_LAYER = re.compile(rf"teacher_({'|'.join(LAYERED)})_(\d+)")


@dataclass(frozen=True)
class Way:
    """How what is inside is stored. storage: of attentions, one of layers.STORAGES; dtype: one of config.DTYPES."""

    storage: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.storage}, {self.dtype}"


@dataclass(frozen=True)
class Inner:
    """The columns, in order."""

    way: Way
    specs: tuple[FieldSpec, ...]

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """What is recorded of the layers, as Sites.recording takes it."""
        made: dict[str, list[int]] = {}
        for kind, number in map(place_of, self.specs):
            if isinstance(number, int):
                made.setdefault(kind, []).append(number)
        return {kind: tuple(numbers) for kind, numbers in made.items()}

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(number for _, number in map(place_of, self.specs) if isinstance(number, str))

    @property
    def depth(self) -> int | None:
        """Blocks of the teacher; None where no column is of a layer."""
        return next((spec.parameters["layers"] for spec in self.specs if "layers" in spec.parameters), None)


def make_inner(config: DumpConfig, way: Way, sites: Sites, shapes: Mapping[Place, tuple[int | str, ...]]) -> Inner:
    """The columns that `config` asks for, stored in this way. Of images all have one shape, whole.

    shapes: of a row of every pooled output and module. Raises ConfigError for layers that the teacher does not have,
    and for two modules of one column name.
    """
    kinds = stored_kinds(config.fields, way.storage)
    layers = chosen_layers(config.layers or ALL_LAYERS, sites.depth) if set(kinds) & set(LAYERED) else ()
    specs = []
    for kind in kinds:
        numbers = columns_of(kind, layers) if kind in LAYERED else ()
        if kind in LAYERED and not numbers:
            raise ConfigError(f"--layers {config.layers} keeps nothing of {kind}, which begin at layer 1; add one")
        make = _image_spec if TASKS[config.task].of_images else _layer_spec
        specs += [make(kind, number, way, sites) for number in numbers]
        if kind == "pooled":
            specs.append(_spec(POOLED, _flat(shapes["pooled", 0]), way.dtype, {}))
    specs += [
        _spec(module_column(name), shapes["module", name], way.dtype, {"module": name}) for name in config.capture
    ]
    names = [spec.name for spec in specs]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--capture {','.join(config.capture)}: two of them would be the column {clash}; keep one")
    return Inner(way, tuple(specs))


def module_column(name: str) -> str:
    """`blocks.5.mlp` is kept as teacher_module_blocks_5_mlp."""
    return _MODULE + name.replace(".", "_")


def place_of(spec: FieldSpec) -> Place:
    """Where a column comes from; the empty place, where it does not come from inside."""
    if found := _LAYER.fullmatch(spec.name):
        return found[1], int(found[2])
    if spec.name == POOLED:
        return "pooled", 0
    return ("module", spec.parameters["module"]) if spec.name.startswith(_MODULE) else ("", "")


def earlier(config: DumpConfig, folder: Path) -> Inner | None:
    """The columns of the dump that `config` continues, so that a dump that is done needs no teacher; None where it
    continues none, or one of other settings."""
    if not config.keeps_inner or config.overwrite or not (folder / manifest.PLAN).exists():
        return None
    plan = manifest.read_plan(folder)
    asked = {"fields": config.fields, **settings_of(config), "budget": config.budget}
    if config.budget is None:
        asked |= {DTYPE: config.dtype, STORAGE: config.attention_storage}
    if any(plan.settings.get(name) != value for name, value in asked.items()) or not manifest.committed(folder, plan):
        return None
    specs = tuple(spec for spec in plan.fields if spec.role == "teacher" and place_of(spec)[0])
    return Inner(Way(plan.settings[STORAGE], plan.settings[DTYPE]), specs)


def implementation(config: DumpConfig, inner: Inner | None) -> DumpConfig:
    """With eager attention, where attentions are the weights that it returns."""
    if inner is None and config.budget is not None:  # which is yet to choose
        return config
    storage = inner.way.storage if inner else config.attention_storage
    if attention_source(config.fields, storage) != "eager":
        return config
    return replace(config, budget=None, attention_storage=storage, attention="eager")


def settings_of(config: DumpConfig, inner: Inner | None = None) -> dict[str, Any]:
    """What a plan says of it, beside the fields; of a store without any of it, nothing."""
    way = {} if inner is None else {STORAGE: inner.way.storage, DTYPE: inner.way.dtype}
    return {"layers": config.layers or ALL_LAYERS, "capture": list(config.capture), **way}


def find_sites(config: DumpConfig, storage: str, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Sites:
    """Where the teacher's inside is, by a few tokens of a batch. Raises ConfigError for what it lacks."""
    asked, kind = [name for name in INNER if name in config.fields], type(model).__name__
    layered = [name for name in asked if name in LAYERED]
    if layered and not is_transformers(model):
        raise ConfigError(
            f"--fields {layered[0]}: {kind} is no transformers model, whose layers are known; name modules to keep "
            "with --capture"
        )
    sites = Sites.find(model, inputs, attention=attention_source(config.fields, storage))
    for name in asked:
        if name in ("hidden_states", "pooled") and (name, 0) not in sites.shapes:
            raise ConfigError(
                f"--fields {name}: {kind} gives none; leave it away, or name modules to keep with --capture"
            )
    for name in config.capture:
        if name not in sites.names:
            raise ConfigError(f"--capture {name}: {_why_not(name, model, sites.names)}")
        if "top_k_logits" in TASKS[config.task].settings and model.get_submodule(name) is head_module(model):
            raise ConfigError(f"--capture {name}: it gives the logits, which --top-k-logits 0 keeps; leave it away")
    return sites


def _flat(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """(D,) of a convolutional network's (D, 1, 1)."""
    return shape[:1] if set(shape[1:]) == {1} else shape


def _why_not(name: str, model: torch.nn.Module, names: Sequence[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, names, 3, 0.0)) or "none"
    kind = type(model).__name__
    if name in dict(model.named_modules()):
        return (
            f"a module that {kind} runs once a forward pass, and that gives a tensor of real numbers, expected, such "
            f"as {near}"
        )
    return f"the name of a module of {kind} expected, such as {near}"


def _layer_spec(kind: str, number: int, way: Way, sites: Sites) -> FieldSpec:
    """The column of one layer. parameters: layers, N; width, D of its last hidden state; and how attention works."""
    said: dict[str, Any] = {"layers": sites.depth, "width": sites.shapes["hidden_states", sites.depth][-1]}
    shape: tuple[int | str, ...]
    if kind in SQUARE:
        heads = sites.attention[number].heads if number in sites.attention else sites.shapes[kind, number][0]
        shape = (heads, "S", "S")
        if way.storage == HEAD_MEAN:
            shape, said = (1, "S", "S"), {**said, "heads": heads, "mean_over_heads": True}
    else:
        shape = ("S", *sites.shapes[kind, number])
    if kind in (*SQUARE, "queries") and number in sites.attention:
        said["attention"] = sites.attention[number].to_json()
    return _spec(layer_column(kind, number), shape, way.dtype, said)


def _image_spec(kind: str, number: int, way: Way, sites: Sites) -> FieldSpec:
    """A hidden state of images: (T, D) of T patches and special tokens, or (C, h, w). width: D or C of the last."""
    last, shape = sites.whole[sites.depth], sites.whole[number]
    said = {"layers": sites.depth, "width": last[0] if len(last) == 3 else last[-1]}
    return _spec(layer_column(kind, number), shape, way.dtype, said)


def _spec(name: str, shape: tuple[int | str, ...], dtype: str, said: Mapping[str, Any]) -> FieldSpec:
    codec, held = ("int8", "float32") if dtype == "int8" else ("dense", dtype)
    return FieldSpec(name, shape, held, codec, parameters=json.loads(json.dumps(said)))
