"""A teacher whose layers are split over all ranks of a torchrun (--tp-plan): tensor parallelism, by transformers.

Rank 0 dumps as if it were alone. The others know of no rows, shards or stores: they load the teacher when rank 0 does,
and run each forward pass that it runs, with its inputs, up to the head. Between blocks every rank has the hidden states
whole; the head, and embeddings tied to it, are whole on every rank, and rank 0 runs the head chunk by chunk.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ...store.errors import ConfigError, PredistillError
from ...store.head import head_module
from ..config import DumpConfig
from ..tasks import task_class
from .teacher import Teacher

_LOAD, _FORWARD, _DONE = "load", "forward", "done"  # what rank 0 tells the others
_CPU = torch.device("cpu")
_PATIENCE = timedelta(days=30)  # rank 0 may look at rows for hours before the others hear of it
_TOLD = "told"  # counts ranks that failed; the first says why
_groups = itertools.count()


def on_all_ranks(config: DumpConfig, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, on every rank; with --tp-plan rank 0 does it, and the others run forward passes with it.

    Whatever stops one rank stops all: the first to fail raises, the others exit in silence. Raises ConfigError where
    torchrun has not started several ranks.
    """
    if config.tp_plan is None:
        return work()
    with _one_group():
        if dist.get_rank() > 0:
            return _follow(config, task_class(config.task).model_class)
        done = work()
        _tell(_DONE, done)
        return done


class SharedTeacher(Teacher):
    """One rank's part of the teacher. Raises ConfigError where its layers cannot be split evenly."""

    def __init__(self, config: DumpConfig, model_class: str):
        super().__init__(config, model_class)
        ranks, text = dist.get_world_size(), self.config.get_text_config()
        if not getattr(self._skeleton, "tp_plan", None):
            raise ConfigError(
                f"--tp-plan auto: transformers has no plan for {type(self._skeleton).__name__}; give --device-map auto "
                "instead, in one process"
            )
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", ranks)
        if isinstance(heads, int) and heads % ranks:
            raise ConfigError(f"--tp-plan auto: {heads} key heads are not shared evenly by {ranks} ranks; start fewer")

    def load(self) -> torch.nn.Module:
        """On rank 0 a model whose forward passes are run by all ranks."""
        if dist.get_rank() > 0:
            return super().load()
        _tell(_LOAD)
        return _leading(super().load())

    def _spread(self) -> dict[str, Any]:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), tp_plan=self._whole() or "auto")}

    def _whole(self) -> dict[str, str]:
        """Exceptions from transformers' plan, by module: what every rank has whole."""
        head = self._head()
        tied = any(getattr(one, "tie_word_embeddings", False) for one in (self.config, self.config.get_text_config()))
        kept = [] if head is None else [head, *([self._skeleton.get_input_embeddings()] if tied else [])]
        return {name: "replicate" for name, one in self._skeleton.named_modules() if any(one is each for each in kept)}


def _leading(model: Any) -> Any:
    """The same model; the other ranks are told of its forward passes, and of what it is given."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(**given: Any) -> Any:
        _tell(_FORWARD, {name: value.to("meta") if _is_tensor(value) else value for name, value in given.items()})
        for value in filter(_is_tensor, given.values()):
            dist.broadcast(value.contiguous(), 0)
        return inner(**given)

    model.forward = forward
    return model


def _follow(config: DumpConfig, model_class: str) -> dict[str, Any]:
    """Load and run what rank 0 does, until it is done; then what it returns."""
    model: Any = None
    while True:
        word, given = _hear()
        if word == _DONE:
            return given
        if word == _LOAD:
            model = None  # one at a time
            teacher = SharedTeacher(config, model_class)
            model = teacher.load()
            if (head := head_module(model)) is not None:
                head.register_forward_pre_hook(_stop)
        else:
            with torch.inference_mode(), contextlib.suppress(_AtHead):
                model(**{name: _received(value, teacher.device) for name, value in given.items()})


class _AtHead(Exception):
    """What follows is rank 0's."""


def _stop(*_: Any) -> NoReturn:
    raise _AtHead


def _tell(word: str, given: Any = None) -> None:
    dist.broadcast_object_list([word, given], 0, device=_CPU)


def _hear() -> list[Any]:
    heard = [None, None]
    dist.broadcast_object_list(heard, 0, device=_CPU)
    return heard


def _received(outline: Any, device: torch.device) -> Any:
    """outline: a tensor on no device, of which rank 0 has the values; anything else is a value itself."""
    if not _is_tensor(outline):
        return outline
    value = torch.empty_like(outline, device=device, memory_format=torch.contiguous_format)
    dist.broadcast(value, 0)
    return value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def _one_group() -> Iterator[None]:
    """Inside the block the ranks are a process group: tensors of devices go by NCCL, all else by gloo."""
    _check_launch()
    shared, rank, ranks = next(rendezvous("env://"))
    group = f"predistill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_groups)}"
    store = dist.PrefixStore(group, shared)  # which remembers what earlier groups said
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    try:
        yield
    except BaseException as error:
        if not _is_first(store):
            raise SystemExit(1) from error
        if isinstance(error, RuntimeError) and _is_parting(error):
            raise PredistillError("a rank of this teacher is gone; the same command goes on") from error
        raise
    dist.destroy_process_group()


def _is_first(store: dist.Store) -> bool:
    with contextlib.suppress(RuntimeError):
        return store.add(_TOLD, 1) == 1
    return True  # whoever counted is gone


def _check_launch() -> None:
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            "--tp-plan auto splits the teacher over several ranks: torchrun --nproc-per-node 2 -m predistill dump …"
        )
    if gpus and here > gpus:
        raise ConfigError(f"--tp-plan auto: a GPU for each rank expected; torchrun started {here}, and {gpus} are here")


def _is_parting(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)
