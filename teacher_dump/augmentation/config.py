"""Every setting of `predistill augment`; nothing heavy is imported, the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...store.errors import ConfigError
from ..config import AUTO, DumpConfig

OUTPUT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LEAST = {
    "multiplication_factor": 1, "candidates": 1, "seed": 0, "max_length": 8, "tokens_per_batch": 1, "part_words": 1,
}  # fmt: skip


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _needed(help: str, **more: Any) -> Any:
    return field(metadata={"help": help, **more})


@dataclass
class AugmentConfig:
    """What is rewritten, by which model, how often. Raises ConfigError for values that cannot be."""

    dataset: str = _needed(
        "Hub id, folder or file: SQuAD JSON, or csv, tsv, json, jsonl, parquet (.gz too).", argument=True
    )
    output: str = _needed("File to write, in the format of its name.", argument=True)
    masked_lm: str = _needed("Masked language model that proposes words: a Hub id or a folder.")
    embeddings: str | None = _setting(
        None,
        "Word vectors in GloVe or word2vec text format (.gz too), for words that the model knows only in pieces. "
        "Default: the model's own input embeddings.",
    )
    multiplication_factor: int = _setting(20, "Rewritten rows for each row, beside the row itself.")
    replace_probability: float = _setting(0.4, "Share of words that a rewritten row has others for.")
    candidates: int = _setting(20, "Words that a replacement is drawn from, the likeliest or the nearest.")
    seed: int = _setting(42, "Of which words are replaced, and by which.")
    text_column: str | None = _setting(
        None,
        "Column to rewrite, of text or of lists of words. Default: text, tokens, or context where there are answers.",
    )
    text_pair_column: str | None = _setting(None, "Column of the second text, rewritten too.")
    split: str | None = _setting(None, "Split to rewrite, where the dataset has several.")
    dataset_name: str | None = _setting(None, "Configuration of a Hub dataset, as glue has sst2.")
    dataset_revision: str | None = _setting(None, "Commit, branch or tag of a Hub dataset.")
    max_length: int = _setting(
        128, "What the model sees around a masked word, or what it takes where that is less.", unit="tokens"
    )
    tokens_per_batch: int | None = _setting(
        None,
        "Size of a batch of the model; rows come out the same. Default: 4096 on a CPU, 32768 elsewhere.",
        unit="tokens",
    )  # fmt: skip
    device: str = _setting(AUTO, "Where the model runs: auto, cpu, cuda, cuda:1, mps.")
    overwrite: bool = _setting(False, "Replace an output of other settings.")
    part_words: int = _setting(4000, "Words to a part, which is what a kill can cost.", flag=False)

    def __post_init__(self) -> None:
        for name in ("dataset", "output", "masked_lm"):
            setattr(self, name, str(getattr(self, name)))
            if not getattr(self, name).strip():
                raise ConfigError(f"{_flag(name)} is empty")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{_flag(name)} is a whole number from {least}; got {value!r}")
        if not (isinstance(self.replace_probability, float | int) and 0 < self.replace_probability <= 1):
            raise ConfigError(f"--replace-probability is above 0 and at most 1; got {self.replace_probability!r}")
        if self.text_pair_column is not None and self.text_pair_column == self.text_column:
            raise ConfigError(f"--text-pair-column {self.text_pair_column} is --text-column too; give the second text")
        if self.suffix not in OUTPUT_SUFFIXES or (self.suffix == ".parquet" and self.output.endswith(".gz")):
            raise ConfigError(
                f"OUTPUT {self.output}: a name that ends in one of {', '.join(OUTPUT_SUFFIXES)} expected (.gz too, but "
                "for parquet)"
            )
        if self.path.is_dir():
            raise ConfigError(f"OUTPUT {self.output} is a folder; give the name of a file")
        if self.embeddings is not None and not Path(self.embeddings).expanduser().is_file():
            raise ConfigError(f"--embeddings {self.embeddings}: a file of word vectors expected; there is none")

    @property
    def path(self) -> Path:
        return Path(self.output).expanduser()

    @property
    def suffix(self) -> str:
        """Of OUTPUT, in small letters, without .gz."""
        return Path(self.path.name.lower().removesuffix(".gz")).suffix

    def reading(self) -> DumpConfig:
        """The same rows and the same model, as a dump names them. Raises ConfigError in dump's words."""
        return DumpConfig(
            teacher=self.masked_lm, dataset=self.dataset, task="text-classification", output_dir=str(self.path.parent),
            dataset_name=self.dataset_name, dataset_revision=self.dataset_revision,
            split=[self.split] if self.split else [], device=self.device, teacher_dtype="float32",
        )  # fmt: skip


def _flag(name: str) -> str:
    return name.upper() if name in ("dataset", "output") else "--" + name.replace("_", "-")
