"""A teacher that is given as an object: any torch module that takes `input_ids` and `attention_mask` by name, and gives
logits. Its tokenizer is where --teacher says.

B rows, S tokens, C classes, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...store import ConfigError
from ...store.head import logits_of
from ...store.identity import digest, state_sha256
from ...store.probe import evaluating, unwrapped
from ...store.schema import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPES
from ..config import AUTO, DumpConfig
from ..tasks import TASKS
from .teacher import TRANSIENT, Teacher, one_line, quiet_transformers, resolve_device
from .tensor_parallel import SharedTeacher

_SHAPES = {  # of logits; of others each token has some
    "AutoModelForSequenceClassification": "[B, C]", "AutoModelForImageClassification": "[B, C]",
    "AutoModelForSemanticSegmentation": "[B, C, h, w]",
}  # fmt: skip
_OF_LOADING = ("teacher_dtype", "attention", "device_map", "tp_plan", "compile")  # settings of a teacher that is loaded
_PROBED = "a few words to see what a teacher makes of them"


def teacher_of(config: DumpConfig, model_class: str, model: nn.Module | None) -> Teacher:
    """The teacher that is given, else the one that `config` names; of images, where the task is one of them."""
    if TASKS[config.task].of_images:
        from .images import GivenImageTeacher, ImageTeacher

        return ImageTeacher(config, model_class) if model is None else GivenImageTeacher(config, model_class, model)
    if model is not None:
        return GivenTeacher(config, model_class, model)
    return Teacher(config, model_class) if config.tp_plan is None else SharedTeacher(config, model_class)


@contextlib.contextmanager
def lent(config: DumpConfig, model: nn.Module | None) -> Iterator[None]:
    """Inside the block a given model is in evaluation mode; after it, in the modes, on the device and with the config
    that it had. Raises ConfigError where it is no module, or `config` is about loading one."""
    if model is None:
        yield
        return
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: a torch.nn.Module expected; got {type(model).__name__}")
    asked = [name for name in _OF_LOADING if getattr(config, name) not in (AUTO, None, False)]
    if asked:
        flag = "--" + asked[0].replace("_", "-")
        raise ConfigError(f"{flag}: a model that is given runs as it is; make it so before, and leave this away")
    model = unwrapped(model)
    places = {one.device for one in (*model.parameters(), *model.buffers())}
    before = [(holder, name, getattr(holder, name)) for holder, name in _settings(_config_of(model))]
    with evaluating(model):
        try:
            yield
        finally:
            for holder, name, value in before:
                setattr(holder, name, value)
            if len(places) == 1:
                model.to(places.pop())


class GivenTeacher(Teacher):
    """Who a given module is, inside `lent`. Classes, or vocabulary, are told by the logits of a few tokens.

    Raises ConfigError where it does not take what a teacher is given, or gives no logits.
    """

    no_grad = torch.no_grad  # what a module keeps of an inference_mode, it could not train with afterwards
    needs: tuple[str, ...] = (INPUT_IDS, ATTENTION_MASK)  # arguments of its forward

    def __init__(self, config: DumpConfig, model_class: str, model: nn.Module):
        self._place(config)
        self._skeleton = unwrapped(model)
        self._implementation = config.attention
        with quiet_transformers(), one_line(config.teacher):
            self._load_reader()
        self.device = _device_of(self._skeleton) if config.device == AUTO else resolve_device(config.device)
        if config.device != AUTO:
            self._skeleton.to(self.device)
        self.dtype = next((one.dtype for one in self._skeleton.parameters() if one.is_floating_point()), torch.float32)
        self._check_inputs()
        self._logits = self._probe(_SHAPES.get(model_class, "[B, S, C]"))
        self.config = _config_of(self._skeleton) or self._beside_tokenizer()
        self.pad_id = self._pad_id()
        if len(self.config.id2label or ()) != self.num_labels:  # another model's classes
            self.config = PretrainedConfig()

    def load(self) -> nn.Module:
        for holder, name in _settings(_config_of(self._skeleton)):
            setattr(holder, name, self.pad_id if name == "pad_token_id" else False)
        return self._skeleton

    @property
    def num_labels(self) -> int:
        return int(self._logits.shape[-1])

    @property
    def vocabulary(self) -> int:
        return int(self._logits.shape[-1])

    @property
    def attention(self) -> str:
        """Empty where it is the module's own."""
        if self._implementation != AUTO:
            return self._implementation
        return str(getattr(getattr(self._skeleton, "config", None), "_attn_implementation", ""))

    def _who(self) -> dict[str, Any]:
        """A module has no name, and none of its code is looked at but the name of its class."""
        own, attention = _config_of(self._skeleton), self.attention
        return {
            "class": type(self._skeleton).__name__, "state_sha256": state_sha256(self._skeleton.state_dict()),
            **({"config_sha256": digest(_content(own))} if own is not None else {}),
            "dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type,
            **({"attention": attention} if attention else {}),
        }  # fmt: skip

    def _check_inputs(self) -> None:
        taken = inspect.signature(self._skeleton.forward).parameters
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
        lacking = [name for name in self.needs if name not in taken and not takes_any]
        if lacking:
            raise ConfigError(
                f"a model whose forward takes {' and '.join(self.needs)} by name expected; {self._class}.forward "
                f"takes {', '.join(taken) or 'nothing'}: wrap it in a module that takes {lacking[0]}"
            )

    def _probe(self, shape: str) -> Tensor:
        """Logits of two equal rows. Raises ConfigError where there are none, or none of this shape."""
        inputs = self._probe_inputs()
        first = next(iter(inputs.values()))
        try:
            with torch.no_grad():
                logits = logits_of(self._skeleton(**inputs))
        except Exception as error:  # whatever a module raises
            raise ConfigError(f"{self._class} with {', '.join(inputs)} {list(first.shape)}: {error}") from error
        if not self._suits(tuple(logits.shape), tuple(first.shape), shape):
            raise ConfigError(
                f"{self._class}: logits {shape} expected, here of {self._said(first)}; they have "
                f"shape {list(logits.shape)}: give a model that suits --task"
            )
        return logits

    def _probe_inputs(self) -> dict[str, Tensor]:
        """Two equal rows."""
        ids = self.tokenizer(_PROBED)[INPUT_IDS] or [0]
        text = torch.tensor([ids, ids], device=self.device)
        inputs = {INPUT_IDS: text, ATTENTION_MASK: torch.ones_like(text)}
        return {**inputs, TOKEN_TYPES: torch.zeros_like(text)} if TOKEN_TYPES in self.inputs else inputs

    def _suits(self, logits: tuple[int, ...], inputs: tuple[int, ...], shape: str) -> bool:
        return logits[:-1] == inputs[: shape.count(",")]

    def _said(self, first: Tensor) -> str:
        return f"{first.shape[0]} rows of {first.shape[1]} tokens"

    def _beside_tokenizer(self) -> PretrainedConfig:
        """Classes by the config.json that is where the tokenizer is, if there is one."""
        if Path(self.where).is_dir() and not (Path(self.where) / "config.json").exists():
            return PretrainedConfig()
        try:
            with quiet_transformers():
                said = PretrainedConfig.from_pretrained(self.where, **self._given())
        except (OSError, ValueError):  # the Hub has none
            return PretrainedConfig()
        return PretrainedConfig(id2label=said.id2label, problem_type=said.problem_type)

    @property
    def _class(self) -> str:
        return type(self._skeleton).__name__


def _config_of(model: nn.Module) -> PretrainedConfig | None:
    found = getattr(model, "config", None)
    return found if isinstance(found, PretrainedConfig) else None


def _settings(config: PretrainedConfig | None) -> list[tuple[PretrainedConfig, str]]:
    """(holder, name) of what a transformers model is told: its padding, and that nothing will follow its tokens."""
    places = [] if config is None else [(config, "pad_token_id"), (config.get_text_config(), "use_cache")]
    return [(holder, name) for holder, name in places if hasattr(holder, name)]


def _content(config: PretrainedConfig) -> dict[str, Any]:
    """What tells one config from another, whether a dump has set something in it or not."""
    held = copy.deepcopy(config)
    for holder, name in _settings(held):
        setattr(holder, name, None if name == "pad_token_id" else False)
    return {key: value for key, value in held.to_dict().items() if key not in TRANSIENT}


def _device_of(model: nn.Module) -> torch.device:
    return next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
