"""Settings of `predistill verify --teacher`; nothing heavy is imported, the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...store.errors import ConfigError
from ..config import AUTO, looks_like_path

_LEAST = {"sample": 1, "seed": 0}


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class RecheckConfig:
    """Who is asked again, and of how many rows. Raises ConfigError for values that cannot be."""

    teacher: str | None = _setting(
        None, "Run this teacher, a Hub id or a folder, over some stored rows and compare what it says. Default: none."
    )
    sample: int = _setting(200, "Rows to run again, drawn from all.", unit="rows")
    seed: int = _setting(0, "Of which rows are drawn.")
    teacher_revision: str | None = _setting(None, "Commit, branch or tag of a Hub teacher.")
    member: str | None = _setting(
        None,
        "Which teacher of an ensemble store it is: a name, or a number from 1. Default: the one that has its weights.",
    )
    device: str = _setting(AUTO, "Where the teacher runs: auto, cpu, cuda, cuda:1, mps.")
    device_map: str | None = _setting(None, "Spread the teacher over all devices, as predistill dump does.")
    tp_plan: str | None = _setting(None, "auto: split it over the ranks of a torchrun, as predistill dump does.")
    trust_remote_code: bool = _setting(False, "Run Python code that comes with the teacher.")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"--{name} is a whole number from {least}; got {value!r}")
        if self.teacher is None:
            given = next((one.name for one in fields(self) if getattr(self, one.name) != one.default), None)
            if given:
                raise ConfigError(f"--{given.replace('_', '-')} is about a teacher to run; give --teacher too")
            return
        self.teacher = str(self.teacher)
        if not self.teacher.strip():
            raise ConfigError("--teacher is empty")
        if looks_like_path(self.teacher) and not Path(self.teacher).expanduser().is_dir():
            raise ConfigError(f"--teacher {self.teacher}: a folder with a saved model expected; there is none")
