"""Every setting of `predistill import`; nothing heavy is imported, the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...store.errors import ConfigError
from ..config import AUTO, parse_size

TOP_K, DISTILLKIT, AXOLOTL, ARCEE, VLLM, OPENAI = "top-k", "distillkit", "axolotl", "arcee", "vllm", "openai"
FORMATS = (AUTO, TOP_K, ARCEE, AXOLOTL, DISTILLKIT, VLLM, OPENAI)
LOGPROBS, LOGITS, PROBABILITIES = "logprobs", "logits", "probabilities"
VALUES = (LOGPROBS, LOGITS, PROBABILITIES)
NEXT, OWN = "next", "own"  # the token that an entry speaks of: the one after it, or the one that it stands at
ALIGNMENTS = (NEXT, OWN)
DTYPES = ("float16", "bfloat16", "float32")
UNKNOWN = "unknown"


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _needed(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass
class ImportConfig:
    """What is read, how it is understood, and what is known of it. Raises ConfigError for values that cannot be."""

    source: str = _needed(
        "File (parquet, json, jsonl; .gz of the latter two) or folder of them, or train=PATH,validation=PATH.",
        argument=True,
    )
    output_dir: str = _needed("Folder of the store; the same command again continues it.", argument=True)
    format: str = _setting(
        AUTO,
        "How outputs are written. auto goes by the columns: top-k is lists of ids and values a token, the others are "
        "what those programs write.",
        choices=FORMATS,
    )
    tokens_column: str | None = _setting(None, "Column of token ids. Default: input_ids, else prompt_token_ids.")
    ids_column: str | None = _setting(None, "Column of the kept ids, a list for each token.")
    values_column: str | None = _setting(None, "Column of their values, lists as long.")
    labels_column: str | None = _setting(
        None, "Column of labels: the token itself, or -100 where nothing is learnt. Default: labels, where there."
    )
    values: str | None = _setting(
        None,
        "What the values are, at temperature 1. Of logits it is not known what the entries that are not there weigh: "
        "nothing is taken. Default: logprobs; logits for arcee.",
        choices=VALUES,
    )
    alignment: str | None = _setting(
        None,
        "Whose probabilities stand at a token: next, those of the token after it; own, its own, so that the first has "
        "none. Default: next; own for axolotl and vllm.",
        choices=ALIGNMENTS,
    )
    compression_config: str | None = _setting(
        None, "DistillKit's YAML file. Default: compression_config.yaml beside the files."
    )
    tokenizer: str | None = _setting(
        None, "Tokenizer of the tokens, a folder or Hub id, to be kept in the store. Default: it stays unknown."
    )
    vocabulary: int | None = _setting(
        None, "Entries that the teacher has. Default: those of DistillKit's file, or of the tokenizer.", unit="entries"
    )
    teacher: str | None = _setting(None, "What the teacher is called, as far as is known: said, and not looked up.")
    top_k_logits: int | None = _setting(
        None,
        "Entries to keep of each token, the largest. Default: all that there are, but for the token itself where it "
        "comes beside the largest.",
        unit="entries",
    )
    dtype: str = _setting("float16", "How values are stored.", choices=DTYPES)
    shard_size: int = _setting(256 * 10**6, "Size that shards are planned for.", unit="bytes")
    overwrite: bool = _setting(False, "Empty a store of other settings first.")

    def __post_init__(self) -> None:
        self.shard_size = parse_size(self.shard_size)
        for name in ("source", "output_dir"):
            setattr(self, name, str(getattr(self, name)))
            if not getattr(self, name).strip():
                raise ConfigError(f"{name.upper()} is empty")
        for name, choices in (("format", FORMATS), ("dtype", DTYPES), ("values", (None, *VALUES)),
                              ("alignment", (None, *ALIGNMENTS))):  # fmt: skip
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(str(one) for one in choices if one)
                raise ConfigError(f"{_flag(name)} is one of {known}; got {value!r}")
        for name, least in (("vocabulary", 2), ("top_k_logits", 1), ("shard_size", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{_flag(name)} is a whole number from {least}; got {value!r}")
        if self.vocabulary is not None and self.vocabulary > 2**31:
            raise ConfigError(f"--vocabulary is at most 2147483648; got {self.vocabulary}")
        if (self.ids_column is None) != (self.values_column is None):
            raise ConfigError("--ids-column and --values-column name two columns of the same entries; give both")
        if self.ids_column and self.format not in (AUTO, TOP_K):
            raise ConfigError(f"--format {self.format} names its own columns; leave --ids-column away, or give top-k")
        if self.compression_config and not Path(self.compression_config).expanduser().is_file():
            raise ConfigError(f"--compression-config {self.compression_config}: a YAML file expected; there is none")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
