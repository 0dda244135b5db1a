"""Rows looked at: on stderr, after a second, where that is a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PATIENCE = 1.0  # seconds before a bar is shown


class ImportProgress:
    """Follows rows, of which it may not be known how many there are. what: "rows checked"."""

    def __init__(self, what: str, total: int | None = None):
        self._done, self._began, self._shown = 0, time.perf_counter(), False
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn(f"{{task.completed:,.0f}} {what}"), BarColumn(), TextColumn("{task.fields[speed]} rows/s"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bar = self._bars.add_task(what, total=total, speed="–")

    def advance(self) -> None:
        self._done += 1
        seconds = time.perf_counter() - self._began
        if self._bars.disable or seconds < _PATIENCE:
            return
        if not self._shown:
            self._bars.start()
            self._shown = True
        self._bars.update(self._bar, completed=self._done, speed=f"{self._done / seconds:,.0f}")

    def __enter__(self) -> ImportProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bars.stop()
