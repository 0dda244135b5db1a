"""Settings of `predistill merge`, `drop` and `export`. Nothing heavy is imported: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

DUPLICATES = ("refuse", "keep")
FORMATS = ("parquet", "webdataset", "safetensors")


def _needed(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass(frozen=True)
class MergeConfig:
    """Which stores become one, and where. Raises ConfigError."""

    stores: list[str] = _needed("Stores, the first of which is followed where they may differ.", argument=True)
    output_dir: str = _needed("Folder of the store that is made.")
    duplicates: str = field(
        default="refuse",
        metadata={
            "help": "Rows of one split that two stores say the same of, at different places: refuse, or keep both.",
            "choices": DUPLICATES,
        },
    )

    def __post_init__(self) -> None:
        if len(self.stores) < 2:
            raise ConfigError(f"two stores or more are merged; got {len(self.stores)}")
        for store in self.stores:
            _check_path("STORE", store)
        _check_path("--output-dir", self.output_dir)
        _check_choice("--duplicates", self.duplicates, DUPLICATES)


@dataclass(frozen=True)
class DropConfig:
    """Which rows go. Raises ConfigError."""

    store: str = _needed("The store.", argument=True)
    where: str = _needed("SQL condition on samples; rows for which it is true go.")
    yes: bool = field(default=False, metadata={"help": "Take them out for good. Without it they are only counted."})

    def __post_init__(self) -> None:
        _check_path("STORE", self.store)
        if not self.where.strip():
            raise ConfigError("--where is empty; a condition on samples expected, as source_index = 12")


@dataclass(frozen=True)
class ExportConfig:
    """Which store becomes files of which format. Raises ConfigError."""

    store: str = _needed("The store.", argument=True)
    output: str = _needed("Folder to write into.", argument=True)
    format: str = _needed("What to write: a file of it for each shard.", choices=FORMATS)
    raw: bool = field(
        default=False, metadata={"help": "Columns as they are stored: bfloat16 as bits, int8 as values and scales."}
    )

    def __post_init__(self) -> None:
        _check_path("STORE", self.store)
        _check_path("OUTPUT", self.output)
        _check_choice("--format", self.format, FORMATS)


def _check_path(name: str, value: str) -> None:
    if not str(value).strip():
        raise ConfigError(f"{name} is empty")
    if "://" in str(value):
        raise ConfigError(f"{name} is elsewhere; a folder expected: predistill pull it first")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}; got {value!r}")
