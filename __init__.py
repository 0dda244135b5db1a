"""Run the teacher once. Train students forever."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AugmentConfig": ".teacher_dump.augmentation.config",
    "augment": ".teacher_dump.augment",
    "DumpConfig": ".teacher_dump.config",
    "dump": ".teacher_dump.dump",
    "plan": ".teacher_dump.dump",
    "TeacherStore": ".store",
    "DistillationConfig": ".student_train.config",
    "DistillationTrainer": ".student_train.trainer",
    "train": ".student_train.train",
    "PredistillError": ".store.errors",
    "ConfigError": ".store.errors",
    "DataError": ".store.errors",
    "StoreError": ".store.errors",
    "StoreIncomplete": ".store.errors",
    "StoreCorrupt": ".store.errors",
    "StoreMismatch": ".store.errors",
    "FormatVersionError": ".store.errors",
    "OutOfSpace": ".store.errors",
}

if TYPE_CHECKING:
    from .store import TeacherStore
    from .store.errors import (
        ConfigError,
        DataError,
        FormatVersionError,
        OutOfSpace,
        PredistillError,
        StoreCorrupt,
        StoreError,
        StoreIncomplete,
        StoreMismatch,
    )
    from .student_train.config import DistillationConfig
    from .student_train.train import train
    from .student_train.trainer import DistillationTrainer
    from .teacher_dump.augment import augment
    from .teacher_dump.augmentation.config import AugmentConfig
    from .teacher_dump.config import DumpConfig
    from .teacher_dump.dump import dump, plan

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataError",
    "DistillationConfig",
    "DistillationTrainer",
    "DumpConfig",
    "FormatVersionError",
    "OutOfSpace",
    "PredistillError",
    "StoreCorrupt",
    "StoreError",
    "StoreIncomplete",
    "StoreMismatch",
    "TeacherStore",
    "__version__",
    "augment",
    "dump",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562), so that `import predistill` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
