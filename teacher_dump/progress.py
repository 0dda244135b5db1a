"""Lines and bars on stderr: how far a dump is, an import, augmented rows."""

from __future__ import annotations

import sys

from rich.filesize import decimal
from rich.progress import BarColumn, TimeRemainingColumn

from ..store.progress import Bar, is_first_rank
from .shards import Tally


def say(line: str) -> None:
    """One line for a person; of several ranks, the first one's."""
    if is_first_rank():
        print(line, file=sys.stderr, flush=True)


class DumpProgress(Bar):
    """Follows a dump of about `rows` stored rows and `tokens` tokens; the tokens are what time goes by. None where
    nobody knows how many will come."""

    def __init__(self, rows: float | None, tokens: float | None, tally: Tally, unit: str = "tokens"):
        self._rows, self._left, self._tally = rows, tokens, tally
        super().__init__(
            tokens, "{task.fields[rows]} rows", BarColumn(), f"{{task.fields[speed]}} {unit}/s",
            "{task.fields[written]} written", TimeRemainingColumn(elapsed_when_finished=True),
            rows=self._progress(), speed="–", written="0",
        )  # fmt: skip

    def expect(self, rows: float, tokens: float) -> None:
        """A shard turned out to have so many more rows and tokens than was thought."""
        if self._rows is not None and self._left is not None:
            self._rows += rows
            self._left += tokens

    def passed(self, rows: int, tokens: int) -> None:
        self._tally.rows += rows
        self._tally.tokens += tokens
        self.advance(
            tokens, total=self._left, rows=self._progress(),
            speed=self.speed(self._tally.tokens), written=decimal(self._tally.bytes),
        )  # fmt: skip

    def _progress(self) -> str:
        return f"{self._tally.rows}" + ("" if self._rows is None else f"/{self._rows:.0f}")


class RowProgress(Bar):
    """Follows rows; where it is not known how many there are, no end is shown. what: "rows checked"."""

    def __init__(self, what: str, total: int | None = None):
        self._rows = 0
        super().__init__(
            total, f"{{task.completed:,.0f}} {what}", BarColumn(), "{task.fields[speed]} rows/s", speed="–"
        )

    def passed(self, rows: int = 1) -> None:
        self._rows += rows
        self.advance(rows, speed=self.speed(self._rows))


class WordProgress(Bar):
    """Follows `words` words of `rows` rows; words are what time goes by."""

    def __init__(self, rows: int, words: int):
        self._rows, self._words, self._of = 0, 0, rows
        super().__init__(
            words, "{task.fields[rows]} rows", BarColumn(), "{task.fields[speed]} words/s",
            TimeRemainingColumn(elapsed_when_finished=True), rows=f"0/{rows}", speed="–",
        )  # fmt: skip

    def passed(self, rows: int, words: int) -> None:
        self._rows += rows
        self._words += words
        self.advance(words, rows=f"{self._rows}/{self._of}", speed=self.speed(self._words))
