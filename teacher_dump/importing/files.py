"""Rows out of parquet and JSON files, some at a time: a file need not fit in memory (one JSON document must)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...store.errors import ConfigError, DataError
from ..config import named_paths

PARQUET, LINES, DOCUMENT = ".parquet", ".jsonl", ".json"
_SUFFIXES = (PARQUET, LINES, DOCUMENT)
_ROWS = 32  # of a parquet file that are read together; one may have megabytes
_LARGEST = 2**30  # bytes of a line, and of a JSON file that is one document, unpacked
_NOT_ROWS = {"dataset_info.json", "state.json", "dataset_infos.json", "config.json"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """name: of the files or folder. splits: the files of each, in order. sizes: rows of those read to their end."""

    name: str
    splits: dict[str, list[Path]]
    sizes: dict[Path, int] = field(default_factory=dict)
    _found: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return next(iter(self.splits.values()))[0].parent

    def read(self, split: str, columns: Sequence[str] | None, start: int = 0) -> Iterator[Row]:
        """The rows of a split from row `start` on; files before it are not opened where their rows are known."""
        for path in self.splits[split]:
            size = self.sizes.get(path)
            if size is not None and start >= size:
                start -= size
                continue
            self._found.setdefault(path, _state(path))
            count = start
            for row in rows(path, columns, start):
                yield row
                count += 1
            self.sizes[path], start = count, 0

    def check_unchanged(self) -> None:
        """Raises DataError where a file is no longer what it was when it was first read."""
        changed = next((path for path, state in self._found.items() if _state(path) != state), None)
        if changed is not None:
            raise DataError(f"{changed.name} changed while it was read: let it be, and import again with --overwrite")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def find(source: str) -> Sources:
    """The files that SOURCE names. Raises ConfigError where there are none."""
    try:
        paths = named_paths(source)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--dataset", "SOURCE", 1)) from error
    if paths is None:
        raise ConfigError(
            f"SOURCE {source}: a file or folder expected; there is none (what is on the Hub is fetched with: hf "
            f"download --repo-type dataset {source} --local-dir FOLDER)"
        )
    name = ",".join(f"{split}={path.resolve().name}" if split else path.resolve().name for split, path in paths.items())
    return Sources(name, {split or "train": _files(path) for split, path in paths.items()})


def first_row(path: Path) -> Row:
    """Raises DataError where the file has none."""
    for row in rows(path, None, 0):
        return row
    raise DataError(f"{path.name}: a row expected; it has none")


def rows(path: Path, columns: Sequence[str] | None, skip: int) -> Iterator[Row]:
    """The rows of a file after the first `skip`: of parquet with these columns, lists as Arrow arrays.

    Raises DataError for a file that cannot be read, naming the line of one that is no JSON object.
    """
    try:
        if _suffix(path) == PARQUET:
            yield from _parquet(path, columns, skip)
        elif _suffix(path) == LINES:
            yield from _lines(path, skip)
        else:
            yield from _document(path)[skip:]
    except (pa.ArrowException, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _suffix(path) not in _SUFFIXES:
            raise ConfigError(f"SOURCE {path}: one of {', '.join(_SUFFIXES)} expected; got {path.suffix!r}")
        return [path]
    for suffix in _SUFFIXES:
        found = [
            file for file in path.rglob("*")
            if _suffix(file) == suffix and file.is_file() and file.name not in _NOT_ROWS
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]  # fmt: skip
        if found:
            return sorted(found, key=lambda file: _natural(file.relative_to(path).as_posix()))
    raise ConfigError(f"SOURCE {path}: files that end in {', '.join(_SUFFIXES)} expected; the folder has none")


def _natural(name: str) -> list[tuple[int, str]]:
    """data_2 before data_10: numbers by their size."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz") if not name.endswith(".parquet.gz") else name).suffix


def _parquet(path: Path, columns: Sequence[str] | None, skip: int) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        wanted = there if columns is None else [name for name in columns if name in there]
        groups: list[int] = []
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if not groups and skip >= size:
                skip -= size
            else:
                groups.append(group)
        if not groups:
            return
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=wanted, use_threads=False):
            for at in range(skip, batch.num_rows):
                yield {name: _value(batch.column(name)[at]) for name in wanted}
            skip = max(skip - batch.num_rows, 0)


def _value(scalar: pa.Scalar) -> Any:
    if not scalar.is_valid:
        return None
    return scalar.values if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar) else (
        scalar.as_py()
    )  # fmt: skip


def _lines(path: Path, skip: int) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LARGEST + 1), b""), 1):
            if len(line) > _LARGEST:
                raise DataError(f"{path.name}, line {number}: at most 1 GB expected")
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            yield _object(_parsed(line, f"{path.name}, line {number}"), f"{path.name}, line {number}")


def _document(path: Path) -> list[Row]:
    """A JSON file of one object, or a list of them; JSON lines under that name too."""
    with _opened(path) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise DataError(f"{path.name}: a JSON document of at most 1 GB expected; write it as lines, in a {LINES} file")
    try:
        found = json.loads(text)
    except ValueError as error:
        if b"\n" not in text.strip():
            raise DataError(f"{path.name} is not JSON ({error})") from error
        return list(_lines(path, 0))
    except RecursionError as error:
        raise DataError(f"{path.name} is not JSON that can be read ({error})") from error
    each = found if isinstance(found, list) else [found]
    return [_object(one, f"{path.name}, entry {at}") for at, one in enumerate(each)]


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: one JSON object a row expected; got {type(value).__name__}")
    return value
