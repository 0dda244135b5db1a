"""Taggers, rows of words, and the same teacher run without a dump, for the tests of token classification."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dump_cases import WORDS, saved
from predistill.teacher_dump.config import DumpConfig
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertForTokenClassification

NAMES = ["O", "B-film", "I-film", "B-person", "I-person"]


def tagger(tokenizer_dir: Path, folder: Path, names: Sequence[str] = NAMES, seed: int = 1, **more: Any) -> Path:
    """A random BERT tagger of two layers, 16 wide."""
    torch.manual_seed(seed)
    named = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    config = BertConfig(**{
        "vocab_size": len(AutoTokenizer.from_pretrained(tokenizer_dir)), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.5,
        **named, **more,
    })  # fmt: skip
    return saved(BertForTokenClassification(config), tokenizer_dir, folder)


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of words of one token or several, with tags that depend on the word; one row in five has none."""
    rng = np.random.default_rng(seed)
    rare = ["Xylo", "o'clock", "zzz", "Kafka,"]  # letters, by the tiny tokenizer
    rows: list[dict[str, Any]] = []
    for at in range(count):
        words = [str(one) for one in rng.choice([*WORDS, *rare], rng.integers(2, longest))]
        tags = ["B-person" if word in rare else "B-film" if word == "film" else "O" for word in words]
        rows.append({"tokens": words, "ner_tags": None if at % 5 == 3 else tags})
    return rows


def settings(teacher: Path, dataset: Path | str, folder: Path, **more: Any) -> DumpConfig:
    defaults: dict[str, Any] = {"tokens_per_batch": 256, "dtype": "float32", "device": "cpu"}
    return DumpConfig(
        teacher=str(teacher), dataset=str(dataset), output_dir=str(folder), task="token-classification",
        **{**defaults, **more},
    )  # fmt: skip


@functools.cache
def loaded(teacher: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(teacher), AutoModelForTokenClassification.from_pretrained(teacher).eval()


def online(teacher: Path, words: Sequence[str], max_length: int = 64) -> tuple[torch.Tensor, list[int | None]]:
    """(logits [S, C], word of each token) of one row alone through the teacher."""
    tokenizer, model = loaded(teacher)
    encoded = tokenizer(
        list(words), is_split_into_words=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**encoded).logits[0], encoded.word_ids(0)


def firsts(words: Sequence[int | None]) -> dict[int, int]:
    """{word: place of its first token}, in order."""
    found: dict[int, int] = {}
    for at, word in enumerate(words):
        if word is not None:
            found.setdefault(word, at)
    return found
