"""How commands meet people: one line an error, exit codes, Ctrl-C, help in sections.

Exit codes: 0 done; 1 something is wrong with what was given or found; 2 usage; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

import click

from . import flags
from .store.errors import PredistillError
from .student_train.settings import TrainConfig

SHOW_TRACEBACK = "predistill.traceback"
ALL_ARGUMENTS = "predistill.all"
LONGEST_MESSAGE = 600  # characters; libraries' own errors run to pages


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken like Ctrl-C so that everything is closed in order."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


class Doors(click.Group):
    """A group whose commands end in one line and an exit code, never in a traceback that nobody asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the story

    def invoke(self, ctx: click.Context) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(0)
        except KeyboardInterrupt as error:
            self._interrupted(ctx, error)
        except Exception as error:
            self._failed(ctx, error)

    def _interrupted(self, ctx: click.Context, error: KeyboardInterrupt) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _show_traceback(ctx)
        what = "Terminated" if isinstance(error, Terminated) else "Interrupted"
        click.echo(f"{what}. {_AFTERWARDS.get(ctx.invoked_subcommand or '', '')}".strip(), err=True)
        ctx.exit(143 if isinstance(error, Terminated) else 130)

    def _failed(self, ctx: click.Context, error: Exception) -> NoReturn:
        shown = _show_traceback(ctx)
        message = " ".join(str(error).split())
        if isinstance(error, PredistillError):
            click.echo(f"Error: {message}", err=True)
        else:
            cut = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "…"
            hint = "" if shown else " (--traceback shows where)"
            click.echo(f"Error: {type(error).__name__}: {cut}{hint}".replace(": (", " ("), err=True)
        ctx.exit(1)


def example(*lines: str) -> str:
    """The `Example:` at the end of a command's help."""
    return "\b\nExample:\n" + "\n".join("  " + line for line in lines)


_AFTERWARDS = {
    "dump": "What is committed stays; the same command goes on from there.",
    "import": "What is committed stays; the same command goes on from there.",
    "merge": "Finished shards stay; the same command goes on from there.",
    "drop": "The store is whole, with the rows or without them; the same command finishes.",
    "export": "Finished files stay; the same command goes on from there.",
    "augment": "Finished parts stay; the same command goes on from there.",
    "push": "What has arrived stays; the same command goes on from there.",
    "pull": "What has arrived stays; the same command goes on from there.",
    "train": "Checkpoints stay; --resume-from-checkpoint true goes on from the last one.",
}


def _show_traceback(ctx: click.Context) -> bool:
    if ctx.meta.get(SHOW_TRACEBACK):
        traceback.print_exc(file=sys.stderr)
    return bool(ctx.meta.get(SHOW_TRACEBACK))


def common(*, json: bool = True, config: bool = False) -> list[click.Parameter]:
    """The flags that commands share: --config, --json, --traceback."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        ctx.meta[SHOW_TRACEBACK] = value

    made: list[click.Parameter] = []
    if config:
        made.append(click.Option(["--config", "config_file"], type=click.Path(dir_okay=False),
                                 help="YAML file of the same names; a flag beats the file."))  # fmt: skip
    if json:
        made.append(click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document."))
    made.append(click.Option(["--traceback"], is_flag=True, expose_value=False, is_eager=True, callback=remember,
                             help="Show where in the program an error came from."))  # fmt: skip
    return made


class TrainCommand(click.Command):
    """Takes every field of transformers.TrainingArguments, and imports transformers only to know the rare ones."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        flagged = {arg.partition("=")[0] for arg in args if arg.startswith("--") and arg != "--"}
        if "--help-all" in flagged or not flagged <= {*known, "--help"}:
            ctx.meta[ALL_ARGUMENTS] = True
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        mine = super().get_params(ctx)
        if not ctx.meta.get(ALL_ARGUMENTS):
            return mine
        taken = {parameter.name for parameter in mine}
        return [*mine, *(rare for rare in rare_arguments() if rare.name not in taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {field.name for field in dataclasses.fields(TrainConfig)}
        sections: dict[str, list[tuple[str, str]]] = {"Distillation": [], "Training": [], "Options": []}
        for parameter in self.get_params(ctx):
            title = (
                "Distillation"
                if parameter.name in own
                else "Options"
                if parameter.name in flags.SHARED or "--help" in parameter.opts
                else "Training"
            )
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                sections[title].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def show_all_help(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """--help-all: the help of a command whose arguments were all read for the sake of this flag."""
    if wanted:
        click.echo(ctx.get_help())
        ctx.exit()


def rare_arguments() -> list[click.Parameter]:
    """Flags of every field of DistillationConfig that `predistill train` does not itself set. Imports transformers."""
    with contextlib.redirect_stdout(sys.stderr):
        from .student_train.config import DistillationConfig

    return flags.parameters(
        DistillationConfig, without=("output_dir", "do_train", "do_eval", "do_predict", "local_rank")
    )
