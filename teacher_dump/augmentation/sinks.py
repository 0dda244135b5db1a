"""Rows written as people keep them, a table at a time: jsonl, json, csv, tsv, parquet. Equal rows, equal bytes."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from ...store.errors import ConfigError

Write = Callable[[pa.Table], None]


@contextlib.contextmanager
def text_file(path: Path, zipped: bool) -> Iterator[TextIO]:
    """A file of UTF-8 text; zipped: by gzip, without name or time in it."""
    with open(path, "wb") as raw:
        inner = gzip.GzipFile("", "wb", 6, raw, mtime=0) if zipped else contextlib.nullcontext(raw)
        with inner as binary, io.TextIOWrapper(binary, "utf-8", newline="") as text:
            yield text


@contextlib.contextmanager
def sink(path: Path, suffix: str, zipped: bool, schema: pa.Schema) -> Iterator[Write]:
    """A function that writes tables of `schema` to `path`, in the format of `suffix`."""
    if suffix == ".parquet":
        with pq.ParquetWriter(path, schema) as writer:
            yield writer.write_table
        return
    with text_file(path, zipped) as text:
        if suffix in (".csv", ".tsv"):
            yield _delimited(text, "," if suffix == ".csv" else "\t", schema.names)
        elif suffix == ".jsonl":
            yield lambda table: text.writelines(as_json(row) + "\n" for row in table.to_pylist())
        else:
            yield _array(text)
            text.write("\n]\n")


def check_columns_fit(suffix: str, schema: pa.Schema) -> None:
    """Raises ConfigError for a column that the format cannot hold."""
    for field in schema:
        if suffix != ".parquet" and _holds_bytes(field.type):
            raise ConfigError(f"OUTPUT: column {field.name!r} holds bytes, and {suffix} is text; give a .parquet name")
        if suffix in (".csv", ".tsv") and pa.types.is_nested(field.type):
            raise ConfigError(
                f"OUTPUT: column {field.name!r} holds {field.type}, which {suffix} cannot; give a .jsonl name"
            )


def as_json(value: Any) -> str:
    """One line; NaN, which JSON has not, is null, and dates are text."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_without_nan(value), ensure_ascii=False, default=str)


def _delimited(text: TextIO, delimiter: str, names: list[str]) -> Write:
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    return lambda table: writer.writerows(row.values() for row in table.to_pylist())


def _array(text: TextIO) -> Write:
    begin = "[\n"

    def write(table: pa.Table) -> None:
        nonlocal begin
        for row in table.to_pylist():
            text.write(begin + as_json(row))
            begin = ",\n"

    return write


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _holds_bytes(kind: pa.DataType) -> bool:
    inner = [kind.field(at).type for at in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return any(map(_holds_bytes, inner)) or any(
        test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    )
