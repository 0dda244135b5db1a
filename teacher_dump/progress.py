"""Rows, tokens a second, bytes written, time left: on stderr, after a second, where that is a terminal."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .shards import Tally

_PATIENCE = 1.0  # seconds before a bar is shown


def say(line: str) -> None:
    """One line for a person, on stderr; of several ranks, the first one's."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr, flush=True)


class DumpProgress:
    """Follows a dump of about `rows` stored rows and `tokens` tokens; the tokens are what time goes by."""

    def __init__(self, rows: float, tokens: float, tally: Tally, unit: str = "tokens"):
        self._rows, self._left, self._tally = rows, tokens, tally
        self._began, self._shown = time.perf_counter(), False
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.fields[rows]} rows"), BarColumn(), TextColumn(f"{{task.fields[speed]}} {unit}/s"),
            TextColumn("{task.fields[written]} written"), TimeRemainingColumn(elapsed_when_finished=True),
            console=console, disable=not console.is_terminal or int(os.environ.get("RANK", "0")) > 0,
        )  # fmt: skip
        self._bar = self._bars.add_task("dump", total=tokens, rows=f"0/{rows:.0f}", speed="–", written="0")

    def expect(self, rows: float, tokens: float) -> None:
        """A shard turned out to have so many more rows and tokens than was thought."""
        self._rows += rows
        self._left += tokens

    def advance(self, rows: int, tokens: int) -> None:
        self._tally.rows += rows
        self._tally.tokens += tokens
        seconds = time.perf_counter() - self._began
        if self._bars.disable or seconds < _PATIENCE:
            return
        if not self._shown:
            self._bars.start()
            self._shown = True
        self._bars.update(
            self._bar, completed=self._tally.tokens, total=self._left, rows=f"{self._tally.rows}/{self._rows:.0f}",
            speed=f"{self._tally.tokens / seconds:,.0f}", written=decimal(self._tally.bytes),
        )  # fmt: skip

    def __enter__(self) -> DumpProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bars.stop()
