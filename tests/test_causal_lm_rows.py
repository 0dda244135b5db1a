"""Rows of a language model: tokens, labels and positions, against rules written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_cases import (
    CHATML,
    CHATML_MARKED,
    LINES,
    byte_level,
    llama,
    own_cache,  # noqa: F401  a fixture
    prepared,
    rows_of,
    said,
    saved,
    sentence_piece,
    settings,
    task_of,
    write,
)
from predistill.store import ConfigError, DataError, content_hash
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

TEXTS = [{"text": text} for text in LINES]
CHATS = [
    [said("user", "What is the sky?"), said("assistant", "It is blue.")],
    [
        *(said("system", "Speak."), said("user", "You?"), said("assistant", "I.")),
        *(said("user", "No"), said("assistant", "é")),
    ],
]
PROMPTS = [
    {"prompt": "What is the sky?", "completion": " It is blue."},
    {"prompt": "", "completion": "Speak, speak."},
    {"prompt": "You are all resolved", "completion": " rather to die than to famish?<|endoftext|>"},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher"), llama(), byte_level(CHATML))


def look(teacher: Path, rows: list[dict[str, Any]], folder: Path, **more: Any) -> Any:
    return prepared(settings(teacher, write(folder / "rows.jsonl", rows), folder / "store", **more))


# texts


def test_texts_end_with_the_end_token(teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    samples = look(teacher, [*TEXTS, {"text": "to the people<|endoftext|>"}], tmp_path)
    expected = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in LINES]
    expected.append(tokenizer("to the people")["input_ids"] + [tokenizer.eos_token_id])
    assert rows_of(samples, "input_ids") == rows_of(samples, "labels") == expected
    assert samples.content_hash[0].tobytes() == content_hash([LINES[0]])
    assert samples.notes == {"truncated": 0}


@pytest.mark.parametrize("ends", [False, True])
def test_the_tokenizer_s_own_special_tokens(ends: bool, tmp_path: Path) -> None:
    tokenizer = sentence_piece(ends)
    folder = saved(tmp_path / "teacher", llama(200), tokenizer)
    for row, text in zip(rows_of(look(folder, TEXTS, tmp_path), "input_ids"), LINES, strict=True):
        assert row[0] == tokenizer.bos_token_id
        assert row.count(tokenizer.eos_token_id) == 1 and row[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = byte_level(eos_token=None)
    folder = saved(tmp_path / "teacher", llama(), tokenizer)
    assert rows_of(look(folder, TEXTS, tmp_path), "input_ids") == tokenizer(list(LINES))["input_ids"]


@pytest.mark.parametrize("ends", [False, True])
def test_rows_that_are_cut_do_not_end(ends: bool, tmp_path: Path) -> None:
    """A row is the beginning of its document: no end token where the document goes on."""
    tokenizer = sentence_piece(ends)
    folder = saved(tmp_path / "teacher", llama(200), tokenizer)
    whole = rows_of(look(folder, TEXTS, tmp_path), "input_ids")
    size = len(whole[0])
    samples = look(folder, TEXTS, tmp_path, max_length=size)
    assert rows_of(samples, "input_ids") == [row[:size] for row in whole]
    assert samples.notes == {"truncated": sum(len(row) > size for row in whole)}


def test_long_texts_are_taken_in_several_pieces(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = look(teacher, TEXTS * 3, tmp_path)
    monkeypatch.setattr("predistill.teacher_dump.rows.texts.CHUNK_BYTES", 100)
    found = look(teacher, TEXTS * 3, tmp_path)
    assert found.values["input_ids"].tolist() == expected.values["input_ids"].tolist()
    assert found.content_hash.tolist() == expected.content_hash.tolist()


# prompts and conversations


def test_completions_are_learned(teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    samples = look(teacher, PROMPTS, tmp_path, positions="completion")
    for at, row in enumerate(PROMPTS):
        ids, labels = rows_of(samples, "input_ids")[at], np.array(rows_of(samples, "labels")[at])
        completion = row["completion"].removesuffix("<|endoftext|>") + "<|endoftext|>"
        assert ids == tokenizer(row["prompt"] + completion)["input_ids"]
        assert tokenizer.decode(labels[labels >= 0]) == completion
        assert rows_of(samples, "teacher_positions")[at] == np.flatnonzero(labels[1:] >= 0).tolist()
    assert samples.lengths["P"].tolist() == [len(row) for row in rows_of(samples, "teacher_positions")]


@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_around_a_prompt(ends: bool, tmp_path: Path) -> None:
    tokenizer = sentence_piece(ends)
    samples = look(saved(tmp_path / "teacher", llama(200), tokenizer), PROMPTS[:2], tmp_path)
    for row, labels in zip(PROMPTS, rows_of(samples, "labels"), strict=False):
        learned = [one for one in labels if one >= 0]
        assert labels[0] == -100 and learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]).strip() == row["completion"].strip()


def test_a_token_across_the_boundary_belongs_to_the_prompt(tmp_path: Path) -> None:
    """The model, asked with the prompt alone, would never come to it."""
    tokenizer = byte_level()
    word = max((one for one in tokenizer.get_vocab() if one.isascii() and one.isalpha()), key=len)
    folder = saved(tmp_path / "teacher", llama(), tokenizer)
    samples = look(folder, [{"prompt": word[:2], "completion": f"{word[2:]} to the people"}], tmp_path)
    [labels] = rows_of(samples, "labels")
    assert tokenizer.decode([one for one in labels if one >= 0]) == " to the people<|endoftext|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_conversations_learn_what_the_assistant_says(template: str, tmp_path: Path) -> None:
    tokenizer = byte_level(template)
    folder = saved(tmp_path / "teacher", llama(), tokenizer)
    samples = look(folder, [{"messages": chat} for chat in CHATS], tmp_path, max_length=40)
    whole = tokenizer.apply_chat_template(CHATS, return_dict=False)
    assert rows_of(samples, "input_ids") == [row[:40] for row in whole]
    assert samples.notes == {"truncated": sum(len(row) > 40 for row in whole)}
    [first, _] = rows_of(samples, "labels")
    assert tokenizer.decode([one for one in first if one >= 0]).strip() == "It is blue.<|im_end|>"


def test_prompts_may_be_messages(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for labels, text in zip(rows_of(look(teacher, rows, tmp_path), "labels"), ("It is blue.", "é"), strict=True):
        assert tokenizer.decode([one for one in labels if one >= 0]) == f"{text}<|im_end|>\n"


def test_which_columns_are_taken(teacher: Path, tmp_path: Path) -> None:
    row = {**PROMPTS[0], "messages": CHATS[0], "text": "Speak.", "other": "to the people", "talk": CHATS[1]}
    data = write(tmp_path / "rows.jsonl", [row])

    def columns(**more: Any) -> list[str]:
        return task_of(settings(teacher, data, tmp_path, **more))[0].columns

    assert columns() == ["prompt", "completion"]
    for name in ("text", "messages", "other", "talk"):
        assert columns(text_column=name) == [name]
    notices = task_of(settings(teacher, data, tmp_path))[0].notices
    assert notices == [
        "prompt and completion taken; --text-column messages takes messages instead",
        "prompt and completion taken; --text-column text takes text instead",
    ]
    with pytest.raises(DataError, match="no column 'nothing'"):
        columns(text_column="nothing")
    with pytest.raises(ConfigError, match="--text-pair-column other: causal-lm takes one text"):
        columns(text_pair_column="other")
    nothing = write(tmp_path / "others.jsonl", [{"other": "to the people"}])
    with pytest.raises(DataError, match="a column text, a column messages, .* all splits have 'other'"):
        task_of(settings(teacher, nothing, tmp_path))


def test_settings_tell_what_changes_content(teacher: Path, tmp_path: Path) -> None:
    texts, chats = write(tmp_path / "a.jsonl", TEXTS), write(tmp_path / "b.jsonl", [{"messages": CHATS[0]}])
    task, _ = task_of(settings(teacher, texts, tmp_path, max_length=20, packing=True, top_k_logits=3))
    assert task.settings == {
        "format": "text", "text_column": "text", "max_length": 20, "packing": True, "positions": "all",
        "fields": ["logits"], "dtype": "float32", "top_k_logits": 3, "top_p": None, "temperatures": [],
        "sampled_logits": None, "sample_temperature": 1.0,
    }  # fmt: skip
    other = saved(tmp_path / "teacher", llama(), byte_level(CHATML_MARKED))
    hashes = {task_of(settings(one, chats, tmp_path))[0].settings["chat_template_sha256"] for one in (teacher, other)}
    assert len(hashes) == 2


# rows that cannot be used


BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "null": ([{"text": "a b"}, {"text": None}], {}, "split train, row 1: column 'text' is null"),
    "empty": ([{"text": "a b"}, {"text": ""}], {}, "split train, row 1: column 'text' is empty"),
    "numbers": ([{"text": 1}], {}, "column 'text': text expected; got int64"),
    "no completion": ([{"prompt": "a", "completion": ""}], {}, "row 0: column 'completion' is empty"),
    "no prompt": ([PROMPTS[0], {"prompt": None, "completion": "a"}], {}, "row 1: column 'prompt' is null"),
    "long prompt": (
        [PROMPTS[0], {"prompt": LINES[1], "completion": "a"}], {"max_length": 12},
        "row 1: something to learn expected in its first 12 tokens, of which all are prompt: give a longer --max-len",
    ),
    "late assistant": (
        [{"messages": CHATS[0]}, {"messages": [said("user", " ".join(LINES)), said("assistant", "a")]}],
        {"max_length": 40}, "row 1: something to learn expected in its first 40 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_found_before_the_teacher_runs(name: str, teacher: Path, tmp_path: Path) -> None:
    rows, more, message = BAD[name]
    task, table = task_of(settings(teacher, write(tmp_path / "rows.jsonl", rows), tmp_path, **more))
    with pytest.raises(DataError, match=message):
        task.check("train", 0, table)


def test_a_lone_token_teaches_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", llama(), byte_level(eos_token=None))
    for more in ({}, {"packing": True}):
        with pytest.raises(DataError, match="split train, row 5: a token to learn that another comes before expected"):
            look(folder, [*TEXTS, {"text": "a"}], tmp_path, **more)


def test_rows_are_named_by_their_place_in_the_split(teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [PROMPTS[0], {"prompt": LINES[1], "completion": "a"}])
    task, table = task_of(settings(teacher, data, tmp_path, max_length=12))
    with pytest.raises(DataError, match="split test, row 71: "):
        task.check("test", 70, table)
    with pytest.raises(DataError, match="split test, row 9: "):
        task.prepare("test", np.array([4, 9]), table)


def test_lengths_and_ids_that_the_teacher_cannot_take(tmp_path: Path) -> None:
    data, tokenizer = write(tmp_path / "rows.jsonl", TEXTS), byte_level()
    folder = saved(tmp_path / "teacher", llama(), tokenizer)
    with pytest.raises(ConfigError, match="--max-length 65: the teacher takes at most 64"):
        task_of(settings(folder, data, tmp_path, max_length=65))
    with pytest.raises(ConfigError, match="--max-length 1: at least 2 expected"):
        task_of(settings(folder, data, tmp_path, max_length=1))
    endless = saved(tmp_path / "endless", llama(max_position_embeddings=2**17), tokenizer)
    with pytest.raises(ConfigError, match="--packing fills rows of --max-length tokens, and the teacher takes 131072"):
        task_of(settings(endless, data, tmp_path, packing=True))
    small = saved(tmp_path / "small", llama(200), tokenizer)
    with pytest.raises(ConfigError, match="token ids below 200, as many as the teacher has, expected; .* makes 3"):
        prepared(settings(small, data, tmp_path))


def test_a_teacher_without_position_ids_cannot_pack(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 416,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    folder = saved(tmp_path / "teacher", MambaForCausalLM(MambaConfig(**shape)), byte_level())
    with pytest.raises(ConfigError, match="--packing: a teacher that takes position ids, .* leave --packing away"):
        task_of(settings(folder, write(tmp_path / "rows.jsonl", TEXTS), tmp_path, packing=True))


# packing


def test_packed_rows(teacher: Path, tmp_path: Path) -> None:
    apart, packed = look(teacher, TEXTS, tmp_path), look(teacher, TEXTS, tmp_path, packing=True, max_length=16)
    assert packed.values["input_ids"].tolist() == apart.values["input_ids"].tolist()
    lengths = [len(row) for row in rows_of(packed, "input_ids")]
    assert lengths[:-1] == [16] * (len(lengths) - 1)
    columns = (rows_of(packed, name) for name in ("input_ids", "labels", "position_ids"))
    for ids, labels, places in zip(*columns, strict=True):
        assert labels == [-100 if place == 0 else one for one, place in zip(ids, places, strict=True)]
    assert len({*zip(packed.source_index.tolist(), packed.view.tolist(), strict=True)}) == len(packed)
    first = packed.values["input_ids"][:16].astype("<i4").tobytes()
    assert packed.content_hash[0].tobytes() == content_hash([first])


def test_packed_rows_in_which_nothing_is_learned_are_left_out(teacher: Path, tmp_path: Path) -> None:
    rows = [PROMPTS[0], {"prompt": " ".join(LINES), "completion": " It is blue."}]
    samples = look(teacher, rows, tmp_path, packing=True, max_length=8, positions="completion")
    assert samples.lengths["P"].min() > 0
    views = samples.view[samples.source_index == 1].tolist()
    assert views and views[0] > 5  # rows of the long prompt went, and the others keep their numbers
    learned = [[one for one in row if one >= 0] for row in rows_of(samples, "labels")]
    assert sum(map(len, learned)) in range(8, 20)
