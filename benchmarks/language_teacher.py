"""Train a language model on tiny Shakespeare, for the benchmarks that need one that was really trained.

    python benchmarks/language_teacher.py --output benchmarks/work/teachers/tiny_shakespeare

A byte-level BPE of 2,048 entries and a GPT-2 of 4 layers, 192 wide (2.2 M parameters), one speech a row, trained by a
plain loop without predistill: AdamW 2e-3, cosine decay, dropout 0.1, batches of about 4,096 tokens of like length.
Prints nats a token on the validation rows and keeps the best epoch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import DATA, WORK, note
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

VOCABULARY, LENGTH = 2048, 256  # entries, tokens
TOKENS = 4096  # a batch


def texts(split: str) -> list[str]:
    with gzip.open(DATA / "tiny_shakespeare" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(texts("train"), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end, model_max_length=LENGTH)


def gpt2(width: int, layers: int, dropout: float) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=max(1, width // 48),
        embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


def encode(tokenizer: Any, split: str) -> list[list[int]]:
    """Token ids of each row, closed by the end token where it is not cut."""
    rows = tokenizer(texts(split), truncation=False, verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id][:LENGTH] for ids in rows]


def batches(rows: list[list[int]], order: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [B, S], labels [B, S] with -100 on padding) of rows of like length, shuffled."""
    shuffled, grouped = order.sample(range(len(rows)), len(rows)), []
    for start in range(0, len(shuffled), 1000):
        window = sorted(shuffled[start : start + 1000], key=lambda row: -len(rows[row]))
        while window:
            size = max(1, TOKENS // len(rows[window[0]]))
            grouped.append(window[:size])
            window = window[size:]
    for chosen in order.sample(grouped, len(grouped)):
        padded = torch.full((len(chosen), max(len(rows[row]) for row in chosen)), -100)
        for at, row in enumerate(chosen):
            padded[at, : len(rows[row])] = torch.tensor(rows[row])
        yield padded.clamp(min=0), padded


@torch.inference_mode()
def validation_loss(model: Any, rows: list[list[int]]) -> float:
    """Nats a token."""
    model.eval()
    total, count = 0.0, 0
    for ids, labels in batches(rows, random.Random(0)):
        logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
        count += int((labels[:, 1:] != -100).sum())
    model.train()
    return total / count


def train(output: Path, epochs: int, seed: int = 0) -> float:
    """Train, keep the best epoch in `output`, and return its loss on the validation rows."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    rows, held_out = encode(tokenizer, "train"), encode(tokenizer, "validation")
    model = GPT2LMHeadModel(gpt2(192, 4, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1, fused=True)
    steps = epochs * sum(1 for _ in batches(rows, random.Random(seed)))
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    best = float("inf")
    for epoch in range(epochs):
        start = time.perf_counter()
        for ids, labels in batches(rows, random.Random(seed + epoch)):
            model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        reached = validation_loss(model, held_out)
        note(f"epoch {epoch + 1} of {epochs}: {reached:.4f} in {time.perf_counter() - start:.0f} s")
        if reached < best:
            best = reached
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    return best


def teacher() -> Path:
    """Folder of the teacher; trained where it is not there yet (half an hour on one core)."""
    folder = WORK / "teachers" / "tiny_shakespeare"
    if not (folder / "tokenizer.json").exists():
        train(folder, epochs=8)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK / "teachers" / "tiny_shakespeare", help="folder to save to")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    print(f"{train(args.output, args.epochs):.4f} nats a token on validation, saved to {args.output}")


if __name__ == "__main__":
    main()
