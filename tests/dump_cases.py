"""Small dumps, and the same teacher run without one, for the tests of dumping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from predistill.teacher_dump.config import DumpConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

SENTENCE = "a warm and funny film the plot is thin jokes are old charming clever sad"
WORDS = SENTENCE.split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]


def rows(count: int, seed: int = 0, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    made: dict[str, Callable[[int], Any]] = {"label": lambda at: at % 2, **columns}
    return [
        {"text": text, **{name: make(at) for name, make in made.items()}} for at, text in enumerate(texts(count, seed))
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def settings(teacher: Path, dataset: Path | str, folder: Path, **more: Any) -> DumpConfig:
    defaults: dict[str, Any] = {
        "tokens_per_batch": 256,
        "dtype": "float32",
        "device": "cpu",
        "task": "text-classification",
    }
    return DumpConfig(teacher=str(teacher), dataset=str(dataset), output_dir=str(folder), **{**defaults, **more})


def online(teacher: Path, *columns: list[str], max_length: int = 64) -> list[np.ndarray]:
    """Logits, float32 [C], of each row alone through the teacher: no padding, no batches."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(*row, truncation=True, max_length=max_length, return_tensors="pt"))
            .logits[0]
            .float()
            .numpy()
            for row in zip(*columns, strict=True)
        ]


def saved(model: Any, tokenizer_dir: Path, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


def bert(tokenizer_dir: Path, folder: Path, **more: Any) -> Path:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_dir)),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        **more,
    )
    return saved(BertForSequenceClassification(config), tokenizer_dir, folder)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.arrow"))}
