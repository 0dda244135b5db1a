"""Which of the formats of TRL's datasets the columns are: text, messages, or prompt and completion."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ...store import ConfigError, DataError
from ..config import DumpConfig
from ..data import SourceData, check_columns
from .conversations import MESSAGES, Conversations, PromptMessages, is_list
from .documents import COMPLETION, PROMPT, TEXT, Format, PlainText, PromptText

_TOOLS = "tools"  # TRL's column of what the assistant may call


def choose_format(config: DumpConfig, tokenizer: Any, source: SourceData) -> tuple[Format, list[str]]:
    """(how rows are written, what to tell of it): by --text-column, else by the columns that all splits have."""
    if config.text_pair_column:
        raise ConfigError(
            f"--text-pair-column {config.text_pair_column}: causal-lm takes one text: leave it away, or name the two "
            "columns prompt and completion"
        )
    if config.text_column:
        check_columns(source, [config.text_column])
        made: Format = _one_column(config.text_column, tokenizer, source)
        return made, made.notices
    there = set.intersection(*(set(rows.column_names) for rows in source.splits.values()))
    choices: tuple[tuple[str, ...], ...] = ((PROMPT, COMPLETION), (MESSAGES,), (TEXT,))
    known = [names for names in choices if there.issuperset(names)]
    if not known:
        raise DataError(
            f"dataset {source.name}: a column text, a column messages, or columns prompt and completion expected; all "
            f"splits have {', '.join(map(repr, sorted(there)))}: choose with --text-column"
        )
    if known[0] == (PROMPT, COMPLETION):
        made = _prompt_completion(tokenizer, source)
    elif known[0] == (MESSAGES,) and not is_list(kind := _type(source, MESSAGES)):
        raise DataError(
            f"dataset {source.name}, column {MESSAGES!r}: lists of messages, each with the texts role and content, "
            f"expected; got {kind}: give --text-column {MESSAGES} if it is to be taken as plain text"
        )
    else:
        made = _one_column(known[0][0], tokenizer, source)
    others = [f"{' and '.join(known[0])} taken; --text-column {name} takes {name} instead" for (name, *_) in known[1:]]
    if made.templated and _TOOLS in there:
        others.append(f"the column {_TOOLS} is not written into the conversations")
    return made, [*made.notices, *others]


def _prompt_completion(tokenizer: Any, source: SourceData) -> Format:
    kinds = [_type(source, name) for name in (PROMPT, COMPLETION)]
    if len({is_list(kind) for kind in kinds}) > 1:
        raise DataError(
            f"dataset {source.name}: columns prompt and completion both of text, or both of lists of messages, "
            f"expected; got {kinds[0]} and {kinds[1]}: make them alike"
        )
    return PromptMessages(tokenizer) if is_list(kinds[0]) else PromptText(tokenizer)


def _one_column(name: str, tokenizer: Any, source: SourceData) -> Format:
    return Conversations(name, tokenizer) if is_list(_type(source, name)) else PlainText(name)


def _type(source: SourceData, name: str) -> pa.DataType:
    return next(iter(source.features.values())).arrow_schema.field(name).type
