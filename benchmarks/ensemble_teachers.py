"""Three teachers of SST-2 that saw different rows, for the benchmark of ensembles.

Each is the backbone of teachers.py fine-tuned on a third of the training rows (6,000 of 18,000; the last 2,000 are
held out of all three) for 2 epochs. The third one reads other tokens: a WordPiece vocabulary of 8,000 learnt from
these rows, whose embeddings begin as the mean of the backbone's own for the same letters.

    python benchmarks/ensemble_teachers.py      # 15 minutes of one thread
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import WORK, note
from predistill.benchmarks.teachers import MAX_LENGTH, TASKS, accuracy, backbone, encode, optimize, read_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HELD_OUT = 2000  # of the training rows, the last
MEMBERS = ("first", "second", "pieces")
VOCABULARY = 8000


def member(number: int) -> Path:
    """Folder of teacher number 0, 1 or 2; trains it where it is not there yet."""
    folder = WORK / "teachers" / f"ensemble-{MEMBERS[number]}"
    if not (folder / "config.json").exists():
        note(f"training {folder.name}")
        reached = fine_tune(number, folder)
        note(f"{folder.name}: accuracy {reached:.4f} on validation")
    return folder


def fine_tune(number: int, folder: Path) -> float:
    torch.manual_seed(number)
    names = TASKS["sst2"][2]
    rows = read_rows("sst2")[:-HELD_OUT]
    tokenizer = AutoTokenizer.from_pretrained(backbone(), model_max_length=MAX_LENGTH)
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone(), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    if MEMBERS[number] == "pieces":
        tokenizer = other_tokens(model, tokenizer, [row["text"] for row in rows])
    optimize(model, tokenizer, encode(tokenizer, rows[number::3]), name=folder.name, epochs=2, learning_rate=1e-4,
             batch_size=32, seed=number)  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy(model, encode(tokenizer, read_rows("sst2", evaluation=True)), tokenizer)


@torch.no_grad()
def other_tokens(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Gives `model` embeddings of another vocabulary, learnt from `texts`, and returns its tokenizer."""
    made = tokenizer.train_new_from_iterator(texts, VOCABULARY)
    known, pieces = model.get_input_embeddings().weight, tokenizer.get_vocab()
    weight = torch.empty(len(made), known.shape[1])
    for piece, at in made.get_vocab().items():
        spelled = tokenizer(piece.removeprefix("##"), add_special_tokens=False)["input_ids"]
        weight[at] = known[[pieces[piece]] if piece in pieces else spelled].mean(0)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=made.pad_token_id))
    model.config.vocab_size = len(made)
    return made


if __name__ == "__main__":
    for each in range(len(MEMBERS)):
        member(each)
