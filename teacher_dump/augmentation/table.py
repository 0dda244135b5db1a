"""A dataset of columns: which of them is rewritten, and the dataset again with rewritten rows after its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...store.errors import ConfigError, DataError
from ..data import SourceData, check_columns, read, slices
from ..rows.labels import is_list
from ..rows.texts import check_rows, check_text
from ..survey import RowsHash
from .config import AugmentConfig
from .rewrite import View
from .sinks import check_columns_fit, sink
from .words import Passage, answer_span, text_passage, tokens_passage

FROM, VIEW = "augmented_from", "augmentation"  # the source row's number; which view of it, 0 being the row itself
TAGS = ("ner_tags", "pos_tags", "chunk_tags", "tags", "labels")  # a tag a word
ROWS = 1000  # written at a time


class Table:
    """One split of a dataset. Raises ConfigError, DataError."""

    def __init__(self, config: AugmentConfig, source: SourceData):
        if len(source.splits) > 1:
            raise ConfigError(
                f"{config.dataset} has {', '.join(source.splits)}, and what is evaluated on stays as it is; choose one "
                "with --split"
            )
        (self._split, self._rows), self._source = *source.splits.items(), source
        self._suffix, self._zipped = config.suffix, config.output.endswith(".gz")
        names = self._rows.column_names
        if taken := {FROM, VIEW} & set(names):
            raise ConfigError(f"{config.dataset} has a column {min(taken)!r}; give the dataset that it was made from")
        self._answers = config.text_column in (None, "context") and {"context", "answers"} <= set(names)
        first = config.text_column or ("context" if self._answers else "text" if "text" in names else "tokens")
        self.columns = [name for name in (first, config.text_pair_column) if name]
        if config.text_column is None and first not in names:
            raise DataError(f"{source.name}: a column text or tokens expected; it has {', '.join(map(repr, names))}: "
                            "choose with --text-column")  # fmt: skip
        check_columns(source, self.columns)
        if self._answers and not {"text", "answer_start"} <= set(_inside(self._rows.features["answers"])):
            raise DataError(f"{source.name}, column 'answers': lists text and answer_start expected, as squad has; got "
                            f"{self._rows.features['answers']}")  # fmt: skip
        self._lists = {name for name in self.columns if is_list(self._rows.features[name])}
        more = {FROM: datasets.Value("int64"), VIEW: datasets.Value("int64")}
        self._schema = datasets.Features({**self._rows.features, **more}).arrow_schema
        check_columns_fit(self._suffix, self._schema)
        self.rows, self.notices = len(self._rows), self._notices()

    def survey(self) -> tuple[str, list[int], int]:
        """(hash of all rows, words of each, bytes of text). Raises DataError for the first row that cannot be used."""
        state, words, size = RowsHash(), [], 0
        for start, rows in slices(self._rows, self._rows.column_names):
            state.update(rows)
            self._check(start, rows)
            size += rows.nbytes
            words += [sum(len(one.words) for one in self._of(row)) for row in rows.select(self._read()).to_pylist()]
        return state.hexdigest(), words, size

    def passages(self, start: int, stop: int) -> list[list[Passage]]:
        return [self._of(row) for row in read(self._rows, self._read(), slice(start, stop)).to_pylist()]

    def write(self, path: Path, views: Iterable[View]) -> None:
        """All rows, then all views of them."""
        with sink(path, self._suffix, self._zipped, self._schema) as write:
            for start in range(0, self.rows, ROWS):
                at = range(start, min(start + ROWS, self.rows))
                write(self._made(list(at), [0] * len(at), {}))
            for some in batched(views, ROWS):
                write(self._made([one.row for one in some], [one.view for one in some], self._rewritten(some)))

    def _made(self, rows: list[int], views: list[int], changed: dict[str, list[Any]]) -> pa.Table:
        at = slice(rows[0], rows[-1] + 1)
        table = read(self._rows, self._rows.column_names, at).take(pa.array([row - rows[0] for row in rows]))
        for name, values in changed.items():
            column = pa.array(values, self._schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, column)
        table = table.append_column(FROM, pa.array(rows, pa.int64())).append_column(VIEW, pa.array(views, pa.int64()))
        return table.cast(self._schema)

    def _rewritten(self, views: list[View]) -> dict[str, list[Any]]:
        made = {name: [one.values[at] for one in views] for at, name in enumerate(self.columns)}
        if self._answers:
            others = read(self._rows, self._beside(), slice(views[0].row, views[-1].row + 1)).to_pylist()
            rows = [others[one.row - views[0].row] for one in views]
            made["answers"] = [
                {**row["answers"], "answer_start": one.offsets[0]} for row, one in zip(rows, views, strict=True)
            ]
            if "id" in self._rows.column_names and self._rows.features["id"].dtype in ("string", "large_string"):
                made["id"] = [view_id(row["id"], one.view) for row, one in zip(rows, views, strict=True)]
        return made

    def _of(self, row: dict[str, Any]) -> list[Passage]:
        made = []
        for name in self.columns:
            if name in self._lists:
                made.append(tokens_passage(row[name]))
            elif self._answers and name == "context":
                found, question = row["answers"], str(row.get("id"))
                pairs = zip(found["text"], found["answer_start"], strict=True)
                made.append(text_passage(row[name], [answer_span(question, row[name], *pair) for pair in pairs]))
            else:
                made.append(text_passage(row[name]))
        return made

    def _read(self) -> list[str]:
        return [*self.columns, *(self._beside() if self._answers else [])]

    def _beside(self) -> list[str]:
        return [name for name in ("answers", "id") if name in self._rows.column_names]

    def _check(self, start: int, rows: pa.Table) -> None:
        for name in self.columns:
            if name not in self._lists:
                check_text(self._split, start, rows, name)
                continue
            check_tokens(self._split, start, rows, name)
            for tags in TAGS:
                if tags in rows.column_names and tags != name and is_list(self._rows.features[tags]):
                    check_tags(self._split, start, rows, name, tags)

    def _notices(self) -> list[str]:
        named = [name for name, one in self._rows.features.items() if _class_label(one) and self._suffix != ".parquet"]
        return [f"{named[0]} is written as numbers; give a .parquet name to keep the names of classes"] if named else []


def check_tokens(split: str, start: int, rows: pa.Table, name: str) -> None:
    """Raises DataError where a column holds no lists of words."""
    lists = rows.column(name).combine_chunks()
    if not (pa.types.is_string(lists.type.value_type) or pa.types.is_large_string(lists.type.value_type)):
        raise DataError(f"split {split}, column {name!r}: text, or lists of words, expected; got {lists.type}: choose "
                        "another --text-column")  # fmt: skip
    check_rows(split, start, lists.is_null(), f"column {name!r} is null; a list of words expected")
    owners = np.asarray(pc.filter(pc.list_parent_indices(lists), lists.flatten().is_null()))
    nulls = np.bincount(owners.astype(np.int64), minlength=len(lists))
    check_rows(split, start, nulls, f"column {name!r} holds null among its words; text expected")


def check_tags(split: str, start: int, rows: pa.Table, name: str, tags: str) -> None:
    """Raises DataError where a row has not as many tags as words."""
    words, found = (pc.list_value_length(rows.column(each)) for each in (name, tags))
    differ = pc.fill_null(pc.not_equal(words, found), False)
    if (at := pc.index(differ, True).as_py()) >= 0:
        wrong = f"{words[at].as_py()} {name} and {found[at].as_py()} {tags}; a tag a word expected"
        raise DataError(f"split {split}, row {start + at}: {wrong}: fill it or drop the row")


def view_id(name: Any, view: int) -> str:
    """A question's id, of a view of its context."""
    return f"{name}-augmented-{view}"


def batched(items: Iterable[View], size: int) -> Iterator[list[View]]:
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


def _inside(feature: Any) -> list[str]:
    """Names in a struct of lists; none in anything else."""
    return [name for name, one in feature.items() if is_list(one)] if isinstance(feature, dict) else []


def _class_label(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)
