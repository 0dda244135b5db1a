"""How much smaller and faster than its teacher is a tagger that reads words? One thread, WNUT 17's validation rows.

Ratios. Words per second of the teacher (tagger_teacher.py) and of `bilstm-cnn` at its default sizes with the words of
the training rows: from words to tags, so tokenising counts, in batches of the same rows, longest rows first. Both
take turns; the median of the rounds' ratios counts, in seconds of the processor, so that other load counts little.
`model alone` leaves tokenising and the names of tags out. The student's weights are random: they do not change what
it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from predistill.benchmarks.measure import options, ratio, table
from predistill.benchmarks.tagger_results import teacher
from predistill.benchmarks.tagger_teacher import NAMES, read_rows
from predistill.student_train.bilstm_cnn import BiLstmCnnConfig, BiLstmCnnForTokenClassification
from predistill.student_train.words.vocabulary import WordTokenizer
from transformers import AutoModelForTokenClassification, AutoTokenizer

Rows = list[list[str]]


def student() -> tuple[BiLstmCnnForTokenClassification, WordTokenizer]:
    torch.manual_seed(0)
    tokenizer = WordTokenizer.learned(row["tokens"] for row in read_rows())
    sizes = {"vocab_size": len(tokenizer), "num_characters": tokenizer.num_characters}
    config = BiLstmCnnConfig(**sizes, id2label=dict(enumerate(NAMES)))
    return BiLstmCnnForTokenClassification(config).eval(), tokenizer


@torch.inference_mode()
def teacher_tags(model: Any, tokenizer: Any, rows: Rows, batch_size: int) -> list[list[str]]:
    tags: list[list[str]] = []
    for start in range(0, len(rows), batch_size):
        batch = tokenizer(rows[start : start + batch_size], is_split_into_words=True, padding=True, truncation=True,
                          return_tensors="pt")  # fmt: skip
        for at, found in enumerate(model(**batch).logits.argmax(-1).tolist()):
            words = batch.word_ids(at)
            first = {word: place for place, word in reversed(list(enumerate(words))) if word is not None}
            tags.append([NAMES[found[first[word]]] for word in sorted(first)])
    return tags


def works(rows: Rows, batch_size: int) -> dict[str, Callable[[], Any]]:
    """What is timed: words to tags of both, and both models alone on what was tokenised before."""
    folder = teacher()
    large, pieces = (
        AutoModelForTokenClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    small, words = student()
    starts = range(0, len(rows), batch_size)
    parts = [rows[start : start + batch_size] for start in starts]
    large_batches = [pieces(part, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt")
                     for part in parts]  # fmt: skip
    small_batches = [words(part) for part in parts]

    @torch.inference_mode()
    def alone(model: Any, batches: list[Any]) -> None:
        for batch in batches:
            model(**batch)

    return {
        "teacher": lambda: teacher_tags(large, pieces, rows, batch_size),
        "student": lambda: small.tag(rows, words, batch_size),
        "teacher alone": lambda: alone(large, large_batches),
        "student alone": lambda: alone(small, small_batches),
    }


def timed(rounds: int, made: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of the processor of each work, round by round; the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name, work in made.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: found[1:] for name, found in times.items()}


def parameters() -> list[list[object]]:
    """Of both, all and those that are no embeddings of words."""
    large, (small, _) = AutoModelForTokenClassification.from_pretrained(teacher()), student()
    found = []
    for model in (large, small):
        whole = sum(one.numel() for one in model.parameters())
        found.append((whole, whole - model.get_input_embeddings().weight.numel()))
    ratios = [f"{one / other:.1f}" for one, other in zip(*found, strict=True)]
    cells = [[f"{one / 1e6:.2f}" for one in row] for row in found]
    return [["teacher, millions", *cells[0]], ["bilstm-cnn, millions", *cells[1]], ["ratio", *ratios]]


def main() -> None:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    rows: Rows = sorted((row["tokens"] for row in read_rows(evaluation=True)), key=len, reverse=True)
    rows = rows[::4] if args.quick else rows
    count, cells = sum(map(len, rows)), []
    for batch_size in (1, 32):
        times = timed(1 if args.quick else 3, works(rows, batch_size))
        for kind in ("", " alone"):
            one, other = times[f"teacher{kind}"], times[f"student{kind}"]
            speeds = [f"{count / min(found):,.0f}" for found in (one, other)]
            cells.append([batch_size, "model alone" if kind else "words to tags", *speeds, ratio(one, other)])
    table(["", "parameters", "without word embeddings"], parameters())
    table(["rows a batch", "", "teacher, words/s", "bilstm-cnn, words/s", "ratio"], cells)


if __name__ == "__main__":
    main()
