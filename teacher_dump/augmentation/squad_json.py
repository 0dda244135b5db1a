"""SQuAD's own JSON, 1.1 and 2.0: contexts are rewritten around the answers, and every question comes along."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from ...store.errors import ConfigError, DataError
from ...store.identity import digest
from .config import AugmentConfig
from .rewrite import View
from .sinks import as_json, text_file
from .table import FROM, VIEW, view_id
from .words import Passage, Span, answer_span, text_passage

_ANSWERS = ("answers", "plausible_answers")  # the second of SQuAD 2.0's questions without an answer
_HEAD = 1 << 16  # bytes that a file of this kind is known by


class Squad:
    """The paragraphs of a SQuAD file are its rows. Raises ConfigError, DataError."""

    notices: list[str] = []

    def __init__(self, config: AugmentConfig, content: dict[str, Any]):
        if config.suffix != ".json":
            raise ConfigError(f"OUTPUT {config.output}: {config.dataset} is SQuAD JSON; give a .json name")
        named = {"text_column": config.text_column, "text_pair_column": config.text_pair_column, "split": config.split}
        if given := [name for name, value in named.items() if value is not None]:
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{flag} is for columns, and {config.dataset} is SQuAD JSON; leave it away")
        self._zipped, self._content = config.output.endswith(".gz"), content
        self._paragraphs = [(at, one) for at, article in enumerate(content["data"]) for one in article["paragraphs"]]
        self.rows = len(self._paragraphs)
        if not self.rows:
            raise DataError(f"{config.dataset} has no paragraphs; at least one expected")
        if any(name in one for _, one in self._paragraphs for name in (FROM, VIEW)):
            raise ConfigError(f"{config.dataset} was augmented already; give the dataset it was made from")

    def survey(self) -> tuple[str, list[int], int]:
        """(hash of all, words of each paragraph, bytes of text). Raises DataError naming the question."""
        words = [sum(len(one.words) for one in self._of(row)) for row in range(self.rows)]
        return digest(self._content), words, sum(len(as_json(one)) for _, one in self._paragraphs)

    def passages(self, start: int, stop: int) -> list[list[Passage]]:
        return [self._of(row) for row in range(start, stop)]

    def write(self, path: Path, views: Iterable[View]) -> None:
        """The articles, then each once more with the views of its paragraphs."""
        others = {name: value for name, value in self._content.items() if name != "data"}
        with text_file(path, self._zipped) as text:
            text.write(f'{as_json(others)[:-1]}{", " if others else ""}"data": [\n')
            for at, article in enumerate(self._content["data"]):
                first = sum(len(one["paragraphs"]) for one in self._content["data"][:at])
                kept = ({**one, FROM: row, VIEW: 0} for row, one in enumerate(article["paragraphs"], first))
                self._article(text, ",\n" if at else "", article, kept)
            for at, some in groupby(views, lambda view: self._paragraphs[view.row][0]):
                self._article(text, ",\n", self._content["data"][at], map(self._paragraph, some))
            text.write("\n]}\n")

    def _article(self, text: TextIO, before: str, article: dict[str, Any], paragraphs: Iterable[Any]) -> None:
        others = {name: value for name, value in article.items() if name != "paragraphs"}
        text.write(f'{before}{as_json(others)[:-1]}{", " if others else ""}"paragraphs": [')
        for at, paragraph in enumerate(paragraphs):
            text.write(("\n," if at else "\n") + as_json(paragraph))
        text.write("]}")

    def _of(self, row: int) -> list[Passage]:
        context = self._paragraphs[row][1]["context"]
        return [text_passage(context, [span for _, _, span in self._spans(row)])]

    def _spans(self, row: int) -> Iterator[tuple[int, dict[str, Any], Span]]:
        """(number of the question, answer, where it is) of all answers of a paragraph."""
        paragraph = self._paragraphs[row][1]
        for number, question in enumerate(paragraph["qas"]):
            for kind in _ANSWERS:
                for answer in question.get(kind) or ():
                    span = answer_span(
                        str(question.get("id")), paragraph["context"], answer.get("text"), answer.get("answer_start")
                    )
                    yield number, answer, span

    def _paragraph(self, view: View) -> dict[str, Any]:
        """The paragraph with another context, its answers where they are now, and ids of its own."""
        paragraph, starts = self._paragraphs[view.row][1], iter(view.offsets[0])
        questions = []
        for question in paragraph["qas"]:
            moved = {
                kind: [{**answer, "answer_start": next(starts)} for answer in question[kind]]
                for kind in _ANSWERS if question.get(kind)
            }  # fmt: skip
            questions.append({**question, **moved, "id": view_id(question.get("id"), view.view)})
        return {**paragraph, "context": view.values[0], "qas": questions, FROM: view.row, VIEW: view.view}


def read_squad(path: Path) -> dict[str, Any] | None:
    """The content of a file in SQuAD's form; None where it has another form. Raises DataError where it is not whole."""
    if Path(path.name.lower().removesuffix(".gz")).suffix != ".json" or not path.is_file():
        return None
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        head = file.read(_HEAD)
        if b'"data"' not in head or b'"paragraphs"' not in head:
            return None
        try:
            content = json.loads(head + file.read())
        except ValueError:  # JSON lines among others
            return None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    for at, article in enumerate(content["data"]):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list) or not all(map(_is_paragraph, paragraphs)):
            raise DataError(f"{path}, article {at}: paragraphs with a context and qas expected; it has others")
    return content


def _is_paragraph(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("context"), str)
        and isinstance(one.get("qas"), list)
        and all(isinstance(question, dict) for question in one["qas"])
    )
