"""Rows and words done, and time left: on stderr, after a second, where that is a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PATIENCE = 1.0  # seconds before a bar is shown


class AugmentProgress:
    """Follows `words` words of `rows` rows; words are what time goes by."""

    def __init__(self, rows: int, words: int):
        self._rows, self._done, self._words, self._began, self._shown = rows, 0, 0, time.perf_counter(), False
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.fields[rows]} rows"), BarColumn(), TextColumn("{task.fields[speed]} words/s"),
            TimeRemainingColumn(elapsed_when_finished=True), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bar = self._bars.add_task("augment", total=words, rows=f"0/{rows}", speed="–")

    def advance(self, rows: int, words: int) -> None:
        self._done += rows
        self._words += words
        seconds = time.perf_counter() - self._began
        if self._bars.disable or seconds < _PATIENCE:
            return
        if not self._shown:
            self._bars.start()
            self._shown = True
        speed = f"{self._words / seconds:,.0f}"
        self._bars.update(self._bar, completed=self._words, rows=f"{self._done}/{self._rows}", speed=speed)

    def __enter__(self) -> AugmentProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bars.stop()
