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

    Three defaults differ: batches are grouped by length, columns that the model does not take are kept, because the
    losses do, and a trainer that has an eval_dataset evaluates after every epoch. Raises ConfigError for settings that
    distillation cannot follow.
    """

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": f"Order of rows: one of {', '.join(SAMPLING)}."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not take."})

    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate, where there are rows to do it on: no, steps or epoch."}
    )

    def __post_init__(self) -> None:
        self.check_settings()
        if self.train_sampling_strategy not in SAMPLING:
            allowed = ", ".join(SAMPLING)
            raise ConfigError(f"--train-sampling-strategy is one of {allowed}; got {self.train_sampling_strategy!r}")
        least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} or more; got {getattr(self, name)}")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ConfigError(f"--num-train-epochs is more than 0; got {self.num_train_epochs}")
        if self.label_smoothing_factor:
            raise ConfigError("--label-smoothing-factor is not applied by distillation losses; leave it at 0")
        TrainingArguments.__post_init__(self)
