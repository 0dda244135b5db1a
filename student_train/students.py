"""Where students come from: a Hub id or folder, a config with random weights, or the teacher's own layers.

The teacher's weights may be read (`from-teacher-layers`), tensor by tensor from safetensors; its model is never
made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from ..store.errors import ConfigError
from ..store.identity import weights_sha256
from .settings import BILSTM_CNN, FROM_TEACHER_LAYERS, TrainConfig
from .tasks import Task, task_of
from .tokens import check_vocabulary, is_tokenizer, store_tokenizer, student_tokenizer

_NUMBERED = re.compile(r"^(?P<prefix>.+?)\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass
class Student:
    """A model, its tokenizer (of images: processor), and where both came from. retokenize: its tokens are not the
    store's."""

    model: nn.Module
    tokenizer: Any
    source: str
    retokenize: bool = False


def build_student(config: TrainConfig, store: Any) -> Student:
    """The student that `config` asks for, with the head that the store's teacher has.

    Raises ConfigError or DataError for a student that cannot learn from this store.
    """
    task = task_of(store)
    if reads_words(config):
        from .words.students import word_student

        student = Student(*word_student(config, task), str(config.student or config.student_config), retokenize=True)
    elif config.student_vectors is not None:
        raise ConfigError(f"--student-vectors {config.student_vectors}: for --student {BILSTM_CNN}; leave it away")
    elif config.student is not None and config.student.startswith(FROM_TEACHER_LAYERS):
        layers = parse_layers(config.student)
        folder = teacher_folder(config, store)
        student = Student(from_teacher_layers(folder, layers, task), store_tokenizer(store), config.student)
    elif config.student is not None:
        tokenizer, differs = student_tokenizer(config.student, store)
        student = Student(pretrained(config.student, task), tokenizer, config.student, differs)
    else:
        tokenizer = store_tokenizer(store)
        model = from_config(str(config.student_config), task, tokenizer)
        student = Student(model, tokenizer, str(config.student_config))
    check_vocabulary(student.model, student.tokenizer)
    task.check_student(student.model)
    return student


def reads_words(config: TrainConfig) -> bool:
    """Is the student that `config` asks for one of those that read words, not pieces of them?"""
    place = Path(str(config.student or config.student_config)).expanduser()
    try:
        file = place / "config.json" if place.is_dir() else place
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # refused by those who read it in earnest
        kind = None
    return BILSTM_CNN in (config.student, kind)


def usual_arguments(config: TrainConfig) -> dict[str, Any]:
    """TrainingArguments that suit the student, where nothing else is said: what LSTMs of random weights need is some
    forty times what fine-tuning a transformer does."""
    return {"learning_rate": 2e-3} if reads_words(config) else {}


def auto_class(task: Task) -> Any:
    return getattr(transformers, task.model_class)


# ---- from the Hub, a folder or a config ----


def pretrained(name: str, task: Task) -> nn.Module:
    """Weights of a Hub id or folder. Raises ConfigError or DataError where they have no place in such a model."""
    config = read_config(name)
    task.check_config(name, config)
    for key, value in task.settings.items():
        if key != "num_labels":
            setattr(config, key, value)
    try:
        return auto_class(task).from_pretrained(name, config=config, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"student {name} cannot be a {task.model_class}: {first_line(error)}") from None


def read_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"student {name}: a Hub id or a folder with config.json expected; {first_line(error)}"
        ) from None


def from_config(path: str, task: Task, tokenizer: Any) -> nn.Module:
    """Random weights. A config without vocab_size gets the tokenizer's, and its special tokens; one without image_size
    that of the store's pixels."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        settings = json.loads(file.read_text())
        kind = settings.pop("model_type")
    except FileNotFoundError:
        raise ConfigError(f"--student-config {path}: config.json, or a folder that holds it, expected") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"--student-config {path}: JSON with a model_type expected; {error}") from None
    settings = {**getattr(task, "sizes", {}), **settings}
    if tokenizer is not None and is_tokenizer(tokenizer):
        settings.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name, None) is not None:
                settings.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(kind, **{**settings, **task.settings})
        return auto_class(task).from_config(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--student-config {path}: {first_line(error)}") from None


# ---- from the teacher's layers ----


def parse_layers(text: str) -> list[int]:
    """[1, 3, 5] of "from-teacher-layers:1,3,5": numbers of blocks, the first being 1 (0 is the embeddings)."""
    try:
        layers = [int(part) for part in text.removeprefix(FROM_TEACHER_LAYERS).split(",")]
    except ValueError:
        layers = []
    if not layers or min(layers) < 1:
        raise ConfigError(
            f"--student {text}: numbers of the teacher's blocks expected, the first being 1, as in "
            f"{FROM_TEACHER_LAYERS}1,3,5 (embeddings and head are always copied)"
        )
    return layers


def teacher_folder(config: TrainConfig, store: Any) -> Path:
    """Where config.json and the safetensors of the teacher are: as given, else by the name that the store has.

    A name is no identity, so a folder found by it must hold the weights that the store was made with.
    """
    stored = store.identity.get("teacher", {})
    name = config.teacher or stored.get("name")
    if not name:
        raise ConfigError(f"{store.path} does not say where its teacher is; give --teacher FOLDER")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return from_hub(name)
    wanted = stored.get("weights_sha256")
    if not config.teacher and wanted and weights_sha256(folder) != wanted:
        raise ConfigError(f"folder {name} does not hold the teacher of {store.path}; give --teacher FOLDER")
    return folder


def from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"teacher {name} is neither a folder nor to be had from the Hub ({first_line(error)}); "
            "give --teacher FOLDER to copy layers from"
        ) from None


def from_teacher_layers(folder: Path, layers: Sequence[int], task: Task) -> nn.Module:
    """The teacher's architecture with some of its blocks, their weights, its embeddings and its head."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # the store may say where it is
    except (OSError, ValueError) as error:
        raise ConfigError(f"the teacher in {folder} cannot be read: {first_line(error)}") from None
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        raise ConfigError(f"the teacher in {folder} has no layers to copy ({type(config).__name__}): give --student")
    if max(layers) > depth:
        raise ConfigError(f"the teacher in {folder} has {depth} layers; got layer {max(layers)}")
    settings = config.to_dict()
    for key, value in settings.items():  # settings of each layer, as layer_types
        if isinstance(value, list) and len(value) == depth:
            settings[key] = [value[layer - 1] for layer in layers]
    smaller = type(config).from_dict({**settings, **task.settings})
    smaller.num_hidden_layers = len(layers)
    state = layer_state(folder, layers, depth)
    try:
        with torch.device("meta"):
            kind = type(auto_class(task).from_config(smaller))
    except ValueError as error:
        raise ConfigError(f"the teacher in {folder} cannot be a {task.model_class}: {first_line(error)}") from None
    try:
        return kind.from_pretrained(None, config=smaller, state_dict=state, dtype=torch.float32)
    except RuntimeError as error:
        raise ConfigError(f"the teacher in {folder} is not the store's: {first_line(error)}") from None


def layer_state(folder: Path, layers: Sequence[int], depth: int) -> dict[str, torch.Tensor]:
    """Tensors of the chosen blocks, renumbered from 0, and all that belong to no block, from safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no *.safetensors to copy layers from (pickled weights are not read)")
    opened = [safe_open(file, framework="pt") for file in files]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  not a dict
    prefix = block_prefix(where, depth, folder)
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer - 1, []).append(place)
    state = {}
    for name, file in where.items():
        if not name.startswith(f"{prefix}."):
            state[name] = file.get_tensor(name)
            continue
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        for place in places.get(int(number), ()):
            state[f"{prefix}.{place}.{rest}"] = file.get_tensor(name)
    return state


def block_prefix(names: Mapping[str, Any], depth: int, folder: Path) -> str:
    """What stands before the block number in weight names, as bert.encoder.layer."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            numbers.setdefault(found["prefix"], set()).add(int(found["number"]))
    fitting = [prefix for prefix, found in numbers.items() if found == set(range(depth))]
    if not fitting:
        raise ConfigError(
            f"{folder}: its weights are not numbered by {depth} blocks (shared layers?); give a --student"
        )
    return min(fitting, key=len)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
