"""Vectors of words out of a model's own embeddings, in GloVe's text format, for --student-vectors.

    python benchmarks/tagger_vectors.py MODEL train.jsonl.gz vectors.txt --size 100

A word's vector is the mean of its pieces' rows in the model's input embeddings, brought from their width to --size by
the directions in which the words differ most (principal components, each word counted once), with the mean variance
that random embeddings of that size would have, 1 / size. Nothing is trained, and the model is not run.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from transformers import AutoTokenizer


def embeddings(folder: Path) -> np.ndarray:
    """float32 [V, D]: the input embeddings, read alone."""
    with safe_open(folder / "model.safetensors", framework="np") as file:
        name = next(one for one in file.keys() if one.endswith("word_embeddings.weight"))  # noqa: SIM118  not a dict
        return file.get_tensor(name)


def vectors(folder: Path, words: Sequence[str], size: int) -> np.ndarray:
    """float32 [n, size], a row a word. A word of which the tokenizer makes nothing has zeros."""
    table, tokenizer = embeddings(folder), AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    means = np.stack([table[ids].mean(0) if ids else np.zeros(table.shape[1], np.float32) for ids in pieces])
    centred = means - means.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    small = centred @ directions[:, ::-1][:, :size]
    return (small / (small.std() * size**0.5)).astype(np.float32)


def words_of(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lower-cased, each once: what the vocabulary of a tagger holds."""
    return sorted({word.lower() for row in rows for word in row if word and not set(word) & set(" \n\r")})


def write(path: Path, words: Sequence[str], found: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for word, vector in zip(words, found, strict=True):
            file.write(f"{word} {' '.join(f'{value:.5f}' for value in vector)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with model.safetensors and a tokenizer")
    parser.add_argument("rows", type=Path, help="JSON lines with a column `tokens`, .gz")
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=100, help="numbers of a vector")
    args = parser.parse_args()
    with gzip.open(args.rows, "rt", encoding="utf-8") as file:
        words = words_of(json.loads(line)["tokens"] for line in file)
    write(args.output, words, vectors(args.model, words, args.size))
    print(f"{len(words)} vectors of {args.size} numbers in {args.output}")


if __name__ == "__main__":
    main()
