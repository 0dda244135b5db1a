"""Which of the formats the rows are in, and what reads them: by --format, else by the columns of the first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ...store.errors import ConfigError
from ...store.schema import INPUT_IDS, LABELS
from ..config import AUTO
from . import config as names
from .config import ImportConfig
from .distillkit import (
    CONFIG_FILE,
    EXACT,
    INDICES,
    MOST_MASS,
    PACKED,
    DistillKit,
    Legacy,
    LegacyDistillKit,
    load_compression,
)
from .distillkit import LOGPROBS as COMPRESSED
from .files import Row, Sources, first_row
from .responses import PROMPT_LOGPROBS, VLLM, OpenAI
from .rows import Rules, Said
from .token_texts import TokenTexts
from .topk import PROMPT_IDS, TARGET_MASK, TopKColumns

_COLUMNS = {  # ids and values of the formats that have them in lists
    names.ARCEE: ("token_ids", "top_values"),
    names.AXOLOTL: ("target_token_ids", "target_logprobs"),
}
_KNOWN: dict[str, list[tuple[str, ...]]] = {
    names.DISTILLKIT: [(COMPRESSED, INDICES), (PACKED, EXACT)],
    **{name: [pair] for name, pair in _COLUMNS.items()},
    names.VLLM: [(PROMPT_LOGPROBS,)],
}
_ANSWERS = ("response", "choices", "outputs", "logprobs", "content")  # objects, or lists of them
_COMPLETION = ("tokens", "token_logprobs", "top_logprobs")


class Reader(Protocol):
    """Makes of a row what was said in it. columns: those that it looks at; None: all."""

    @property
    def rules(self) -> Rules: ...

    @property
    def columns(self) -> Sequence[str] | None: ...

    def read(self, row: Row) -> Said:
        """Raises Unfit for a row that does not fit."""


class Format:
    """reader: of the rows. name: one of config.FORMATS; settings: what was resolved, for the plan."""

    def __init__(self, config: ImportConfig, sources: Sources, tokenizer: Any):
        first = first_row(next(iter(sources.splits.values()))[0])
        self.name = _detected(config, first)
        compression = _compression(config, sources) if self.name == names.DISTILLKIT else None
        self.vocabulary = config.vocabulary or (compression.vocabulary if compression else None)
        if self.vocabulary is None and tokenizer is not None:
            self.vocabulary = len(tokenizer)
        self.values = config.values or (names.LOGITS if self.name == names.ARCEE else names.LOGPROBS)
        own = self.name in (names.AXOLOTL, names.VLLM, names.OPENAI)
        self.alignment = config.alignment or (names.OWN if own else names.NEXT)
        _check(config, self.name)
        self.settings: dict[str, Any] = {
            "format": self.name, "values": self.values, "alignment": self.alignment, "vocabulary": self.vocabulary,
            "top_k_logits": config.top_k_logits,
        }  # fmt: skip
        self.reader = self._reader(config, first, compression, tokenizer)

    def _reader(self, config: ImportConfig, first: Row, compression: Any, tokenizer: Any) -> Reader:
        labels = config.labels_column or LABELS
        rules = Rules(self.values, self.vocabulary, config.top_k_logits)
        if self.name == names.DISTILLKIT:
            rules = replace(rules, most_mass=MOST_MASS)
            old = isinstance(compression, Legacy)
            return LegacyDistillKit(compression, labels, rules) if old else DistillKit(compression, labels, rules)
        if self.name == names.VLLM:
            return VLLM(config.tokens_column, labels, rules)
        if self.name == names.OPENAI:
            return OpenAI(config.tokens_column, None if tokenizer is None else TokenTexts(tokenizer), rules)
        tokens = config.tokens_column or next((one for one in (INPUT_IDS, PROMPT_IDS) if one in first), INPUT_IDS)
        ids, values = _COLUMNS.get(self.name) or (str(config.ids_column), str(config.values_column))
        _check_columns([tokens, ids, values], first)
        self.settings |= {"columns": [tokens, ids, values, labels]}
        mask = TARGET_MASK if self.name == names.AXOLOTL else None
        return TopKColumns(tokens, ids, values, labels, self.alignment, rules, mask)


def _detected(config: ImportConfig, first: Row) -> str:
    """Raises ConfigError where no format has these columns."""
    if config.ids_column:
        return names.TOP_K
    if config.format == names.TOP_K:
        raise ConfigError("--format top-k: --ids-column and --values-column expected, its columns of lists")
    if config.format != AUTO:
        return config.format
    for name, choices in _KNOWN.items():
        if any(all(column in first for column in columns) for columns in choices):
            return name
    inside = set().union(*(_keys(first.get(name)) for name in _ANSWERS))
    if inside or all(name in first for name in _COMPLETION):
        return names.VLLM if PROMPT_LOGPROBS in inside else names.OPENAI
    raise ConfigError(
        f"SOURCE: columns of a known format expected; the first row has {', '.join(map(repr, list(first)[:12]))}: name "
        "them with --tokens-column, --ids-column and --values-column, or give --format"
    )


def _keys(value: Any, depth: int = 3) -> set[str]:
    """Names in an answer, and in what it holds."""
    if isinstance(value, list):
        return _keys(value[0], depth) if value else set()
    if not isinstance(value, dict) or not depth:
        return set()
    return set(value).union(*(_keys(one, depth - 1) for one in value.values() if one))


def _check(config: ImportConfig, name: str) -> None:
    """Raises ConfigError for what the format itself settles."""
    if name in (names.DISTILLKIT, names.VLLM, names.OPENAI) and config.alignment is not None:
        raise ConfigError(f"--alignment: {name} has its own; leave it away")
    if name in (names.VLLM, names.OPENAI) and config.values not in (None, names.LOGPROBS):
        raise ConfigError(f"--values {config.values}: {name} tells logprobs; leave it away")
    if config.compression_config and name != names.DISTILLKIT:
        raise ConfigError(f"--compression-config is DistillKit's, and this is {name}; leave it away")


def _check_columns(wanted: Sequence[str], first: Row) -> None:
    missing = next((name for name in wanted if name not in first), None)
    if missing is not None:
        raise ConfigError(
            f"SOURCE: a column {missing!r} expected; the first row has {', '.join(map(repr, list(first)[:12]))}: "
            "choose with --tokens-column, --ids-column and --values-column"
        )


def _compression(config: ImportConfig, sources: Sources) -> Any:
    """Raises ConfigError where there is no such file."""
    given = config.compression_config
    places = [Path(given).expanduser()] if given else [one / CONFIG_FILE for one in _folders(sources.folder)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"SOURCE {config.source}: DistillKit's {CONFIG_FILE} expected beside the files, without which they cannot "
            "be read; there is none: give --compression-config"
        )
    return load_compression(found)


def _folders(folder: Path) -> list[Path]:
    return [folder, folder.parent]
