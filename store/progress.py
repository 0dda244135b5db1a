"""Bars on stderr: after a second, where that is a terminal, and of several ranks the first one's alone."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any, Self

_PATIENCE = 1.0  # seconds before a bar is shown


class Bar:
    """Follows work of `total`; None where nobody knows how much there is.

    columns: rich's, or formats such as "{task.fields[rows]} rows"; fields: the first values of what they name.
    """

    def __init__(self, total: float | None, *columns: Any, **fields: Any):
        from rich.console import Console
        from rich.progress import Progress, TextColumn

        console = Console(stderr=True)
        own = [TextColumn(one) if isinstance(one, str) else one for one in columns]
        self._bars = Progress(*own, console=console, disable=not (console.is_terminal and is_first_rank()))
        self._bar = self._bars.add_task("", total=total, **fields)
        self._began, self._done, self._shown = time.perf_counter(), 0.0, False

    def advance(self, done: float, **fields: Any) -> None:
        """So much more is done; fields as the columns name them, and `total` where another is known now."""
        self._done += done
        if self._bars.disable or self.seconds < _PATIENCE:
            return
        if not self._shown:
            self._bars.start()
            self._shown = True
        self._bars.update(self._bar, completed=self._done, **fields)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    def speed(self, done: float) -> str:
        """So much, a second."""
        return f"{done / max(self.seconds, 1e-9):,.0f}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bars.stop()


def bytes_bar(what: str, total: float) -> Bar:
    """Follows bytes; what: is done with them."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn

    return Bar(total, what, BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True))


def is_first_rank() -> bool:
    """Of several processes under torchrun, the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0
