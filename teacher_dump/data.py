"""Rows in: Hub datasets, saved datasets, data files. They stay memory-mapped; a slice at a time is read.

Rows that are read once, in order, without being counted or prepared beforehand: streaming.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..store import ShardPlan
from ..store.errors import ConfigError, DataError
from .config import DumpConfig
from .disk import out_of_space
from .paths import DATA_SUFFIXES, named_paths
from .rows import conll, squad
from .rows.images import as_files, may_hold_images

SLICE = 10_000  # rows read at a time
IMAGES = 500
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_CSV = {"keep_default_na": False, "na_values": [""]}  # the word "null" is text; only an empty cell is missing
Built = Callable[[Any], dict[str, Any]]  # of a builder of `datasets`, its splits
assert {*_BUILDERS, *conll.SUFFIXES} == set(DATA_SUFFIXES)


@dataclass(frozen=True)
class SourceData:
    """The splits to dump. name: Hub id, or the file's or folder's own name; revision: the Hub commit."""

    name: str
    revision: str | None
    splits: dict[str, datasets.Dataset]

    @property
    def rows(self) -> int:
        return sum(len(rows) for rows in self.splits.values())

    @property
    def features(self) -> dict[str, datasets.Features]:
        return {split: rows.features for split, rows in self.splits.items()}

    @property
    def expected(self) -> int | None:
        """Rows there will be; None where nobody knows."""
        return self.rows

    def table(self, shard: ShardPlan, columns: Sequence[str]) -> pa.Table:
        """The source rows of a shard."""
        return read(self.splits[shard.split], columns, slice(shard.start, shard.stop))


def load_rows(config: DumpConfig) -> SourceData:
    """The rows that `config` names. Raises ConfigError, DataError; OutOfSpace where the cache's disk is full."""
    with reading(config), out_of_space(Path(datasets.config.HF_DATASETS_CACHE)):
        name, revision, splits = find(config, _built)
        for split, rows in splits.items():
            if not len(rows):
                raise DataError(f"split {split} has no rows; at least one expected")
        splits = {split: squad.questions(rows) if squad.are_articles(rows) else rows for split, rows in splits.items()}
    if config.max_samples is not None:
        splits = {split: rows.select(range(min(config.max_samples, len(rows)))) for split, rows in splits.items()}
    return SourceData(name, revision, splits)


def find(config: DumpConfig, built: Built) -> tuple[str, str | None, dict[str, Any]]:
    """(name, revision, the splits that are asked for). Raises ConfigError for splits that are not there."""
    paths = named_paths(config.dataset)
    if paths is None:
        builder = datasets.load_dataset_builder(config.dataset, config.dataset_name, revision=config.dataset_revision)
        return config.dataset, builder.hash, _chosen(config, built(builder))
    found = _from_path(paths[""], built) if "" in paths else {s: _alone(s, one, built) for s, one in paths.items()}
    return _name(paths), None, _chosen(config, found)


def read(rows: datasets.Dataset, columns: Sequence[str], at: slice | Sequence[int]) -> pa.Table:
    """Some rows, of those columns that there are, straight from the memory map; images as files."""
    present = [name for name in columns if name in rows.column_names]
    return as_files(rows.select_columns(present).with_format("arrow")[at], rows.features)


def slices(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """(first row, table) of all rows, SLICE at a time, or IMAGES where a column holds some."""
    step = IMAGES if any(may_hold_images(rows.features.get(name)) for name in columns) else SLICE
    for start in range(0, len(rows), step):
        yield start, read(rows, columns, slice(start, start + step))


def check_columns(source: SourceData, wanted: Sequence[str]) -> None:
    """Raises DataError naming the columns that there are."""
    for split, rows in source.splits.items():
        missing = [name for name in wanted if name not in rows.column_names]
        if missing:
            raise DataError(
                f"dataset {source.name}, split {split}: no column {missing[0]!r}; it has "
                f"{', '.join(map(repr, rows.column_names))}: choose with --text-column, --label-column, …"
            )


def _from_path(path: Path, built: Built) -> dict[str, Any]:
    if path.is_file():
        return {"train": _from_file(path, built)}
    if (path / "dataset_dict.json").exists():
        return dict(datasets.load_from_disk(str(path)))
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    builder = datasets.load_dataset_builder(str(path))
    if builder.name == "csv":
        builder = datasets.load_dataset_builder(str(path), **_CSV)
    return built(builder)


def _alone(split: str, path: Path, built: Built) -> Any:
    """The one split that a path given for `split` holds."""
    found = _from_path(path, built)
    if len(found) > 1 and split not in found:
        raise ConfigError(f"--dataset {split}={path} holds {', '.join(found)}; give one of its files or folders")
    return found[split] if len(found) > 1 else next(iter(found.values()))


def _from_file(path: Path, built: Built) -> Any:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in DATA_SUFFIXES:
        raise ConfigError(f"--dataset {path}: one of {', '.join(DATA_SUFFIXES)} expected (.gz too); got {suffix!r}")
    if suffix in conll.SUFFIXES:
        return conll.load(path)
    options: dict[str, Any] = dict(_CSV) if _BUILDERS[suffix] == "csv" else {}
    if suffix == ".tsv":
        options["sep"] = "\t"
    if not path.stat().st_size:
        raise DataError(f"{path.name} is empty")
    if path.suffix == ".parquet" and not pq.read_metadata(path).num_rows:
        raise DataError(f"{path.name} has no rows; at least one expected")
    return built(datasets.load_dataset_builder(_BUILDERS[suffix], data_files=str(path), **options))["train"]


def _built(builder: Any) -> dict[str, datasets.Dataset]:
    """Every split of a builder, prepared. Raises DataError for a split without rows."""
    builder.download_and_prepare()
    for split, about in builder.info.splits.items():
        if not about.num_examples:
            raise DataError(f"split {split} has no rows; at least one expected")
    return dict(builder.as_dataset())


def _name(paths: dict[str, Path]) -> str:
    return ",".join(f"{split}={path.resolve().name}" if split else path.resolve().name for split, path in paths.items())


def _chosen(config: DumpConfig, found: dict[str, Any]) -> dict[str, Any]:
    found = {str(split): rows for split, rows in found.items()}
    unknown = [split for split in config.split if split not in found]
    if unknown:
        raise ConfigError(f"--split {unknown[0]}: dataset {config.dataset} has {', '.join(found)}")
    return {split: found[split] for split in config.split or found}


@contextlib.contextmanager
def reading(config: DumpConfig, where: str = "") -> Iterator[None]:
    """`datasets` at work: it says nothing, and what it raises is one line. where: in the dataset."""
    with _quiet(), _one_line(config.dataset, where):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no log lines of `datasets` while it prepares files; errors still come as exceptions."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _one_line(dataset: str, where: str) -> Iterator[None]:
    """What `datasets` raises, as one line; the deepest cause says most, for example which column."""
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        raise DataError(f"--dataset {dataset}: {error}") from error
    except Exception as error:
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from error
        said = " ".join(str(cause).split())[:400] or "it is empty"
        raise DataError(f"--dataset {dataset} cannot be read{where}: {said}") from error
