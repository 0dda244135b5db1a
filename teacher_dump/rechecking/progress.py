"""Rows that the teacher ran again: on stderr, after a second, where that is a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PATIENCE = 1.0  # seconds before a bar is shown


class RecheckProgress:
    """Follows `rows` rows."""

    def __init__(self, rows: int):
        self._began, self._shown = time.perf_counter(), False
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("rows re-run"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bar = self._bars.add_task("recheck", total=rows)

    def advance(self, rows: int) -> None:
        self._bars.advance(self._bar, rows)
        if not self._shown and not self._bars.disable and time.perf_counter() - self._began > _PATIENCE:
            self._bars.start()
            self._shown = True

    def __enter__(self) -> RecheckProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bars.stop()
