"""Fine-tune a teacher of entities on WNUT 17, for the benchmark of taggers.

The backbone is that of teachers.py, all-MiniLM-L6-v2, with a new head over tokens; its embeddings stay as they are. A
plain loop without predistill: AdamW, 1.5e-4, linear warm-up over 10 % and decay, clip 1.0, 16 rows a step grouped by
length, 3 epochs; the loss is that of each word's first token. Prints F1 of entities on the evaluation split, and leaves
a folder that `AutoModelForTokenClassification` loads, tokenizer and tag names included.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import DATA, WORK
from predistill.benchmarks.teachers import MAX_LENGTH, backbone, like_lengths, optimize
from transformers import AutoModelForTokenClassification, AutoTokenizer

TASK = "wnut17"
FOLDER = WORK / "teachers" / TASK
KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
NAMES = ["O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI")]


def read_rows(evaluation: bool = False) -> list[dict[str, Any]]:
    with gzip.open(DATA / TASK / f"{'validation' if evaluation else 'train'}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fine_tune(output: Path, *, epochs: int, learning_rate: float, batch_size: int, seed: int) -> float:
    """Train, save to `output`, and return F1 on the evaluation split."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(backbone(), model_max_length=MAX_LENGTH)
    model = AutoModelForTokenClassification.from_pretrained(
        backbone(), id2label=dict(enumerate(NAMES)), label2id={name: at for at, name in enumerate(NAMES)}
    )
    model.base_model.embeddings.requires_grad_(False)
    optimize(model, tokenizer, encode(tokenizer, read_rows()), name=TASK, epochs=epochs, learning_rate=learning_rate,
             batch_size=batch_size, seed=seed, batched=batches)  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return entity_f1(model, encode(tokenizer, read_rows(evaluation=True)), tokenizer)


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """labels: of each word at its first token, -100 elsewhere."""
    made = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    encoded = []
    for at, (row, ids) in enumerate(zip(rows, made["input_ids"], strict=True)):
        words = made.word_ids(at)
        tags = [
            -100 if word is None or word == before else NAMES.index(row["ner_tags"][word])
            for word, before in zip(words, [None, *words[:-1]], strict=True)
        ]
        encoded.append({"input_ids": ids, "labels": tags})
    return encoded


def batches(rows: list[dict[str, Any]], size: int, order: random.Random, tokenizer: Any) -> Iterator[Any]:
    for chosen in like_lengths(rows, size, order):
        batch = tokenizer.pad([{"input_ids": rows[row]["input_ids"]} for row in chosen], return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for place, row in enumerate(chosen):
            labels[place, : len(rows[row]["labels"])] = torch.tensor(rows[row]["labels"])
        yield {**batch, "labels": labels}


@torch.inference_mode()
def entity_f1(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    from seqeval.metrics import f1_score

    model.eval()
    truth: list[list[str]] = []
    found: list[list[str]] = []
    for batch in batches(rows, 64, random.Random(0), tokenizer):
        predicted, known = model(**batch).logits.argmax(-1), batch["labels"] >= 0
        for tags, made in ((truth, batch["labels"]), (found, predicted)):
            tags += [[NAMES[at] for at in row[there].tolist()] for row, there in zip(made, known, strict=True)]
    return float(f1_score(truth, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to save to (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reached = fine_tune(args.output, epochs=args.epochs, learning_rate=args.learning_rate,
                        batch_size=args.batch_size, seed=args.seed)  # fmt: skip
    print(f"{TASK}: F1 of entities {reached:.4f} on the evaluation split, saved to {args.output}")


if __name__ == "__main__":
    main()
