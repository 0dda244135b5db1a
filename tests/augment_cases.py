"""A tiny masked language model, and what it would say, worked out one word at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dump_cases import own_cache  # noqa: F401  a fixture
from predistill.teacher_dump.augmentation.config import AugmentConfig
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM


def save_masked_lm(tokenizer_dir: Path, folder: Path, seed: int = 0) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertForMaskedLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, dataset: Path, output: Path, **more: Any) -> AugmentConfig:
    defaults: dict[str, Any] = {"multiplication_factor": 3, "candidates": 5, "part_words": 60}
    return AugmentConfig(str(dataset), str(output), masked_lm=str(model), **{**defaults, **more})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def likeliest(model_dir: Path, text: str, word: str, count: int) -> set[str]:
    """What stands for the first `word` in `text`, which is one piece: the whole head, one row, no padding.

    Of the tiny tokenizer, a word is an entry of letters only.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForMaskedLM.from_pretrained(model_dir).eval()
    ids = tokenizer(text)["input_ids"]
    at = ids.index(tokenizer.convert_tokens_to_ids(word))
    ids[at] = tokenizer.mask_token_id
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0, at].argsort(descending=True).tolist()
    names = tokenizer.convert_ids_to_tokens(order)
    others = [name for name in names if name.isalpha() and name != word]
    return set(others[:count])


def squad(contexts: list[str], answers: list[list[str]], **more: Any) -> dict[str, Any]:
    """One article a context, a question an answer; more: keys beside data."""
    data = []
    for at, (context, wanted) in enumerate(zip(contexts, answers, strict=True)):
        questions = []
        for number, text in enumerate(wanted):
            answer = {"text": text, "answer_start": context.index(text)}
            questions.append({"id": f"{at}-{number}", "question": "what?", "answers": [answer]})
        data.append({"title": f"article {at}", "paragraphs": [{"context": context, "qas": questions}]})
    return {"version": "1.1", "data": data, **more}
