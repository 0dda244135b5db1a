"""Small readers, questions about contexts longer than a window, and the usual preparation of them, written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predistill.teacher_dump.config import DumpConfig
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

SENTENCE = "a warm and funny film the plot is thin jokes are old charming clever sad café naïve zoë's 日本"
WORDS = SENTENCE.split()
LENGTH, STRIDE = 40, 8  # tokens


def reader(tokenizer_dir: Path, folder: Path, layers: int = 2, seed: int = 3, **more: Any) -> Path:
    """A random BERT reader, 16 wide, whose logits are some units apart."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        **{**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.5, **more}
    )
    model = BertForQuestionAnswering(config).eval()
    torch.nn.init.normal_(model.qa_outputs.weight, std=0.7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def squad(count: int, seed: int = 0, impossible: bool = False) -> list[dict[str, Any]]:
    """Questions as the Hub's `squad` has them; every third, where `impossible`, has no answer."""
    rng = np.random.default_rng(seed)
    made = []
    for at in range(count):
        words = list(rng.choice(WORDS, rng.integers(5, 60)))
        first = int(rng.integers(len(words)))
        text = " ".join(words[first : first + int(rng.integers(1, 4))])
        start = len(" ".join(words[:first])) + bool(first)
        none = impossible and at % 3 == 2
        made.append({
            "id": f"q{seed}-{at}",
            "question": "  what is the " + str(rng.choice(WORDS)) + "?", "context": " ".join(words),
            "answers": {"text": [] if none else [text], "answer_start": [] if none else [start]},
        })  # fmt: skip
    return made


def articles(rows: list[dict[str, Any]], version: str = "1.1") -> dict[str, Any]:
    """The same as SQuAD's own JSON, one paragraph a question; of version 2, with what only it has."""
    paragraphs = []
    for row in rows:
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        ]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        if version == "v2.0":
            qa["is_impossible"] = not answers
            if not answers:
                qa["plausible_answers"] = [{"text": row["context"][:3], "answer_start": 0}]
        paragraphs.append({"context": row["context"], "qas": [qa]})
    half = len(paragraphs) // 2
    return {"version": version, "data": [
        {"title": "one", "paragraphs": paragraphs[:half]}, {"title": "two", "paragraphs": paragraphs[half:]},
    ]}  # fmt: skip


def write(path: Path, rows: Any) -> Path:
    """JSON lines of a list, else one JSON document."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def settings(teacher: Path, dataset: Path | str, folder: Path, **more: Any) -> DumpConfig:
    defaults: dict[str, Any] = {
        "task": "question-answering", "tokens_per_batch": 256, "dtype": "float32", "device": "cpu",
        "max_length": LENGTH, "doc_stride": STRIDE,
    }  # fmt: skip
    return DumpConfig(teacher=str(teacher), dataset=str(dataset), output_dir=str(folder), **{**defaults, **more})


def features(tokenizer: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The windows of one question, token by token as transformers' run_qa.py prepares them."""
    encoded = tokenizer(
        row["question"].strip(), row["context"], truncation="only_second", max_length=LENGTH, stride=STRIDE,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    made = []
    for at, ids in enumerate(encoded["input_ids"]):
        sides, offsets = encoded.sequence_ids(at), encoded["offset_mapping"][at]
        mine = [place for place, side in enumerate(sides) if side == 1]
        start = end = 0
        if row["answers"]["text"]:
            begins = row["answers"]["answer_start"][0]
            ends = begins + len(row["answers"]["text"][0])
            if offsets[mine[0]][0] <= begins and offsets[mine[-1]][1] >= ends:
                start = max(place for place in mine if offsets[place][0] <= begins)
                end = min(place for place in mine if offsets[place][1] >= ends)
        made.append({
            "input_ids": ids, "token_type_ids": encoded["token_type_ids"][at], "start": start, "end": end,
            "offsets": [list(offsets[place]) if side == 1 else [-1, -1] for place, side in enumerate(sides)],
        })  # fmt: skip
    return made


def online(teacher: Path, windows: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of starts and ends, float32 [S] each, of every window alone through the teacher."""
    model = AutoModelForQuestionAnswering.from_pretrained(teacher).eval()
    found = []
    with torch.no_grad():
        for one in windows:
            inputs = {name: torch.tensor([one[name]]) for name in ("input_ids", "token_type_ids")}
            outputs = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
            found.append((outputs.start_logits[0], outputs.end_logits[0]))
    return found
