"""Where a Trainer's progress goes: to stderr, with bars only on a terminal. stdout is for data."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging


class LogToStderr(TrainerCallback):
    """One line a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in logs.items()]  # fmt: skip
            print(f"step {state.global_step}: {', '.join(shown)}", file=sys.stderr)


class BarsOnStderr(ProgressCallback):
    """transformers' bars, whose log lines would go to stdout."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, float)}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.training_bar.write(f"step {state.global_step}: {shown}", file=sys.stderr)


def say(line: str) -> None:
    """On the main process alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr)


def show_progress(trainer: Trainer) -> None:
    """Put our callbacks in place of those that print to stdout."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    bars = sys.stderr.isatty() and not trainer.args.disable_tqdm
    trainer.add_callback(BarsOnStderr() if bars else LogToStderr())


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr, and their bars only to a terminal."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        yield
