"""Fine-tune a reader on SQuAD, for the benchmarks that need one that was really trained.

    python benchmarks/reader_teacher.py --output benchmarks/work/teachers/squad

The backbone is that of teachers.py. So that one core is enough, every passage is cut to the sentences in which an
answer stands, 25 words on average: easier than SQuAD itself, whose passages have 120. A plain loop without predistill:
AdamW, 3e-4, linear warm-up over 10 % and decay, clip 1.0, 32 rows a step of like length; word embeddings and
the first three of six blocks stay as they are. Prints the share of validation questions (XQuAD's, one right answer
each) whose two ends are found.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from predistill.benchmarks.measure import DATA, WORK, note
from predistill.benchmarks.teachers import backbone, batches, optimize
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

MAX_LENGTH = 128  # tokens
LONGEST = 60  # words of a passage
EPOCHS = 2
FROZEN = 3  # blocks


def sentences(split: str, first: int | None = None) -> Path:
    """SQuAD JSON whose passages are the sentences around an answer. first: keep so many questions, drawn once."""
    name = f"squad-sentences-{split}{'' if first is None else f'-{first}'}.json"
    path = WORK / "data" / name
    if not path.exists():
        articles = json.loads((DATA / "squad" / f"{split}.json").read_text(encoding="utf-8"))["data"]
        questions = [one for article in articles for paragraph in article["paragraphs"] for one in _cut(paragraph)]
        kept = questions if first is None else random.Random(0).sample(questions, first)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": "1.1", "data": [{"title": split, "paragraphs": _grouped(kept)}]}))
    return path


def _cut(paragraph: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(passage, question) of each question, answers at their new places; not of passages of over 60 words."""
    context, found = paragraph["context"], []
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+(?=[\"'(\[]*[A-Z])", context)]
    bounds = [0, *ends, len(context)]
    for question in paragraph["qas"]:
        spans = [(one["answer_start"], one["answer_start"] + len(one["text"])) for one in question["answers"]]
        begin = max(bound for bound in bounds if bound <= spans[0][0])
        end = min(bound for bound in bounds if bound >= spans[0][1])
        answers = [
            {"text": context[start:stop], "answer_start": start - begin}
            for start, stop in spans if begin <= start and stop <= end
        ]  # fmt: skip
        if len(context[begin:end].split()) <= LONGEST and len(question["question"]) <= 4 * MAX_LENGTH:
            found.append((context[begin:end].rstrip(), {**question, "answers": answers}))
    return found


def _grouped(questions: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    paragraphs: dict[str, list[dict[str, Any]]] = {}
    for context, question in questions:
        paragraphs.setdefault(context, []).append(question)
    return [{"context": context, "qas": asked} for context, asked in paragraphs.items()]


def encode(tokenizer: Any, path: Path) -> list[dict[str, Any]]:
    """Rows with start_positions and end_positions, in tokens; questions whose answer is cut off are left out."""
    rows = []
    for paragraph in json.loads(path.read_text())["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            answer = question["answers"][0]
            row = tokenizer(question["question"].strip(), paragraph["context"], truncation=True, max_length=MAX_LENGTH)
            first = row.char_to_token(answer["answer_start"], sequence_index=1)
            last = row.char_to_token(answer["answer_start"] + len(answer["text"]) - 1, sequence_index=1)
            if first is not None and last is not None:
                rows.append({**row, "start_positions": first, "end_positions": last})
    return rows


def fine_tune(output: Path, *, epochs: int = EPOCHS, learning_rate: float = 3e-4, seed: int = 0) -> None:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(backbone(), model_max_length=MAX_LENGTH)
    model = AutoModelForQuestionAnswering.from_pretrained(backbone())
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN]):
        part.requires_grad_(False)
    optimize(model, tokenizer, encode(tokenizer, sentences("train")), name="squad", epochs=epochs,
             learning_rate=learning_rate, batch_size=32, seed=seed)  # fmt: skip
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def exact_match(folder: Path) -> float:
    """Percent of validation questions whose likeliest first and last token are the right ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    rows, right = encode(tokenizer, sentences("validation")), 0
    for batch in batches(rows, 64, random.Random(0), tokenizer):
        with torch.inference_mode():
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                          token_type_ids=batch["token_type_ids"])  # fmt: skip
        at = [logits.masked_fill(batch["attention_mask"] == 0, -torch.inf).argmax(-1)
              for logits in (found.start_logits, found.end_logits)]  # fmt: skip
        right += int(((at[0] == batch["start_positions"]) & (at[1] == batch["end_positions"])).sum())
    return 100 * right / len(rows)


def teacher() -> Path:
    """Folder of the reader; fine-tuned where it is not there yet (a quarter of an hour on one core)."""
    folder = WORK / "teachers" / "squad"
    if not (folder / "config.json").exists():
        note("training a reader")
        fine_tune(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WORK / "teachers" / "squad", help="folder to save to")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    fine_tune(args.output, epochs=args.epochs, learning_rate=args.learning_rate)
    print(f"both ends right in {exact_match(args.output):.1f} % of the validation questions, saved to {args.output}")


if __name__ == "__main__":
    main()
