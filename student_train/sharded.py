"""Students that FSDP or DeepSpeed cut apart over ranks: what of ours needs a weight whole, and what cannot be.

The Trainer cuts and saves. Ours are the projections (inside/projections.py), which are no part of a saved student, and
the look at a student from which its layers are found (inside/rehearsal.py), before it is cut.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..store.errors import ConfigError

WHOLE = "FULL_STATE_DICT"  # the state_dict_type in which FSDP saves what from_pretrained loads


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def is_cut(model: nn.Module) -> bool:
    """Are its weights in parts, of which this rank has one?"""
    if any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def check_installed(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError where TrainingArguments ask for DeepSpeed and it is not there."""
    if arguments.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--deepspeed: DeepSpeed is not installed; pip install deepspeed, or use --fsdp, torch's own")


def check_ranks(args: TrainingArguments) -> None:
    """Raises ConfigError where FSDP is asked for and there is one process."""
    if args.fsdp and args.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise ConfigError("--fsdp is for several ranks: start torchrun --nproc-per-node N -m predistill train …")


def check_plugins(fsdp: Any, deepspeed: Any, *, projections: bool) -> None:
    """Raises ConfigError for a setting of accelerate's plugins, either of which may be None, that would save no student
    or train no projections."""
    third = deepspeed is not None and deepspeed.zero_stage == 3
    if projections and (third or (fsdp is not None and fsdp.fsdp_version == 1)):
        raise ConfigError(
            "the projections of this loss, learnt beside the student, cannot be trained under ZeRO stage 3 or FSDP "
            "version 1: use ZeRO stage 2, or --fsdp without a version"
        )
    if third and not deepspeed.zero3_save_16bit_model:
        raise ConfigError(
            "--deepspeed with ZeRO stage 3 would save no student: under zero_optimization, set "
            "stage3_gather_16bit_weights_on_model_save to true"
        )


def check_whole(student: nn.Module) -> None:
    """Raises ConfigError where a loss would look into a student that was loaded in parts."""
    if any(weight.is_meta for weight in student.parameters()) or is_cut(student):
        raise ConfigError(
            "the loss looks at the student's layers, which this rank does not have: ZeRO stage 3 and "
            "cpu_ram_efficient_loading load a student in parts; use ZeRO stage 2, or --fsdp without that setting"
        )


def spare_embeddings(fsdp: Any, student: Any) -> None:
    """Of the blocks that FSDP2 cuts on their own, leave out those around the input embeddings (BERT's, ViT's).

    accelerate cuts the input embeddings on their own besides, and cutting twice raises a TypeError (accelerate 1.15).
    """
    if fsdp is None or fsdp.fsdp_version != 2 or fsdp.transformer_cls_names_to_wrap is not None:
        return
    names = list(getattr(student, "_no_split_modules", None) or ())
    inner = student.get_input_embeddings() if hasattr(student, "get_input_embeddings") else None
    around = {
        type(module).__name__ for module in student.modules()
        if inner is not None and module is not inner and any(one is inner for one in module.modules())
    }  # fmt: skip
    if around.intersection(names):
        fsdp.transformer_cls_names_to_wrap = [name for name in names if name not in around]


def gathered(weight: Tensor) -> Tensor:
    """The whole weight, on the CPU; of one in parts, all ranks ask together."""
    weight = weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu().contiguous()


@torch.no_grad()
def fill(weight: Tensor, value: Tensor) -> None:
    """Give a weight, or this rank's part of it, its value; all ranks do."""
    if isinstance(weight, DTensor):
        value = distribute_tensor(value.to(weight.device, weight.dtype), weight.device_mesh, weight.placements)
    weight.copy_(value)


def cut_again(model: nn.Module) -> None:
    """FSDP2 leaves a model's own weights whole after a forward pass without a backward; in parts they can be filled."""
    if isinstance(model, FSDPModule):
        FSDPModule.reshard(model)


@contextlib.contextmanager
def saved_whole(fsdp: Any) -> Iterator[None]:
    """Inside the block FSDP saves a student that loads, whatever its checkpoints are made of."""
    kept = None if fsdp is None else fsdp.state_dict_type
    if fsdp is not None and WHOLE not in str(kept):
        fsdp.set_state_dict_type(WHOLE)
    try:
        yield
    finally:
        if fsdp is not None and fsdp.state_dict_type != kept:
            fsdp.set_state_dict_type(kept)
