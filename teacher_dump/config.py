"""Every setting of `predistill dump`; flags are these names in kebab-case.

Nothing heavy is imported: the command line reads this file to print its help.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..store.errors import ConfigError
from .tasks import TASKS

DTYPES = ("float16", "bfloat16", "float32")
TEACHER_DTYPES = ("auto", *DTYPES)
PROBLEM_TYPES = ("auto", "single_label_classification", "multi_label_classification", "regression")
LABEL_ORDERS = ("check", "by-name", "by-id")
AUTO = "auto"
NO_COLUMN = "none"
DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE)
_NAMED = re.compile(r"(?P<split>\w[\w.-]*)=(?P<path>.+)", re.DOTALL)


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _list(default: list[str], help: str, **more: Any) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help, **more})


def _needed(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass
class DumpConfig:
    """What is run over what, and what is kept. Raises ConfigError for values that cannot be."""

    teacher: str = _needed("The fine-tuned model to run: a Hub id or a folder.")
    dataset: str = _needed(
        "Hub id, folder, or file (csv, tsv, json, jsonl, parquet, arrow; .gz too), or several as "
        "train=PATH,validation=PATH. A lone file is train."
    )
    task: str = _needed("What the teacher does.", choices=tuple(TASKS))
    output_dir: str = _needed("Folder of the store; the same command again continues it.")
    dataset_name: str | None = _setting(None, "Configuration of a Hub dataset, as glue has sst2.")
    dataset_revision: str | None = _setting(None, "Commit, branch or tag of a Hub dataset.")
    teacher_revision: str | None = _setting(None, "Commit, branch or tag of a Hub teacher.")
    split: list[str] = _list([], "Splits to dump. Default: all that the dataset has.")
    text_column: str = _setting("text", "Column of the text.")
    text_pair_column: str | None = _setting(None, "Column of the second text, for sentence pairs.")
    label_column: str = _setting(
        AUTO, "Column of the labels; auto takes label or labels where there; none leaves rows unlabelled."
    )
    label_names: list[str] = _list([], "Names of the classes in the teacher's order, where its config lacks them.")
    label_order: str = _setting(
        "check",
        "Where dataset and teacher have the same class names in another order: check refuses, by-name converts the "
        "dataset's labels to the teacher's order, by-id takes them as they are.",
        choices=LABEL_ORDERS,
    )
    problem_type: str = _setting(
        AUTO, "Kind of head; auto asks the teacher's config, then the labels.", choices=PROBLEM_TYPES
    )
    fields: list[str] = _list(["logits"], "Teacher outputs to keep.")
    layers: str | None = _setting(None, "Layers of fields that have layers; logits have none.")
    keep_columns: list[str] = _list([], "Source columns to carry into the store, for queries.")
    dtype: str = _setting("float16", "How teacher outputs are stored.", choices=DTYPES)
    max_length: int | None = _setting(None, "Longer inputs are cut. Default: what the teacher takes.", unit="tokens")
    tokens_per_batch: int | None = _setting(
        None, "Size of a teacher batch, padding included. Default: 4096 on a CPU, 32768 elsewhere.", unit="tokens"
    )
    shard_size: int = _setting(256 * 10**6, "Size that shards are planned for.", unit="bytes")
    device: str = _setting(AUTO, "Where the teacher runs: auto, cpu, cuda, cuda:1, mps.")
    teacher_dtype: str = _setting(
        AUTO, "What the teacher computes in; auto is what its weights are saved in.", choices=TEACHER_DTYPES
    )
    attention: str = _setting(AUTO, "The teacher's attention implementation: auto, eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = _setting(False, "Run Python code that comes with the teacher.")
    dry_run: bool = _setting(False, "Say size and time, measured on a few rows, and write nothing.")
    overwrite: bool = _setting(False, "Empty a store of other settings first.")

    def __post_init__(self) -> None:
        self.shard_size = parse_size(self.shard_size)
        for name in ("teacher", "dataset", "output_dir"):
            setattr(self, name, str(getattr(self, name)))
        self._check_choices()
        self._check_fields()
        self._check_numbers()
        if looks_like_path(self.teacher) and not Path(self.teacher).expanduser().is_dir():
            raise ConfigError(f"--teacher {self.teacher}: a folder with a saved model expected; there is none")
        named_paths(self.dataset)

    def _check_choices(self) -> None:
        allowed = {
            "task": tuple(TASKS), "dtype": DTYPES, "teacher_dtype": TEACHER_DTYPES,
            "problem_type": PROBLEM_TYPES, "label_order": LABEL_ORDERS,
        }  # fmt: skip
        for name, choices in allowed.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{_flag(name)} is one of {', '.join(choices)}; got {value!r}")
        for name in ("teacher", "dataset", "output_dir", "text_column"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{_flag(name)} is empty")
        for name in ("split", "keep_columns", "label_names"):
            values = getattr(self, name)
            if isinstance(values, str) or len(set(values)) < len(values):
                raise ConfigError(f"{_flag(name)} is a list of different names; got {values!r}")

    def _check_fields(self) -> None:
        supported = TASKS[self.task].fields
        unknown = [name for name in self.fields if name not in supported]
        if unknown or not self.fields:
            raise ConfigError(f"--fields {','.join(self.fields)}: {self.task} keeps {', '.join(supported)}")
        if self.layers is not None:
            raise ConfigError(
                f"--layers {self.layers}: {self.task} keeps {', '.join(supported)}, which has no layers; leave it away"
            )

    def _check_numbers(self) -> None:
        for name in ("max_length", "tokens_per_batch", "shard_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{_flag(name)} is a whole number from 1; got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_size(size: int | str) -> int:
    """Bytes in 1048576, "256MB", "20GB" (powers of 1000) or "4GiB" (powers of 1024). Raises ConfigError."""
    found = _SIZE.fullmatch(str(size).strip())
    if not found:
        raise ConfigError(f"a size is written like 256MB, 20GB or 4GiB; got {size!r}")
    unit = (found[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found[1]) * base ** " kmgt".index(unit[:1] or " "))


def looks_like_path(name: str) -> bool:
    """Is this the name of a file or folder, rather than a Hub id (`name` or `owner/name`)?"""
    plain = name.removesuffix(".gz").lower()
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith(("/", ".gz"))
        or name.count("/") > 1
        or "\\" in name
        or plain.endswith(DATA_SUFFIXES)
    )


def named_paths(dataset: str) -> dict[str, Path] | None:
    """{split: path} of `train=PATH,validation=PATH`, {"": path} of one path, None of a Hub id.

    Raises ConfigError where something that looks like a path is not there.
    """
    named = None if Path(dataset).expanduser().exists() else _NAMED.match(dataset)
    if named:
        parts = [_NAMED.fullmatch(part) for part in re.split(r",(?=\w[\w.-]*=)", dataset)]
        found = [(part["split"], Path(part["path"]).expanduser()) for part in parts if part]
        paths = dict(found)
        if len(paths) < len(found):
            raise ConfigError(f"--dataset {dataset}: each split is given once")
    elif looks_like_path(dataset):
        paths = {"": Path(dataset).expanduser()}
    else:
        return None
    for path in paths.values():
        if not path.exists():
            raise ConfigError(f"--dataset {dataset}: {path} is not there")
    return paths
