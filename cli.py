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
from .report import ReportConfig
from .store.convert.config import DropConfig, ExportConfig, MergeConfig
from .store.errors import PredistillError
from .store.remote.config import PullConfig, PushConfig
from .student_train.settings import TrainConfig
from .teacher_dump.augmentation.config import AugmentConfig
from .teacher_dump.config import DumpConfig
from .teacher_dump.importing.config import ImportConfig
from .teacher_dump.rechecking.config import RecheckConfig


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


@cli.command(
    params=[store_argument(), *flags.parameters(RecheckConfig), *common()],
    epilog=example("predistill verify stores/reviews", "predistill verify stores/reviews --teacher runs/teacher"),
)
@click.pass_context
def verify(ctx: click.Context, store: str, as_json: bool, **_: Any) -> None:
    """Check that every byte is what the dump wrote, and what its teacher says. Exit code 1 where it is not."""
    asked = RecheckConfig(**flags.settings(ctx, RecheckConfig)[0])
    with output.data_stream() as stream:
        from .store.verify import verify as run

        found = run(store)
        if asked.teacher is not None:
            from .teacher_dump.recheck import rechecked

            try:
                found = rechecked(store, asked, found)
            except PredistillError:  # what is known of the bytes is said all the same
                output.emit(stream, {**found, "ok": False}, as_json, output.verify_page)
                raise
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


@cli.command(
    params=[*flags.parameters(MergeConfig), *common()],
    epilog=example(
        "predistill merge stores/monday stores/tuesday --output-dir stores/both",
        "predistill merge stores/bert stores/roberta --output-dir stores/ensemble",
    ),
)
@click.pass_context
def merge(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Make one store of several: more splits, more rows; more fields of the same rows, or more teachers of them."""
    own, _rest = flags.settings(ctx, MergeConfig)
    with output.data_stream() as stream:
        from .store.convert.merge import merge as run

        output.emit(stream, run(MergeConfig(**own)), as_json, output.info_page)


@cli.command(
    params=[*flags.parameters(DropConfig), *common()],
    epilog=example("predistill drop stores/reviews --where \"split = 'train' AND source_index IN (12, 40)\" --yes"),
)
@click.pass_context
def drop(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Take rows out of a store for good; only the shards that hold them are written anew."""
    own, _rest = flags.settings(ctx, DropConfig)
    with output.data_stream() as stream:
        from .store.convert.drop import drop as run

        output.emit(stream, run(DropConfig(**own)), as_json, output.drop_page)


@cli.command(
    params=[*flags.parameters(ExportConfig), *common()],
    epilog=example("predistill export stores/reviews exported --format parquet"),
)
@click.pass_context
def export(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Write a store in another format, for those who must. The same command goes on."""
    own, _rest = flags.settings(ctx, ExportConfig)
    with output.data_stream() as stream:
        from .store.convert.export import export as run

        output.emit(stream, run(ExportConfig(**own)), as_json, output.export_page)


@cli.command(
    "import",
    params=[*flags.parameters(ImportConfig), *common(config=True)],
    epilog=example("predistill import captures stores/captured --tokenizer Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-235B"),
)
@click.pass_context
def import_(ctx: click.Context, config_file: str | None, as_json: bool, **_: Any) -> None:
    """Make a store of teacher outputs that there are already: top-k log-probabilities a token, in others' formats."""
    own, _rest = flags.settings(ctx, ImportConfig, config_file)
    with output.data_stream() as stream:
        from .teacher_dump.import_outputs import import_outputs as run

        output.emit(stream, run(ImportConfig(**own)), as_json, output.info_page)


@cli.command(
    params=[*flags.parameters(PushConfig), *common()],
    epilog=example(
        "predistill push stores/reviews hf://datasets/me/reviews-teacher --license cc-by-4.0 \\",
        "                --teacher-license apache-2.0 --dataset-license cc-by-4.0",
    ),
)
@click.pass_context
def push(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Put a store where others can read it: the Hub, S3, any fsspec URL. The same command sends what is missing."""
    own, _rest = flags.settings(ctx, PushConfig)
    with output.data_stream() as stream:
        from .store.remote.push import push as run

        output.emit(stream, run(PushConfig(**own)), as_json, output.sharing_page)


@cli.command(
    params=[*flags.parameters(PullConfig), *common()],
    epilog=example(
        "predistill pull hf://datasets/me/reviews-teacher stores/reviews --split validation --fields teacher_logits"
    ),
)
@click.pass_context
def pull(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Take a store, or a part of one, from elsewhere, and check every byte. The same command goes on."""
    own, _rest = flags.settings(ctx, PullConfig)
    with output.data_stream() as stream:
        from .store.remote.pull import pull as run

        output.emit(stream, run(PullConfig(**own)), as_json, output.sharing_page)


@cli.command(
    params=[*flags.parameters(ReportConfig), *common()],
    epilog=example("predistill report stores/reviews runs/small runs/labels-only --output report.html"),
)
@click.pass_context
def report(ctx: click.Context, as_json: bool, **_: Any) -> None:
    """Draw stores and runs on one HTML page: what the teacher knows, what it costs, how students compare."""
    own, _rest = flags.settings(ctx, ReportConfig)
    with output.data_stream() as stream:
        from .report import report as run

        output.emit(stream, run(ReportConfig(**own)), as_json, output.report_page)


def main() -> None:
    cli(prog_name="predistill")


if __name__ == "__main__":
    main()
