"""What of a conversation is learned: against transformers' own assistant mask, and against the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from language_cases import CHATML, CHATML_MARKED, LLAMA_3, THINKING, byte_level, said
from predistill.store import ConfigError, DataError
from predistill.teacher_dump.rows.conversations import Chat, Conversations, PromptMessages
from predistill.teacher_dump.rows.documents import Documents, named, tokenize

CHATS = [
    [said("user", "What is the sky?"), said("assistant", "It is blue.")],
    [
        *(said("system", "Speak."), said("user", "  You?\n"), said("assistant", " I.\n")),
        *(said("user", "No"), said("assistant", "…é")),
    ],
    [said("user", "First"), said("assistant", ""), said("assistant", "the people"), said("user", "Is't a verdict?")],
]


def table(**columns: list[Any]) -> pa.Table:
    return pa.table(columns)


def learned_of(tokenizer: Any, form: Any, rows: pa.Table, max_length: int | None = None) -> list[str]:
    """The text of the learned tokens of each row."""
    found = documents(tokenizer, form, rows, max_length)
    ends = found.lengths.cumsum()[:-1]
    parts = zip(np.split(found.ids, ends), np.split(found.learned, ends), strict=True)
    return [tokenizer.decode(ids[learned], clean_up_tokenization_spaces=False) for ids, learned in parts]


def documents(tokenizer: Any, form: Any, rows: pa.Table, max_length: int | None = None) -> Documents:
    form.check("train", 0, rows)
    return tokenize(tokenizer, form.write(rows, named("train", np.arange(len(rows)))), form.templated, max_length)


def test_marked_templates_give_transformers_mask() -> None:
    tokenizer = byte_level(CHATML_MARKED)
    found = documents(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS))
    expected = tokenizer.apply_chat_template(CHATS, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids.tolist() == [one for row in expected["input_ids"] for one in row]
    assert found.learned.tolist() == [bool(one) for row in expected["assistant_masks"] for one in row]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_templates_without_marks(trim_offsets: bool) -> None:
    tokenizer = byte_level(CHATML, trim_offsets)
    learned = learned_of(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS))
    assert learned == [
        "It is blue.<|im_end|>\n",
        " I.\n<|im_end|>\n…é<|im_end|>\n",
        "<|im_end|>\nthe people<|im_end|>\n",
    ]


def test_a_marked_turn_that_ends_in_a_space_ends_there() -> None:
    """transformers' mask goes on to the end of the row where offsets are trimmed; ours is the marked text."""
    tokenizer = byte_level(CHATML_MARKED.replace("<|im_end|>{% endgen", "{% endgen"), trim_offsets=True)
    chats = [[said("user", "You?"), said("assistant", "Speak. "), said("user", "No")]]
    assert learned_of(tokenizer, Conversations("messages", tokenizer), table(messages=chats)) == ["Speak. "]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_template_that_trims(trim_offsets: bool) -> None:
    tokenizer = byte_level(LLAMA_3, trim_offsets)
    learned = learned_of(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS[:2]))
    assert learned == ["It is blue.<|eot|>", "I.<|eot|>…é<|eot|>"]


def test_a_template_writes_its_own_special_tokens() -> None:
    tokenizer = byte_level(LLAMA_3, bos_token="<|begin|>")
    found = documents(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS[:1]))
    assert found.ids.tolist() == tokenizer.apply_chat_template(CHATS[0], return_dict=False)
    assert (found.ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.eos_token_id not in found.ids


def test_prefixes_must_nest() -> None:
    tokenizer = byte_level(THINKING)
    form = Conversations("messages", tokenizer)
    one_turn, two_turns = table(messages=CHATS[:1]), table(messages=CHATS[:2])
    assert learned_of(tokenizer, form, one_turn) == ["<think>\n\n</think>\n\nIt is blue.<|im_end|>\n"]
    with pytest.raises(ConfigError, match="split train, row 1: the chat template .* otherwise when more follows"):
        documents(tokenizer, form, two_turns)


def test_a_template_that_puts_the_system_elsewhere_is_refused() -> None:
    """Into the last turn of the user, as some do: what comes before is then written otherwise."""
    tokenizer = byte_level(
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: "
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}"
        "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ConfigError, match="row 0: .*endgeneration"):
        documents(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS[1:2]))


def test_prompts_of_messages() -> None:
    tokenizer = byte_level(THINKING)
    rows = table(
        prompt=[CHATS[1][:4], [said("user", "No")]],
        completion=[CHATS[1][4:], [said("assistant", "Speak"), said("user", "Is?"), said("assistant", "It is")]],
    )
    form = PromptMessages(tokenizer)
    learned = learned_of(tokenizer, form, rows.slice(0, 1))
    assert learned == ["<think>\n\n</think>\n\n…é<|im_end|>\n"]
    plain = byte_level(CHATML)
    learned = learned_of(plain, PromptMessages(plain), rows)
    assert learned == [
        "…é<|im_end|>\n",
        "Speak<|im_end|>\n<|im_start|>user\nIs?<|im_end|>\n<|im_start|>assistant\nIt is<|im_end|>\n",
    ]


def test_a_marked_template_learns_the_whole_completion_of_a_prompt() -> None:
    tokenizer = byte_level(CHATML_MARKED)
    rows = table(prompt=[CHATS[1][:4]], completion=[CHATS[1][4:]])
    assert learned_of(tokenizer, PromptMessages(tokenizer), rows) == ["…é<|im_end|>\n"]


def test_keys_that_only_other_rows_have() -> None:
    """Arrow gives every message the same keys; templates ask whether one is there."""
    name = "{% if m.name is defined %}{{ m.name }}: {% endif %}"
    tokenizer = byte_level(CHATML.replace("{{ m['content'] }}", name + "{{ m['content'] }}"))
    chats = [[said("user", "You?"), {**said("assistant", "I."), "name": "Caius"}], CHATS[0]]
    learned = learned_of(tokenizer, Conversations("messages", tokenizer), table(messages=chats))
    assert learned == ["Caius: I.<|im_end|>\n", "It is blue.<|im_end|>\n"]


def test_rows_do_not_depend_on_the_day() -> None:
    tokenizer = byte_level("{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}\n" + CHATML)
    chat = Chat(tokenizer)
    assert chat.render(CHATS[:1], str)[0].startswith("01 Jan 2025 2025\n<|im_start|>user")
    assert "2025-01-01 stands for every day" in chat.notices[0]
    assert chat.settings != Chat(byte_level(CHATML)).settings
    assert not Chat(byte_level(CHATML)).notices


def test_hashes_are_of_what_is_said() -> None:
    """Not of how a template writes it; a prompt and its completion are not one conversation."""
    one, other = byte_level(CHATML), byte_level(LLAMA_3)
    rows = table(messages=CHATS)
    found = documents(one, Conversations("messages", one), rows).hashes
    assert found == documents(other, Conversations("messages", other), rows).hashes
    assert len({found[at : at + 16] for at in range(0, 48, 16)}) == 3
    split = documents(one, PromptMessages(one), table(prompt=[CHATS[0][:1]], completion=[CHATS[0][1:]])).hashes
    assert split != found[:16]


WRONG: dict[str, tuple[list[Any], str]] = {
    "null": ([CHATS[0], None], "row 1: column 'messages' is null"),
    "no messages": ([CHATS[0], []], "row 1: column 'messages' has no messages"),
    "role": ([CHATS[0], [said("user", "a"), said("asistant", "b")]], "row 1: .*a role is one of .*; got 'asistant'"),
    "no role": ([CHATS[0], [{"role": None, "content": "b"}]], "row 1: .*a role is one of .*; got None"),
    "no content": ([[said("user", "a"), {"role": "assistant", "content": None}]], "row 0: .*a content that is null"),
    "no assistant": ([CHATS[0], [said("user", "a")]], "row 1: .*no message of the assistant"),
    "other keys": ([[{"from": "human", "value": "a"}]], "texts role and content, expected; got list<.*--text-column"),
    "parts": ([[{"role": "user", "content": [{"type": "text", "text": "a"}]}]], "texts role and content, expected"),
    "a text": (["a"], "lists of messages, .* expected; got string"),
    "numbers": ([[1, 2]], "lists of messages, .* expected; got list<.*int64"),
    "tools": ([[{**said("assistant", ""), "tool_calls": [{"name": "f"}]}]], "row 0: .*has tool calls.*: drop the row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_conversations_are_named(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        Conversations("messages", byte_level(CHATML)).check("train", 0, table(messages=values))


def test_bad_rows_are_counted_from_the_split() -> None:
    rows = table(messages=[CHATS[0], [said("user", "a")]])
    with pytest.raises(DataError, match="split test, row 31"):
        Conversations("messages", byte_level(CHATML)).check("test", 30, pa.concat_tables([rows, rows]).slice(0, 3))


def test_what_a_template_refuses() -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = byte_level(refuses + CHATML)
    with pytest.raises(DataError, match="split train, row 1: .*it says: no system role"):
        documents(tokenizer, Conversations("messages", tokenizer), table(messages=CHATS))


def test_a_template_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat template.*column of text"):
        Chat(byte_level())
    several = byte_level()
    several.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(ConfigError, match="chat template"):
        Chat(several)
    several.chat_template = {"tool_use": "", "default": CHATML}
    assert Chat(several).template == CHATML
