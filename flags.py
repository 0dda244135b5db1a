"""Dataclass fields become flags, and flags or a YAML file become settings.

A field `shard_size: int` with metadata {"help": …, "unit": "bytes"} is `--shard-size 256MB`. Metadata:
help (a sentence), unit ("bytes": the flag takes sizes; others are shown), choices, argument (positional),
flag=False (Python only). Lists are repeated or comma separated, booleans are --name/--no-name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from .store.errors import ConfigError
from .teacher_dump.config import parse_size

_MARK = "--config"
SHARED = {"config_file", "as_json", "traceback", "help", "help_all"}  # flags that are no settings


def _usual(help: str) -> Any:
    return dataclasses.field(default=None, metadata={"help": help})


@dataclasses.dataclass
class UsualTrainingArguments:
    """The fields of transformers.TrainingArguments that `train --help` shows, so that help need not import it.

    The defaults are those of transformers, except where the help says otherwise; a test holds names and types.
    """

    learning_rate: float | None = _usual("Default: 5e-5; of bilstm-cnn 2e-3.")
    num_train_epochs: float | None = _usual("Default: 3.")
    max_steps: int | None = _usual("Steps in all; beats --num-train-epochs. Default: -1, which is no limit.")
    per_device_train_batch_size: int | None = _usual("Default: 8.")
    per_device_eval_batch_size: int | None = _usual("Default: 8.")
    gradient_accumulation_steps: int | None = _usual("Batches to an optimizer step. Default: 1.")
    warmup_steps: float | None = _usual("Steps, or a share of all steps when below 1. Default: 0.")
    weight_decay: float | None = _usual("Default: 0.")
    lr_scheduler_type: str | None = _usual("linear, cosine, constant_with_warmup, … Default: linear.")
    seed: int | None = _usual("Of weights, order of rows and dropout. Default: 42.")
    bf16: bool | None = _usual("Compute in bfloat16.")
    fp16: bool | None = _usual("Compute in float16 (GPU).")
    eval_strategy: str | None = _usual("no, steps or epoch. Default: epoch, where there is a split to evaluate on.")
    eval_steps: float | None = _usual("Steps between evaluations with --eval-strategy steps.")
    save_strategy: str | None = _usual("no, steps, epoch or best: when to write checkpoints. Default: steps.")
    save_steps: float | None = _usual("Default: 500.")
    save_total_limit: int | None = _usual("Checkpoints to keep. Default: all.")
    load_best_model_at_end: bool | None = _usual("End with the best checkpoint, not with the last step.")
    metric_for_best_model: str | None = _usual("As in eval_accuracy. Default: eval_loss.")
    logging_steps: float | None = _usual("Default: 500.")
    report_to: str | None = _usual("wandb, tensorboard, … Default: none.")
    use_cpu: bool | None = _usual("Stay on the CPU though there is an accelerator.")


def format_size(count: float) -> str:
    """256000000 -> "256 MB", to three digits, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


class Size(click.ParamType):
    """Bytes, written 256MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Choice(click.Choice):
    """One of some; of `refused` ones, a line that says why not."""

    def __init__(self, choices: Iterable[str], refused: Mapping[str, str]):
        super().__init__(list(choices))
        self._refused = refused

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self._refused:
            self.fail(self._refused[value], param, ctx)
        return super().convert(value, param, ctx)


class JsonOrText(click.ParamType):
    """A JSON object where the text starts with a brace; otherwise the text, for example the path of a file."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or not value.lstrip().startswith("{"):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"not a JSON object: {error}", param, ctx)


def parameters(config: type, *, without: Iterable[str] = ()) -> list[click.Parameter]:
    """The click parameters of a dataclass, in the order of its fields; None stands for "not given"."""
    hints = typing.get_type_hints(config)
    left_out = set(without)
    made = []
    for field in dataclasses.fields(config):
        if field.init and field.metadata.get("flag", True) and field.name not in left_out:
            made.append(_parameter(field, _without_none(hints[field.name])))
    return [parameter for parameter in made if parameter is not None]


def _without_none(hint: Any) -> tuple[Any, ...]:
    """The members of a union other than None: `int | None` -> (int,)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def _parameter(field: dataclasses.Field, members: tuple[Any, ...]) -> click.Parameter | None:
    kind = _kind(field, members)
    listed = any(typing.get_origin(member) in (list, tuple) for member in members) and str not in members
    if field.metadata.get("argument"):
        return click.Argument(
            [field.name],
            metavar=field.name.upper().rstrip("S") + ("..." if listed else ""),
            nargs=-1 if listed else 1,
            required=False,
            default=None,
        )
    flag = "--" + field.name.replace("_", "-")
    about: dict[str, Any] = {"help": _help(field), "default": None}
    if bool in members and str not in members:
        return click.Option([f"{flag}/--no-{flag[2:]}", field.name], **about)
    if kind is None:
        return None
    if listed:
        return click.Option([flag, field.name], multiple=True, callback=_split_commas(kind), **about)
    return click.Option([flag, field.name], type=kind, **about)


def _kind(field: dataclasses.Field, members: tuple[Any, ...]) -> Any:
    """The click type of one value; None for what only Python can say."""
    if field.metadata.get("unit") == "bytes":
        return Size()
    choices = field.metadata.get("choices")
    if choices and all(isinstance(choice, str) for choice in choices):
        return Choice(list(choices), field.metadata.get("refused", {}))
    inner = [
        part for member in members if typing.get_origin(member) in (list, tuple) for part in typing.get_args(member)
    ]
    names = [typing.get_origin(member) or member for member in (members if str in members else inner or members)]
    if dict in names:
        return JsonOrText()
    if str in names:
        return click.STRING
    return next((kind for kind in (float, int, bool) if kind in names), None)


def _help(field: dataclasses.Field) -> str:
    """The field's sentence, and its default where the sentence does not speak of one."""
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"{text} Required."
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(value, "value", value)  # an enum's own word
    if "default" in text.lower() or value is None or value is False or value in ("", [], (), {}):
        return text
    return f"{text} Default: {_written(field, value)}."


def _written(field: dataclasses.Field, value: Any) -> str:
    """A value as it is typed."""
    if value is True:
        return "on"
    if field.metadata.get("unit") == "bytes" and isinstance(value, int):
        return format_size(value).replace(" ", "")
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split_commas(kind: Any) -> Callable[[click.Context, click.Parameter, Any], list[Any] | None]:
    def split(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Any] | None:
        parts = [part.strip() for value in values for part in str(value).split(",") if part.strip()]
        chosen = click.types.convert_type(kind)
        return [chosen.convert(part, parameter, ctx) for part in parts] if values else None

    return split


def given(ctx: click.Context, names: Iterable[str | None]) -> dict[str, Any]:
    """What was typed among these names: a flag that was not given is left to its dataclass's default."""
    wanted = set(names)
    typed = {name: value for name, value in ctx.params.items() if name in wanted and value not in (None, ())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in typed.items()}


def settings(
    ctx: click.Context, config: type, file: str | None = None, needed: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of `config`, settings of other names), from a YAML file and from flags; a flag beats the file.

    `needed`: names that must be given, besides the fields without a default. Raises ConfigError for a bad file.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    known = {parameter.name: parameter for parameter in ctx.command.get_params(ctx) if parameter.name not in SHARED}
    merged = {**(read_config(file, known, ctx) if file else {}), **given(ctx, known)}
    for name, field in fields.items():
        bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if (bare or name in needed) and name not in merged:
            raise click.MissingParameter(ctx=ctx, param=known[name])
    own = {name: value for name, value in merged.items() if name in fields}
    return own, {name: value for name, value in merged.items() if name not in fields}


def read_config(file: str, known: Mapping[Any, click.Parameter], ctx: click.Context) -> dict[str, Any]:
    """The settings in a YAML file, converted as flags are. Raises ConfigError naming an unknown key or bad value."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_MARK} {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{_MARK} {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{_MARK} {file} holds settings as `name: value`; got a {type(content).__name__}")
    read = {}
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{_MARK} {file}: {unknown_setting(str(key), [str(each) for each in known])}")
        if value is not None:
            read[name] = _from_yaml(file, known[name], value, ctx)
    return read


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """ "no setting is called 'tempature'; did you mean 'temperature'?" """
    near = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"no setting is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _from_yaml(file: str, parameter: click.Parameter, value: Any, ctx: click.Context) -> Any:
    try:
        if isinstance(parameter, click.Argument) or parameter.multiple:
            values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
            return parameter.callback(ctx, parameter, values) if parameter.callback else values
        if isinstance(value, list | dict):
            if isinstance(parameter.type, JsonOrText | click.types.StringParamType):
                return value
            raise click.BadParameter(f"one value is expected; got {value!r}")
        return parameter.type.convert(value if isinstance(value, bool) else str(value), parameter, ctx)
    except click.UsageError as error:
        raise ConfigError(f"{_MARK} {file}: {parameter.name}: {error.message}") from error
