"""Conversations through the tokenizer's chat template, and which of their tokens are the assistant's.

Columns are those of TRL's conversational formats: `messages`, or `prompt` and `completion`, each a list of messages
with `role` and `content`. Tools and arguments for the template are not read.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils.chat_template_utils import render_jinja_template

from ...store import ConfigError, DataError, content_hash
from ...store.identity import digest
from .documents import COMPLETION, PROMPT, Where, Written, check_fast, span_array
from .texts import check_rows

MESSAGES = "messages"
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
TODAY = datetime.date(2025, 1, 1)  # for templates that write the date: rows do not depend on the day of the dump
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

Message = dict[str, Any]


class Chat:
    """A chat template. Raises ConfigError where the tokenizer has none, or is not a fast one."""

    def __init__(self, tokenizer: Any):
        check_fast(tokenizer, "conversations")
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                "messages are written by the tokenizer's chat template, and it has none that is the default: save the "
                "teacher's tokenizer with one, or give a column of text"
            ) from error
        self.template = _CLOCK.sub(lambda found: json.dumps(TODAY.strftime(found[2])), own)
        self.marks_assistant = bool(_GENERATION.search(own))
        self.settings = {"chat_template_sha256": digest(self.template)}
        dated = f"the chat template writes the date into rows; {TODAY} stands for every day"
        self.notices = [dated] if self.template != own else []
        self._special = tokenizer.special_tokens_map

    def render(self, chats: Sequence[list[Message]], where: Where, prompt: bool = False) -> list[str]:
        """The text of each; prompt: with what asks the assistant to speak. Raises DataError for what the template
        refuses."""
        return self._render(chats, where, prompt, False)[0]

    def assistant_spans(self, chats: Sequence[list[Message]], where: Where) -> tuple[list[str], np.ndarray]:
        """(texts, spans int64 [m, 3]) of whole conversations: where {% generation %} stands in the template, else from
        where it asks the assistant to speak to the end of the turn.

        Raises as `render`, and ConfigError where the beginning of a conversation is written otherwise alone.
        """
        texts, marked = self._render(chats, where, False, self.marks_assistant)
        if self.marks_assistant:
            return texts, span_array([(at, *span) for at, spans in enumerate(marked) for span in spans])
        turns = [(at, turn) for at, chat in enumerate(chats) for turn, one in enumerate(chat) if _is_assistant(one)]
        inner = [(at, turn + 1) for at, turn in turns if turn + 1 < len(chats[at])]
        before = self.prefixes(chats, turns, where, True)
        ends = dict(zip(inner, self.prefixes(chats, inner, where, False), strict=True))
        after = [ends.get((at, turn + 1), texts[at]) for at, turn in turns]
        return texts, spans_between(texts, [at for at, _ in turns], before, after, where)

    def prefixes(
        self, chats: Sequence[list[Message]], stops: list[tuple[int, int]], where: Where, prompt: bool
    ) -> list[str]:
        """The text of the first messages of a conversation; stops: (conversation, how many messages)."""
        return self.render([chats[at][:stop] for at, stop in stops], lambda place: where(stops[place][0]), prompt)

    def _render(
        self, chats: Sequence[list[Message]], where: Where, prompt: bool, track: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        for at, chat in enumerate(chats):
            try:
                made: Any = render_jinja_template(
                    [chat], chat_template=self.template, return_assistant_tokens_mask=track,
                    add_generation_prompt=prompt, **self._special,
                )  # fmt: skip
            except Exception as error:  # a template raises what it likes, and jinja and Python for it
                reason = " ".join(f"{error}".split())[:300] or type(error).__name__
                raise DataError(
                    f"{where(at)}: messages that the chat template takes expected; it says: {reason}: mend the row or "
                    "drop it"
                ) from error
            texts += made[0]
            spans += made[1]
        return texts, spans


def spans_between(texts: list[str], owners: list[int], before: list[str], after: list[str], where: Where) -> np.ndarray:
    """int64 [m, 3]: from the end of `before` to the end of `after`, each the beginning of its owner's text.

    Raises ConfigError where it is not.
    """
    spans = []
    for owner, left, right in zip(owners, before, after, strict=True):
        if not (texts[owner].startswith(right) and right.startswith(left)):
            raise ConfigError(
                f"{where(owner)}: the chat template writes the beginning of a conversation otherwise when more follows "
                "it, which hides where the assistant speaks: put {% generation %} … {% endgeneration %} around it in "
                "the tokenizer's chat template, or give a column of text"
            )
        spans.append((owner, len(left), len(right)))
    return span_array(spans)


class Conversations:
    """Whole conversations; what the assistant says is learned. (TRL: conversational language modelling.)"""

    templated, learns_all = True, False

    def __init__(self, column: str, tokenizer: Any):
        self.chat, self.columns = Chat(tokenizer), [column]
        self.settings = {"format": MESSAGES, "text_column": column, **self.chat.settings}
        self.notices = self.chat.notices

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        column = self.columns[0]
        check_messages(split, start, rows, column)
        owners, roles, _ = _messages(rows, column)
        spoken = np.bincount(owners[roles == ASSISTANT], minlength=len(rows))
        wrong = f"column {column!r} has no message of the assistant, and nothing else is learned"
        check_rows(split, start, spoken == 0, wrong, "drop the row")

    def write(self, rows: pa.Table, where: Where) -> Written:
        chats = [_plain(chat) for chat in rows.column(self.columns[0]).to_pylist()]
        texts, spans = self.chat.assistant_spans(chats, where)
        return Written(texts, spans, b"".join(content_hash(_parts(chat)) for chat in chats))


class PromptMessages:
    """Messages that are given and messages that follow; the second are learned. (TRL: conversational
    prompt-completion.)"""

    templated, learns_all = True, False

    def __init__(self, tokenizer: Any):
        self.chat, self.columns = Chat(tokenizer), [PROMPT, COMPLETION]
        self.settings = {"format": "prompt-completion", **self.chat.settings}
        self.notices = self.chat.notices

    def check(self, split: str, start: int, rows: pa.Table) -> None:
        for column in self.columns:
            check_messages(split, start, rows, column)

    def write(self, rows: pa.Table, where: Where) -> Written:
        prompts, completions = ([_plain(chat) for chat in rows.column(name).to_pylist()] for name in self.columns)
        chats = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        texts = self.chat.render(chats, where)
        before = [""] * len(chats)
        for asks in (True, False):  # the assistant to speak next
            chosen = [at for at, one in enumerate(completions) if _is_assistant(one[0]) == asks]
            stops = [(at, len(prompts[at])) for at in chosen]
            for at, text in zip(chosen, self.chat.prefixes(chats, stops, where, asks), strict=True):
                before[at] = text
        spans = spans_between(texts, list(range(len(texts))), before, texts, where)
        said = (
            content_hash([*_parts(prompt), None, *_parts(completion)])
            for prompt, completion in zip(prompts, completions, strict=True)
        )
        return Written(texts, spans, b"".join(said))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def check_messages(split: str, start: int, rows: pa.Table, name: str) -> None:
    """Raises DataError where a column holds no conversations, or a row of it none that can be written.

    start: the first row's number in the split.
    """
    kind = rows.column(name).type
    entry = kind.value_type if is_list(kind) else None
    fields = {field.name: field.type for field in entry} if entry is not None and pa.types.is_struct(entry) else {}
    texts = [fields.get(one, pa.null()) for one in ("role", "content")]
    if not all(pa.types.is_string(one) or pa.types.is_large_string(one) for one in texts):
        raise DataError(
            f"split {split}, column {name!r}: lists of messages, each with the texts role and content, expected; got "
            f"{kind}: choose another --text-column"
        )
    check_rows(split, start, rows.column(name).is_null(), f"column {name!r} is null; messages expected")
    check_rows(split, start, pc.equal(pc.list_value_length(rows.column(name)), 0), f"column {name!r} has no messages")
    owners, roles, messages = _messages(rows, name)
    for at in np.flatnonzero(~np.isin(roles, ROLES))[:1]:
        raise DataError(
            f"split {split}, row {start + owners[at]}: column {name!r}: a role is one of {', '.join(ROLES)}; got "
            f"{roles[at]!r}: mend the row or drop it"
        )
    missing = np.asarray(pc.struct_field(messages, "content").is_null())
    wrong = f"column {name!r} has a content that is null"
    check_rows(split, start, np.bincount(owners[missing], minlength=len(rows)), wrong)
    if "tool_calls" in fields and is_list(fields["tool_calls"]):
        calls = np.asarray(pc.fill_null(pc.list_value_length(pc.struct_field(messages, "tool_calls")), 0)) > 0
        wrong = f"column {name!r} has tool calls, which are not written here"
        check_rows(split, start, np.bincount(owners[calls], minlength=len(rows)), wrong, "drop the row")


def _messages(rows: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray, pa.StructArray]:
    """(row of each message int64 [m], role of each, object [m], the messages) of a column without null lists."""
    column = rows.column(name).combine_chunks()
    lengths = np.asarray(pc.list_value_length(column)).astype(np.int64)
    messages = column.flatten()
    roles = np.array(pc.struct_field(messages, "role").to_pylist(), object)
    return np.repeat(np.arange(len(rows)), lengths), roles, messages


def _plain(chat: list[Message]) -> list[Message]:
    """Without the keys that only other rows have."""
    return [{name: value for name, value in one.items() if value is not None} for one in chat]


def _is_assistant(message: Message) -> bool:
    return bool(message["role"] == ASSISTANT)


def _parts(chat: list[Message]) -> Iterator[str]:
    """What a conversation says, in order, for its hash."""
    for message in chat:
        yield message["role"]
        yield message["content"]
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        yield json.dumps(more, sort_keys=True, default=str) if more else ""
