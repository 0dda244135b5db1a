"""How far a conversion is: on stderr, after a second, where that is a terminal."""

from __future__ import annotations

import time
from types import TracebackType

_PATIENCE = 1.0  # seconds before a bar is shown


class Bar:
    """Follows work on `total` bytes."""

    def __init__(self, what: str, total: float):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bar, self._began, self._shown = self._bars.add_task(what, total=total), time.perf_counter(), False

    def advance(self, done: float) -> None:
        self._bars.advance(self._bar, done)
        if not self._shown and not self._bars.disable and time.perf_counter() - self._began > _PATIENCE:
            self._bars.start()
            self._shown = True

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bars.stop()
