"""CoNLL files: a token a line, its tag in the last column, a blank line between sentences.

Columns are apart by tabs where a line has any, else by blanks. A line that begins with -DOCSTART- says that a document
begins, and is skipped. A sentence of one column has no tags.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import datasets

from ...store.errors import DataError
from ...store.schema import TOKENS

SUFFIXES = (".conll", ".bio")
TAGS = "tags"
_FEATURES = datasets.Features({
    TOKENS: datasets.List(datasets.Value("string")), TAGS: datasets.List(datasets.Value("string")),
})  # fmt: skip
_BLANKS = re.compile(r"[ \t]+")  # and no others: a token may be a space that few programs know
_ENDS = " \t\r\n"


def load(path: Path) -> datasets.Dataset:
    """A sentence a row: `tokens`, a list of strings, and `tags`, the same or null. Prepared once for each state of the
    file. Raises DataError naming the line."""
    about = path.stat()
    state = {"size": about.st_size, "modified": about.st_mtime_ns}
    return datasets.Dataset.from_generator(
        _rows, features=_FEATURES, gen_kwargs={"path": str(path), "state": state}, split=datasets.Split.TRAIN
    )


def sentences(file: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """Rows of an open file. Raises DataError where a sentence has tags in some lines and not in others."""
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(file, 1):
        line = line.strip(_ENDS)
        if line.startswith("-DOCSTART-"):
            continue
        if not line:
            if tokens:
                yield {TOKENS: tokens, TAGS: tags or None}
            tokens, tags = [], []
            continue
        token, *more = line.split("\t") if "\t" in line else _BLANKS.split(line)
        if tokens and bool(more) != bool(tags):
            came = "a token and no tag" if tags else "a tag, and none before it"
            raise DataError(f"{name}, line {number}: a tag on every line of a sentence or on none expected; got {came}")
        tokens.append(token)
        tags += more[-1:]
    if tokens:
        yield {TOKENS: tokens, TAGS: tags or None}


def _rows(path: str, state: dict[str, int]) -> Iterator[dict[str, Any]]:
    opened: Any = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        found = sentences(file, Path(path).name)
        first = next(found, None)
        if first is None:
            raise DataError(f"{Path(path).name} has no sentences; at least one expected")
        yield first
        yield from found
