"""Tokenizers, chat templates and small teachers of several kinds, for the tests of language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from predistill.teacher_dump.config import DumpConfig
from predistill.teacher_dump.data import load_rows
from predistill.teacher_dump.tasks.causal_lm import CausalLM
from predistill.teacher_dump.teachers.teacher import Teacher
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINES = (
    "Before we proceed any further, hear me speak.",
    "Speak, speak. You are all resolved rather to die than to famish?",
    "First, you know Caius Marcius is chief enemy to the people.",
    "Let us kill him, and we'll have corn at our own price. Is't a verdict?",
    "user assistant system what is the sky it is blue",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (  # begins once, trims content, has no end of line after a turn
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|header|>' + m['role'] + '<|/header|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
THINKING = (  # the last answer is written otherwise than earlier ones, as Qwen3 does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def byte_level(template: str | None = None, trim_offsets: bool = False, **more: Any) -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen have it, and with trimmed offsets as Llama 3 has it; no special tokens around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    ends = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **{**ends, **more})
    made.chat_template = template
    return made


def sentence_piece(ends: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces as ▁, a <s> before each text, and after it, where `ends`, a </s>."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(vocabulary: int = 416, **more: Any) -> LlamaForCausalLM:
    """Random, with logits some units apart; two layers, 16 wide."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"max_position_embeddings": 64, "initializer_range": 0.5, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **options, **more})).eval()


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(teacher: Path, dataset: Path | str, folder: Path, **more: Any) -> DumpConfig:
    defaults = {"task": "causal-lm", "tokens_per_batch": 128, "dtype": "float32", "device": "cpu"}
    return DumpConfig(teacher=str(teacher), dataset=str(dataset), output_dir=str(folder), **{**defaults, **more})


def task_of(config: DumpConfig) -> tuple[CausalLM, Any]:
    """(task, its only split's rows as an Arrow table)."""
    source = load_rows(config)
    task = CausalLM(config, Teacher(config, CausalLM.model_class), source)
    [rows] = source.splits.values()
    return task, rows.with_format("arrow")[:]


def prepared(config: DumpConfig) -> Any:
    """Samples of all rows of a dataset of one split."""
    task, rows = task_of(config)
    task.check("train", 0, rows)
    return task.prepare("train", np.arange(len(rows)), rows)


def rows_of(samples: Any, column: str) -> list[list[int]]:
    """A token-level column, one list a row."""
    ends = samples.lengths["P" if column == "teacher_positions" else "S"].cumsum()
    return [part.tolist() for part in np.split(samples.values[column], ends[:-1])]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
