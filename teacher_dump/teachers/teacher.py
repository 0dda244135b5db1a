"""Who the teacher is: config, tokenizer, hashes. Everything but its weights, which load when they are needed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from transformers.utils import logging

from ...store.errors import ConfigError, PredistillError
from ...store.head import head_module
from ...store.identity import digest, tokenizer_sha256, weights_sha256
from ..config import AUTO, DumpConfig

TRANSIENT = ("_name_or_path", "_commit_hash", "transformers_version", "_attn_implementation", "attn_implementation")
_UNLIMITED = 10**6  # tokenizers that know no limit say 10**30
_DEFAULT_LENGTH = 512  # tokens, where neither tokenizer nor model has a limit
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")

HEADS = (
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification", "AutoModelForSemanticSegmentation",
)  # fmt: skip


class Teacher:
    """A teacher by its config and tokenizer; the skeleton of its model has no weights.

    Raises ConfigError where there is no such model, or it cannot do the task.
    """

    no_grad: Any = torch.inference_mode  # what it runs in
    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers", "pyarrow")  # whose versions the store names

    def __init__(self, config: DumpConfig, model_class: str):
        self._place(config)
        self.device = resolve_device(config.device)
        self.dtype = AUTO if config.teacher_dtype == AUTO else getattr(torch, config.teacher_dtype)
        self._model_class = getattr(transformers, model_class)
        self._device_map, self._compile = _checked_map(config.device_map), config.compile
        self._attention = {} if config.attention == AUTO else {"attn_implementation": config.attention}
        with quiet_transformers(), one_line(config.teacher):
            self.config = transformers.AutoConfig.from_pretrained(self.where, **self._given())
            check_head(self.config, self._model_class, config)
            self._load_reader()
            self._skeleton = self._make_skeleton()
        self.pad_id = self._pad_id()
        check_dtype(self.dtype, self.device)

    def load(self) -> torch.nn.Module:
        """The model with its weights, on its device, ready to be run. Raises ConfigError where weights are missing."""
        with quiet_transformers(), one_line(self.where):
            spread = self._spread()
            model, loading = self._model_class.from_pretrained(
                self.where, dtype=self.dtype, output_loading_info=True, **spread, **self._attention, **self._given()
            )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ConfigError(
                f"--teacher {self.where}: its weights lack {', '.join(missing[:3])}, which would be random: a model "
                "that was fine-tuned for the task expected"
            )
        model.config.pad_token_id = self.pad_id
        model.config.get_text_config().use_cache = False  # keys and values of tokens that nothing will follow
        model = model.eval().requires_grad_(False)
        model = hold_head(model) if spread else model.to(self.device)
        if self._compile:
            model.base_model.compile()  # what follows it, a head or a classifier, is run in chunks or is small
        return model

    @property
    def num_labels(self) -> int:
        return int(self.config.num_labels)

    @property
    def vocabulary(self) -> int:
        """Logits of a language model: the rows of its head, which may be more than the tokenizer has ids."""
        head = self._head()
        return int(head.weight.shape[0] if hasattr(head, "weight") else self.config.get_text_config().vocab_size)

    @property
    def attention(self) -> str:
        return str(self._skeleton.config._attn_implementation)

    @property
    def parameters(self) -> int:
        """Parameters that every token passes through: embedding tables are looked up, not multiplied, but for heads."""
        tables = {id(m.weight) for m in self._skeleton.modules() if isinstance(m, torch.nn.Embedding)}
        tables -= {id(getattr(self._head(), "weight", None))}
        return max(sum(one.numel() for one in self._skeleton.parameters() if id(one) not in tables), 1)

    @property
    def inputs(self) -> set[str]:
        """Names that the model's forward takes."""
        return set(inspect.signature(self._skeleton.forward).parameters)

    def max_length(self, asked: int | None) -> int:
        """Tokens a row may have: what was asked for, else what tokenizer and model take. Raises ConfigError."""
        positions = self._positions()
        if asked is not None:
            if positions is not None and asked > positions:
                raise ConfigError(f"--max-length {asked}: the teacher takes at most {positions} tokens")
            least = self.tokenizer.num_special_tokens_to_add(pair=True)
            if asked <= least:
                raise ConfigError(f"--max-length {asked}: {least} special tokens leave no room for text")
            return asked
        limits = [limit for limit in (self.tokenizer.model_max_length, positions) if limit and limit < _UNLIMITED]
        return int(min(limits, default=_DEFAULT_LENGTH))

    def identity(self) -> dict[str, Any]:
        """What the store says of the teacher, of what reads its inputs, and what else decides its outputs."""
        return {
            "teacher": self._who(),
            **self._reader(),
            "versions": {name: importlib.metadata.version(name) for name in self.packages},
        }

    def _who(self) -> dict[str, Any]:
        commit = getattr(self.config, "_commit_hash", None)
        local = Path(self.where).is_dir()
        weights = {"weights_sha256": weights_sha256(self.where)} if local else {"commit": commit}
        content = {key: value for key, value in self.config.to_dict().items() if key not in TRANSIENT}
        return {
            "name": self._name, **weights, "config_sha256": digest(content), "class": type(self._skeleton).__name__,
            "dtype": _dtype_name(self.dtype), "attention": self.attention, "device": self.device.type,
            **({"compiled": True} if self._compile else {}),
        }  # fmt: skip

    def save_reader(self, folder: Path) -> dict[str, Path]:
        """What reads its inputs, saved in `folder`, by the name of the store's folder."""
        return {"tokenizer": self.save_tokenizer(folder / "tokenizer")}

    def save_tokenizer(self, folder: Path) -> Path:
        """The tokenizer as it came, without the truncation of its last call."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(folder)
        return folder

    def _spread(self) -> dict[str, Any]:
        """How `from_pretrained` puts it on several devices; nothing where it runs on one."""
        return {} if self._device_map is None else {"device_map": self._device_map}

    def _load_reader(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.where, **self._given())

    def _reader(self) -> dict[str, Any]:
        """Its part of the identity."""
        return {"tokenizer": {"name": self._name, "sha256": tokenizer_sha256(self.tokenizer)}}

    def _place(self, config: DumpConfig) -> None:
        """Where the folder is, or at the Hub."""
        folder = Path(config.teacher).expanduser()
        self.where = str(folder) if folder.is_dir() else config.teacher
        self._shared = {"trust_remote_code": config.trust_remote_code, "revision": config.teacher_revision}

    @property
    def _name(self) -> str:
        return Path(self.where).resolve().name if Path(self.where).is_dir() else self.where

    def _head(self) -> Any:
        """What makes logits of hidden states; None where the model does not tell."""
        return getattr(self._skeleton, "get_output_embeddings", lambda: None)()

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self._shared.items() if value is not None}

    def _make_skeleton(self) -> Any:
        remote = {"trust_remote_code": True} if self._shared["trust_remote_code"] else {}
        with torch.device("meta"):
            return self._model_class.from_config(self.config, **self._attention, **remote)

    def _pad_id(self) -> int:
        """The id that padding gets: the tokenizer's, else the model's, else the end token."""
        own = getattr(self.config, "pad_token_id", None)  # which not every config has
        known = (self.tokenizer.pad_token_id, own, self.tokenizer.eos_token_id, 0)
        return int(next(one for one in known if one is not None))

    def _positions(self) -> int | None:
        """Longest input by the position table; RoBERTa and its kin start counting after the padding id."""
        for name, module in self._skeleton.named_modules():
            if isinstance(module, torch.nn.Embedding) and name.endswith(_POSITION_TABLES):
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return getattr(self.config, "max_position_embeddings", None)


def resolve_device(asked: str) -> torch.device:
    """Under torchrun, auto gives each rank its own. Raises ConfigError for a device that is not here."""
    if asked == AUTO:
        rank = os.environ.get("LOCAL_RANK")
        own = "cuda" if rank is None else f"cuda:{int(rank) % max(torch.cuda.device_count(), 1)}"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {asked} cannot be used here ({reason}); try auto or cpu") from error
    return device


def check_head(saved: Any, model_class: Any, config: DumpConfig) -> None:
    """Raises ConfigError where the weights were saved with the head of another task: heads of one shape would load."""
    if model_class.__name__ not in HEADS:  # others find no weights for theirs
        return
    heads = {name: _heads(getattr(transformers, name)) for name in HEADS}
    own = heads[model_class.__name__]
    for name in saved.architectures or ():
        if name not in own and any(name in others for others in heads.values()):
            raise ConfigError(
                f"--teacher {config.teacher} is a {name}; --task {config.task} needs one that {model_class.__name__} "
                "loads with its head: give its own task, or another teacher"
            )


def _heads(auto: Any) -> set[str]:
    """Names of the models that an Auto class loads."""
    found = auto._model_mapping._model_mapping.values()
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}


def _checked_map(device_map: str | None) -> str | None:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_map is not None and ranks > 1:
        raise ConfigError(
            f"--device-map {device_map} spreads the teacher of one process over all devices, and torchrun started "
            f"{ranks} processes here: start one, each with its own CUDA_VISIBLE_DEVICES, or give --tp-plan auto instead"
        )
    return device_map


def hold_head(model: Any) -> Any:
    """The same model; a head that accelerate has put aside, in memory or on disk, is brought to its device for good,
    where it runs chunk by chunk after the others."""
    head: Any = head_module(model)
    if head is None or not any(one.is_meta for one in head.parameters()):
        return model
    device = head._hf_hook.execution_device
    with align_module_device(head):
        weights = {name: one.detach() for name, one in head.named_parameters()}
    remove_hook_from_module(head)
    for name, weight in weights.items():
        setattr(head, name, torch.nn.Parameter(weight, requires_grad=False))
    add_hook_to_module(head, AlignDevicesHook(device))
    return model


def check_dtype(dtype: Any, device: torch.device) -> None:
    """Raises ConfigError where the device cannot compute in `dtype`; "auto" is seen when the teacher first runs."""
    if dtype in (AUTO, torch.float32):
        return
    try:
        square = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.layer_norm(torch.nn.functional.gelu(square @ square), (2,))
    except RuntimeError as error:
        raise _cannot(dtype, device) from error
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if emulated and dtype == torch.bfloat16:
        raise _cannot(dtype, device)


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """A line where a CPU only imitates the teacher's dtype."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    mkldnn = torch.ops.mkldnn
    native = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    if native():
        return None
    return (
        f"this CPU has no {_dtype_name(dtype)} instructions, so the teacher runs many times slower than with "
        "--teacher-dtype float32"
    )


def _cannot(dtype: torch.dtype, device: torch.device) -> ConfigError:
    name = _dtype_name(dtype)
    return ConfigError(f"--teacher-dtype {name}: {device} cannot compute in it; use --teacher-dtype float32")


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no log lines of `transformers` while it loads."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_line(teacher: str) -> Iterator[None]:
    try:
        yield
    except PredistillError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise many kinds
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"--teacher {teacher} is Python code of its own: read it, then let it run with --trust-remote-code"
            ) from error
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(
                f"--teacher {teacher}: a model with a head for this --task expected; transformers has none for its "
                "architecture: give another teacher"
            ) from error
        raise ConfigError(f"--teacher {teacher} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
