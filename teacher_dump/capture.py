"""A batch through the teacher, out come its fields."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..store.errors import ConfigError
from .tasks import Samples, Task
from .teachers.teacher import Teacher, check_dtype


def token_batches(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Rows, longest first, in batches of at most `tokens_per_batch` tokens, padding included; at least one row each.

    lengths: int64 [n]. Yields int64 [B]; every row comes once. Longest first, so that memory ends at once or never.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(int(lengths[order[start]]), 1))
        yield order[start : start + size]
        start += size


class Captured:
    """What a batch gave, still on its way from the device."""

    def __init__(self, fields: Mapping[str, torch.Tensor], began: Any, ended: Any):
        self._began, self._ended = began, ended
        self._fields = {name: _start_copy(tensor) for name, tensor in fields.items()}
        self._copied = None
        if isinstance(ended, torch.cuda.Event):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def arrays(self) -> dict[str, np.ndarray]:
        """float32; whole numbers, and columns that are float16 already, as they are. Waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return {
            name: (tensor if _is_stored_so(name, tensor) else tensor.float()).numpy()
            for name, tensor in self._fields.items()
        }

    def seconds(self) -> float:
        """Time that the forward pass took, on the device's own clock."""
        if self._copied is None:
            return float(self._ended - self._began)
        self._copied.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000


class Capture:
    """The teacher with its weights. Raises ConfigError where the device cannot run it."""

    def __init__(self, teacher: Teacher, task: Task):
        self._teacher, self._task = teacher, task
        self.model = teacher.load()
        self.device = _first_device(self.model) or teacher.device
        self.dtype = next((one.dtype for one in self.model.parameters()), torch.float32)
        self.no_grad = teacher.no_grad
        check_dtype(self.dtype, self.device)

    def __call__(self, samples: Samples, rows: np.ndarray, **given: Any) -> Captured:
        """rows: int64 [B], positions in `samples`. `given` goes to the task's forward."""
        inputs = self.inputs(samples, rows)
        began = self._now()
        try:
            with self.no_grad():
                fields = self._task.forward(self.model, inputs, samples, rows, **given)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(inputs) from error
        except RuntimeError as error:
            if "memory" in str(error).lower():
                raise self._out_of_memory(inputs) from error
            raise
        return Captured(fields, began, self._now())

    def inputs(self, samples: Samples, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """What the model is given for these rows, on its device."""
        return {name: self._send(array) for name, array in self._task.collate(samples, rows).items()}

    def running(self, task: Task) -> Capture:
        """The same model, running another task of it."""
        made = copy.copy(self)
        made._task = task
        return made

    def _send(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _out_of_memory(self, inputs: Mapping[str, torch.Tensor]) -> ConfigError:
        rows, width = next(iter(inputs.values())).shape[:2]
        if next(iter(inputs.values())).dim() == 4:
            return ConfigError(
                f"{self.device} is out of memory at a batch of {rows} images: free some and run the same command "
                f"again, or start over with --batch-size {max(rows // 2, 1)} --overwrite"
            )
        advice = f"--tokens-per-batch {max(rows * width // 2, 1)} --overwrite" if rows > 1 else "a smaller --max-length"
        return ConfigError(
            f"{self.device} is out of memory at a batch of {rows} rows of {width} tokens: free some and run the same "
            f"command again, or start over with {advice}"
        )


def _first_device(model: torch.nn.Module) -> torch.device | None:
    """Where the inputs of a model that is spread over devices go; None where it is not spread."""
    places = list(getattr(model, "hf_device_map", {}).values())
    return torch.device("cpu" if places[0] == "disk" else places[0]) if places else None


def _is_stored_so(name: str, tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or (tensor.dtype == torch.float16 and name.startswith("teacher_"))


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
