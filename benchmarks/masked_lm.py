"""Train a small masked language model, for the benchmark of augmentation: no pretrained one is at hand with its head.

    python benchmarks/masked_lm.py --output benchmarks/work/teachers/masked-lm

The backbone of teachers.py, whose own head was left out when it became a model of sentences, and a new head, which
begins as the identity and the words' frequencies. All but the word embeddings learns on sentences of SQuAD, AG News and
SST-2 (their training rows), by a plain loop without predistill: one piece in six masked, AdamW 5e-4, 32 rows a step of
like length. Prints nats a masked piece on rows that are held out, beside those of the frequencies alone. It is a weak
model (bert-base has about 2): what it proposes fits roughly.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import WORK, note
from predistill.benchmarks.reader_teacher import sentences
from predistill.benchmarks.teachers import backbone, batches, read_rows
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, get_linear_schedule_with_warmup

LENGTH = 64  # tokens
STEPS, HELD_OUT = 1600, 256  # of 32 rows; rows
UNSEEN = -100


def texts() -> list[str]:
    squad = json.loads(sentences("train").read_text())["data"][0]["paragraphs"]
    news = [row["text"] for row in read_rows("ag_news")]
    films = [row["text"] for row in read_rows("sst2") if len(row["text"].split()) > 5]
    return [*(one["context"] for one in squad), *news, *films[: len(squad)]]


def fresh(rows: list[dict[str, Any]]) -> BertForMaskedLM:
    """The model before training; its head gives what is likely anywhere."""
    config = AutoConfig.from_pretrained(backbone(), tie_word_embeddings=True)
    model = BertForMaskedLM.from_pretrained(backbone(), config=config)
    counts = torch.bincount(torch.tensor([at for row in rows for at in row["input_ids"]]), minlength=config.vocab_size)
    with torch.no_grad():
        torch.nn.init.eye_(model.cls.predictions.transform.dense.weight)
        model.cls.predictions.transform.LayerNorm.weight.fill_(0.3)
        model.cls.predictions.bias.copy_(((counts + 0.1) / counts.sum()).log())
    model.get_input_embeddings().requires_grad_(False)
    return model


def loss(model: BertForMaskedLM, batch: Any, tokenizer: Any, random_state: torch.Generator) -> torch.Tensor:
    """Mean nats of the masked pieces; the head sees them alone."""
    ids = batch["input_ids"]
    masked = (torch.rand(ids.shape, generator=random_state) < 1 / 6) & (batch["labels"] != UNSEEN)
    hidden = model.bert(input_ids=ids.masked_fill(masked, tokenizer.mask_token_id),
                        attention_mask=batch["attention_mask"]).last_hidden_state  # fmt: skip
    return cross_entropy(model.cls(hidden[masked]), ids[masked])


def train(output: Path, steps: int = STEPS, seed: int = 0) -> tuple[float, float]:
    """Train, save to `output`, and return nats a piece on rows held out: of the frequencies alone, and at the end."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(backbone(), model_max_length=128)
    found = texts()
    random.Random(seed).shuffle(found)
    encoded = tokenizer(found, truncation=True, max_length=LENGTH)["input_ids"]
    rows = [{"input_ids": ids, "labels": 0} for ids in encoded]
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    model = fresh(rows)
    before = frequencies(model, held_out)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-4, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    draws, start = torch.Generator().manual_seed(seed), time.perf_counter()
    model.train()
    for number, batch in zip(range(1, steps + 1), endless(rows, tokenizer), strict=False):
        loss(model, batch, tokenizer, draws).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if number % 100 == 0:
            note(f"step {number} of {steps}: {judged(model, held_out, tokenizer):.3f} nats a piece on rows held out, "
                 f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return before, judged(model, held_out, tokenizer)


def endless(rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    for epoch in count():
        yield from masked_batches(rows, tokenizer, epoch)


def masked_batches(rows: list[dict[str, Any]], tokenizer: Any, seed: int = 0) -> Any:
    """Batches whose `labels` are UNSEEN where nothing may be masked: [CLS], [SEP], padding."""
    special = torch.tensor(tokenizer.all_special_ids)
    for batch in batches(rows, 32, random.Random(seed), tokenizer):
        batch["labels"] = torch.where(torch.isin(batch["input_ids"], special), UNSEEN, 0)
        yield batch


@torch.inference_mode()
def judged(model: BertForMaskedLM, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    model.eval()
    draws = torch.Generator().manual_seed(1)
    found = [float(loss(model, batch, tokenizer, draws)) for batch in masked_batches(rows, tokenizer)]
    model.train()
    return sum(found) / len(found)


def frequencies(model: BertForMaskedLM, rows: list[dict[str, Any]]) -> float:
    """Nats a piece of a model that knows how often each piece comes, and nothing else."""
    likely = model.cls.predictions.bias.detach().log_softmax(-1)
    return -float(likely[torch.tensor([at for row in rows for at in row["input_ids"][1:-1]])].mean())


def masked_lm() -> Path:
    """Folder of the model; trained where it is not there yet (forty minutes on one core)."""
    folder = WORK / "teachers" / "masked-lm"
    if not (folder / "tokenizer.json").exists():
        note("training a masked language model")
        train(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK / "teachers" / "masked-lm", help="folder to save to")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    before, reached = train(args.output, args.steps)
    print(f"{reached:.3f} nats a masked piece on rows held out ({before:.3f} by frequency), saved to {args.output}")


if __name__ == "__main__":
    main()
