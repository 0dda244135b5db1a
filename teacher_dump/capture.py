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
        devices = {tensor.device for tensor in fields.values()}
        self._copied = [now(device) for device in devices if device.type == "cuda"]

    def arrays(self) -> dict[str, np.ndarray]:
        """float32; whole numbers, and columns that are float16 already, as they are. Waits for the device."""
        for copied in self._copied:
            copied.synchronize()
        return {
            name: (tensor if _is_stored_so(name, tensor) else tensor.float()).numpy()
            for name, tensor in self._fields.items()
        }

    def seconds(self) -> float:
        """Time that the forward pass took, on the device's own clock."""
        if isinstance(self._ended, float):
            return float(self._ended - self._began)
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000


class Capture:
    """The teacher with its weights. Raises ConfigError where the device cannot run it."""

    def __init__(self, teacher: Teacher, task: Task):
        self._teacher, self._task = teacher, task
        self.model = teacher.load()
        spread = devices_of(self.model)
        self.device = spread[0] if spread else teacher.device  # of its inputs
        self._last = spread[-1] if spread else teacher.device  # whose clock tells how long a batch took
        self.dtype = next((one.dtype for one in self.model.parameters()), torch.float32)
        self.no_grad = teacher.no_grad
        check_dtype(self.dtype, self.device)

    def __call__(self, samples: Samples, rows: np.ndarray, **given: Any) -> Captured:
        """rows: int64 [B], positions in `samples`. `given` goes to the task's forward."""
        inputs = self.inputs(samples, rows)
        began = now(self._last)
        try:
            with self.no_grad():
                fields = self._task.forward(self.model, inputs, samples, rows, **given)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(inputs) from error
        except RuntimeError as error:
            if "memory" in str(error).lower():
                raise self._out_of_memory(inputs) from error
            raise
        return Captured(fields, began, now(self._last))

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


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Devices that a model runs on which accelerate has spread, in its own order; none where it is not spread.

    What lies in memory or on disk beside devices is brought to one of them when it is its turn.
    """
    places = list(dict.fromkeys(getattr(model, "hf_device_map", {}).values()))
    devices = [torch.device(place) for place in places if place not in ("cpu", "disk")]
    return devices or [torch.device("cpu")] * bool(places)


def now(device: torch.device) -> Any:
    """A moment: an event in what the device has been given to do, seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _is_stored_so(name: str, tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or (tensor.dtype == torch.float16 and name.startswith("teacher_"))


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach().cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)
