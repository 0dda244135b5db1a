"""Every command of predistill: parse, call one function, print. There is no logic here."""

from __future__ import annotations

if not __package__:  # `python cli.py` (PEP 366): this checkout is the package, whatever its folder is called
    import importlib.util
    import os
    import sys

    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _here]
    _spec = importlib.util.spec_from_file_location(
        "predistill", os.path.join(_here, "__init__.py"), submodule_search_locations=[_here]
    )
    assert _spec and _spec.loader
    sys.modules["predistill"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["predistill"])
    __package__ = "predistill"

from typing import Any

import click

from . import __version__, flags, output
from .doors import Doors, TrainCommand, common, example, show_all_help
from .quickstart import QuickstartConfig
from .student_train.settings import TrainConfig
from .teacher_dump.augmentation.config import AugmentConfig
from .teacher_dump.config import DumpConfig


def store_argument() -> click.Argument:
    return click.Argument(["store"], metavar="STORE")


@click.group(
    cls=Doors,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=example("predistill quickstart"),
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Run the teacher once. Train students forever.

    dump keeps a teacher's outputs in a folder, a store; train makes students from stores, without the teacher.
    """


@cli.command(
    params=[*flags.parameters(QuickstartConfig), *common()],
    epilog=example("predistill quickstart --output-dir predistill-quickstart"),
)
@click.pass_context
def quickstart(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """See it all: train a teacher, dump it, train students with and without it. Minutes, no network."""
    own, _rest = flags.settings(ctx, QuickstartConfig)
    with output.data_stream() as stream:
        from .quickstart import quickstart as run

        output.emit(stream, run(QuickstartConfig(**own)), as_json, output.quickstart_page)


@cli.command(
    params=[*flags.parameters(DumpConfig), *common(config=True)],
    epilog=example(
        "predistill dump --teacher runs/teacher --dataset train=train.jsonl,validation=dev.jsonl \\",
        "                --task text-classification --output-dir stores/reviews",
    ),
)
@click.pass_context
def dump(ctx: click.Context, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Run a teacher over a dataset and keep what it says in a folder. The same command again goes on."""
    own, _rest = flags.settings(ctx, DumpConfig, config_file)
    with output.data_stream() as stream:
        from .teacher_dump.dump import dump as run

        page = output.plan_page if own.get("dry_run") else output.info_page
        output.emit(stream, run(DumpConfig(**own)), as_json, page)


@cli.command(
    cls=TrainCommand,
    params=[*flags.parameters(TrainConfig), *flags.parameters(flags.UsualTrainingArguments), *common(config=True)],
    epilog=example(
        "predistill train stores/reviews --student-config students/small.json --output-dir runs/small \\",
        "                 --temperature 2 --alpha 0.7 --learning-rate 1e-4 --num-train-epochs 5",
    ),
)
@click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=show_all_help,
              help="Show every field of transformers.TrainingArguments too.")  # fmt: skip
@click.pass_context
def train(ctx: click.Context, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Train a student from stores; the teacher is never loaded. Takes every TrainingArguments field as a flag."""
    own, others = flags.settings(ctx, TrainConfig, config_file, needed=("stores", "output_dir"))
    with output.data_stream() as stream:
        from .student_train.train import train as run

        output.emit(stream, run(TrainConfig(**own, training_arguments=others)), as_json, output.metrics_page)


@cli.command(params=[store_argument(), *common()], epilog=example("predistill info stores/reviews"))
def info(store: str, as_json: bool) -> None:
    """Say what is in a store, how big it is, and what it was made from."""
    with output.data_stream() as stream:
        from .store.verify import describe

        output.emit(stream, describe(store), as_json, output.info_page)


@cli.command(
    params=[store_argument(), click.Argument(["sql"], metavar="SQL"), *common(json=False)],
    epilog=example(
        'predistill query stores/reviews "SELECT label, count(*), avg(teacher_entropy) FROM samples GROUP BY label"'
    ),
)
@click.option("--format", "form", type=click.Choice(list(output.FORMATS)), default="table", show_default=True)
def query(store: str, sql: str, form: str) -> None:
    """Ask the index which samples there are: read-only SQL over the tables samples and shards."""
    with output.data_stream() as stream:
        from .store import TeacherStore

        with TeacherStore.open(store) as opened:
            output.write_relation(stream, opened.sql(sql), form)


@cli.command(params=[store_argument(), *common()], epilog=example("predistill verify stores/reviews"))
@click.pass_context
def verify(ctx: click.Context, store: str, as_json: bool) -> None:
    """Check that every byte of a store is what the dump wrote. Exit code 1 where it is not."""
    with output.data_stream() as stream:
        from .store.verify import verify as run

        found = run(store)
        output.emit(stream, found, as_json, output.verify_page)
    ctx.exit(0 if found["ok"] else 1)


@cli.command(params=[store_argument(), *common()], epilog=example("predistill index stores/reviews --rebuild"))
@click.option(
    "--rebuild", is_flag=True, required=True, help="Make index.duckdb and samples.parquet anew from the shards."
)
def index(store: str, rebuild: bool, as_json: bool) -> None:
    """Make the index of a store anew; what it says is derived from the shards."""
    with output.data_stream() as stream:
        from .store.verify import rebuild_index

        output.emit(stream, rebuild_index(store), as_json, output.pairs_page)


@cli.command(
    params=[*flags.parameters(DumpConfig, without=("dry_run",)), *common(config=True)],
    epilog=example(
        "predistill plan --teacher runs/teacher --dataset train.jsonl --task text-classification \\",
        "                --output-dir stores/reviews",
    ),
)
@click.pass_context
def plan(ctx: click.Context, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Say what a dump would take, in bytes and seconds, measured on a few rows. Writes nothing."""
    own, _rest = flags.settings(ctx, DumpConfig, config_file)
    with output.data_stream() as stream:
        from .teacher_dump.dump import plan as run

        output.emit(stream, run(DumpConfig(**own)), as_json, output.plan_page)


@cli.command(
    params=[*flags.parameters(AugmentConfig), *common(config=True)],
    epilog=example(
        "predistill augment train.jsonl train-augmented.jsonl --masked-lm google-bert/bert-base-uncased \\",
        "                   --multiplication-factor 20",
    ),
)
@click.pass_context
def augment(ctx: click.Context, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Make more rows: words replaced by others that a masked language model would say. The same command goes on."""
    own, _rest = flags.settings(ctx, AugmentConfig, config_file)
    with output.data_stream() as stream:
        from .teacher_dump.augment import augment as run

        output.emit(stream, run(AugmentConfig(**own)), as_json, output.pairs_page)


def main() -> None:
    cli(prog_name="predistill")


if __name__ == "__main__":
    main()
