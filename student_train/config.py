"""DistillationConfig: TrainingArguments with the settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..store.errors import ConfigError
from .settings import DistillationSettings

SAMPLING = ("group_by_length", "random", "sequential")


@dataclass
class DistillationConfig(DistillationSettings, TrainingArguments):
    """Every field of transformers.TrainingArguments, and those of DistillationSettings.

    Two defaults differ: batches are grouped by length, and columns that the model does not take are kept,
    because the losses do. Raises ConfigError for settings that distillation cannot follow.
    """

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": f"Order of rows: one of {', '.join(SAMPLING)}."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not take."})

    def __post_init__(self) -> None:
        self.check_settings()
        if self.train_sampling_strategy not in SAMPLING:
            allowed = ", ".join(SAMPLING)
            raise ConfigError(f"--train-sampling-strategy is one of {allowed}; got {self.train_sampling_strategy!r}")
        if self.label_smoothing_factor:
            raise ConfigError("--label-smoothing-factor is not applied by distillation losses; leave it at 0")
        TrainingArguments.__post_init__(self)
