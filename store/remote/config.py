"""Settings of `predistill push` and `pull`. Nothing heavy is imported: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

LICENCES = ("license", "teacher_license", "dataset_license")
_JOBS = "Files on their way at once."


def _argument(help: str) -> Any:
    return field(metadata={"help": help, "argument": True})


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class PushConfig:
    """Which store goes where, under which licences. Raises ConfigError."""

    store: str = _argument("Folder of a store.")
    destination: str = _argument("hf://datasets/USER/NAME, s3://BUCKET/PATH, any other fsspec URL, or a folder.")
    license: str | None = _setting(
        None, "Licence of the store, as the Hub writes it: apache-2.0, cc-by-4.0, other, unknown."
    )
    teacher_license: str | None = _setting(None, "Licence of the teacher: it holds for what it said.")
    dataset_license: str | None = _setting(None, "Licence of the dataset: its rows are in the store.")
    private: bool = _setting(False, "Make a Hub repository that is not there yet a private one.")
    overwrite: bool = _setting(False, "Replace another store that is at the destination.")
    verify: bool = _setting(True, "Hold the store against its checksums before, and what arrived after.")
    jobs: int = _setting(8, _JOBS)

    def __post_init__(self) -> None:
        _check(self, ("store", "destination"))
        for name in LICENCES:
            value = getattr(self, name)
            if value is not None and not (value.strip() and value.isprintable()):
                raise ConfigError(f"--{name.replace('_', '-')} is one line, as in apache-2.0; got {value!r}")


@dataclass(frozen=True)
class PullConfig:
    """What is taken from where. Raises ConfigError."""

    source: str = _argument("hf://datasets/USER/NAME, s3://BUCKET/PATH, any other fsspec URL, or a folder.")
    output_dir: str = _argument("Folder for the store: new, empty, or one that the same pull began.")
    split: list[str] = field(default_factory=list, metadata={"help": "Only these splits."})
    fields: list[str] = field(
        default_factory=list,
        metadata={"help": "Of the teacher's columns, only these; inputs, labels and summaries always come along."},
    )
    where: str | None = _setting(None, "Only shards with a row for which this SQL condition on samples is true.")
    revision: str | None = _setting(None, "Commit, branch or tag of a Hub repository. Default: main, as it is now.")
    jobs: int = _setting(8, _JOBS)

    def __post_init__(self) -> None:
        _check(self, ("source", "output_dir"))
        if self.where is not None and not self.where.strip():
            raise ConfigError("--where is empty; a condition on samples expected, as teacher_confidence < 0.9")


def _check(config: Any, paths: tuple[str, ...]) -> None:
    for name in paths:
        if not str(getattr(config, name)).strip():
            raise ConfigError(f"{name.upper()} is empty")
    if type(config.jobs) is not int or not 1 <= config.jobs <= 256:
        raise ConfigError(f"--jobs is a whole number from 1 to 256; got {config.jobs!r}")
