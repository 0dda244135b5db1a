"""stdout is data: one JSON document, CSV, or a table; whatever libraries print goes to stderr."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from .flags import format_size

TABLE_ROWS = 1000  # more are for csv and json


@contextmanager
def data_stream() -> Iterator[TextIO]:
    """A stream onto the real stdout; meanwhile, and for what libraries flush at exit, file descriptor 1 is stderr."""
    sys.stdout.flush()
    try:
        is_real = sys.stdout.fileno() == 1
    except (OSError, ValueError):
        is_real = False
    if not is_real:
        replaced = sys.stdout
        with redirect_stdout(sys.stderr):
            yield replaced
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    with open(kept, "w", encoding="utf-8", closefd=True) as stream, redirect_stdout(sys.stderr):
        yield stream


def emit(stream: TextIO, value: Any, json_wanted: bool, page: Callable[[TextIO, Any], None]) -> None:
    """The result of a command: as one JSON document, or as a page for people; under torchrun, of rank 0 alone."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if json_wanted:
        stream.write(as_json(value) + "\n")
    else:
        page(stream, value)


def as_json(value: Any) -> str:
    """One JSON document; NaN and infinities, which JSON has not, are null."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return value if value is None or isinstance(value, str | int) else str(value)


def write_json_rows(stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A JSON array of one object a row, written as the rows come."""
    opened = "["
    for row in rows:
        stream.write(f"{opened}\n  {json.dumps(_plain(dict(zip(columns, row, strict=True))), ensure_ascii=False)}")
        opened = ","
    stream.write("[]\n" if opened == "[" else "\n]\n")


def write_csv_rows(stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """RFC 4180, with \\n as line end; an empty cell is NULL."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell.hex() if isinstance(cell, bytes) else cell for cell in row] for row in rows)


def write_table(stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """Columns for people, drawn by rich on a terminal and plain elsewhere; numbers stand to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [list(row) for row in rows]
    terminal = stream.isatty()
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD if terminal else None,
                  show_header=any(columns), pad_edge=False)  # fmt: skip
    for at, name in enumerate(columns):
        numbers = all(isinstance(row[at], int | float) for row in shown if row[at] is not None)
        table.add_column(Text(name), justify="right" if numbers and shown else "left", overflow="fold")
    for row in shown:
        table.add_row(*(Text(_cell(cell)) for cell in row))
    Console(file=stream, width=None if terminal else 10_000, highlight=False).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.1f}"
    if isinstance(value, bytes):
        return value.hex()
    return "" if value is None else str(value)


# ---- one page a command ----


def pairs_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    write_table(stream, ("", ""), found.items())


def info_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    """What `info` and `dump` say: keys of the JSON document, short."""
    made_from = {name: _named(found.get(name)) for name in ("teacher", "tokenizer", "processor", "dataset")}
    if found.get("teachers"):
        said = (f"{one['prefix']}… {_named(one['teacher'] | {'name': one['name']})}" for one in found["teachers"])
        made_from = {"teachers": "; ".join(said), **made_from, "teacher": None}
    tokens = any(split["tokens"] for split in found["splits"].values())  # none of images
    about = {
        "store": found.get("path"),
        "task": found.get("task"),
        "state": "complete" if found.get("complete") else "unfinished: the same dump goes on",
        "size": format_size(found.get("bytes", 0)),
        "labels": ", ".join(found.get("label_names") or ()) or None,
        **made_from,
    }
    if "seconds" in found:
        about["time"] = f"{found['seconds']:,.1f} s, the teacher {found['teacher_seconds']:,.1f} s"
        about["speed"] = f"{found['tokens_per_second']:,.0f} {'tokens' if tokens else 'rows'} a second"
    pairs_page(stream, {name: value for name, value in about.items() if value})
    titles = ("samples", "shards", *(["tokens"] if tokens else []))
    splits = [
        (name, *(split[key] for key in titles)) for name, split in found["splits"].items()
    ]
    stream.write("\n")
    write_table(stream, ("split", *titles), splits)
    fields = [
        (name, field["codec"], field["dtype"], _size(field["bytes"])) for name, field in found["fields"].items()
    ]
    stream.write("\n")
    write_table(stream, ("field", "codec", "dtype", "size"), fields)


def _size(count: int | None) -> str:
    return "" if count is None else format_size(count)


def _is_hash(key: str) -> bool:
    """Of all of it: neither of a teacher's config, nor of the first rows, which a stream was planned by."""
    return key == "commit" or ("sha256" in key and not key.startswith(("config_", "first_")))


def _named(identity: Any) -> str | None:
    """The name of a teacher, tokenizer or dataset, with the start of its hash."""
    if not isinstance(identity, Mapping):
        return None if identity is None else str(identity)
    name = next((identity[key] for key in ("name", "id", "path", "class") if identity.get(key)), "")
    digest = next((str(value) for key, value in identity.items() if _is_hash(key) and value), "")
    return " ".join(part for part in (str(name), digest[:12]) if part)


def plan_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    pairs_page(stream, {
        "samples": _known(found["samples"], "{:,}"),
        "size": f"{_size(found['bytes']) or 'unknown'}, {found['bytes_per_sample']:,.1f} bytes a sample",
        "shards": _known(found["shards"], "{}"),
        "time": _known(found["seconds"], "{:,.0f} s, from a pilot"),
        "free on disk": format_size(found["free_bytes"]),
    })  # fmt: skip
    if found.get("candidates"):
        names = ("logits kept", "bytes a token", "size", "mass", "KL", "KL at T=2", "with its log-sum-exp", "")
        stream.write("\n")
        write_table(stream, names, [_candidate_row(one, found["chosen"]) for one in found["candidates"]])
        stream.write("\nKL: from the teacher's distribution to what can be made of it, nats a token, on pilot rows.\n")
    if found.get("codecs"):
        titles = ("inside the teacher", "kept as", "bytes a token", "cosine", "relative L2", "")
        stream.write("\n")
        write_table(stream, titles, map(_codec_row, found["codecs"]))
        stream.write("\nWhat a reader gets back against what the teacher said, on pilot rows; of the worst layer.\n")


def _known(value: Any, form: str) -> str:
    """Of a stream, nobody knows how much will come."""
    return "unknown" if value is None else form.format(value)


def _candidate_row(one: Mapping[str, Any], chosen: str | None) -> list[Any]:
    measured = [one[name] for name in ("kl", "kl_at_2", "kl_at_2_with_logsumexp")]
    return [
        one["name"], f"{one['bytes_per_token']:,.1f}", _size(one["bytes"]) or "unknown", f"{one['mass']:.1%}",
        *("-" if value is None else f"{value:.3g}" for value in measured),
        "chosen" if one["name"] == chosen else "",
    ]  # fmt: skip


def _codec_row(one: Mapping[str, Any]) -> list[Any]:
    if one["relative_l2"] is None:
        measured = ["beyond its range", "-"]
    else:
        measured = [f"{one['cosine']:.6f}", f"{one['relative_l2']:.2g}"]
    chosen = "chosen" if one["chosen"] else ""
    return [one["field"], one["codec"], f"{one['bytes_per_token']:,.1f}", *measured, chosen]


def verify_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    what = f"{found['shards']} shards, {found['samples']:,} samples, {format_size(found['bytes'])}"
    stream.write(f"ok: {what}\n" if found["ok"] else f"{len(found['problems'])} problems in {what}\n")
    if found["problems"]:
        write_table(
            stream,
            ("file", "kind", "what"),
            [(each["path"], each["kind"], each["detail"]) for each in found["problems"]],
        )
    if "recheck" in found:
        _recheck_page(stream, found["recheck"])


def _recheck_page(stream: TextIO, said: Mapping[str, Any]) -> None:
    beside = f", beside what the store has of {said['member']}" if said.get("member") else ""
    stream.write(f"\n{said['rows']} rows, seed {said['seed']}, through {said['teacher']}{beside}:\n\n")
    names = ("largest", "bound", "worst", "mean", "beyond", "values")
    write_table(stream, ("column", "largest deviation", "its bound", "most of a bound", "mean", "beyond", "of values"),
                [(column, *(one[name] for name in names)) for column, one in said["fields"].items()])  # fmt: skip
    for one in said["differences"]:
        stream.write(f"\n{one['name']} differs: the store has {one['store']}, this teacher has {one['teacher']}")
    stream.write("\n" if said["differences"] else "")


def metrics_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    """Of a run of several stages, each stage's loss in place of all its metrics; of several teachers, one by one."""
    shown: dict[str, Any] = {}
    for name, value in found.items():
        if name == "ensemble":
            name, value = "ensemble_weights", value["weights"]
        if not isinstance(value, Mapping):
            shown[name] = value
        elif name != "stages":
            shown |= {f"{name}, {one}": each for one, each in value.items()}
    stages = {f"train_loss, {name}": one.get("train_loss") for name, one in found.get("stages", {}).items()}
    pairs_page(stream, {**shown, **stages})


def quickstart_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    names = found["columns"]
    write_table(stream, names, ([row.get(name) for name in names] for row in found["table"]))
    stream.write("\n" + found["told"] + "\n")


def sharing_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    """What `push` and `pull` say."""
    sizes = {name: format_size(found[name]) for name in ("bytes", "sent", "fetched") if name in found}
    left = found.get("left_out") or {"shards": 0, "fields": []}
    about = {
        **{name: value for name, value in found.items() if value is not None and name not in ("left_out", *sizes)},
        **sizes,
        "left out": f"{left['shards']} shards, {len(left['fields'])} fields" if any(left.values()) else None,
    }
    pairs_page(stream, {name.replace("_", " "): value for name, value in about.items() if value is not None})


def drop_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    """How many rows of which splits, and whether they are gone."""
    rows = ", ".join(f"{count:,} of {name}" for name, count in found["splits"].items()) or "none"
    along = f"{found['along']:,} (views of the others, or mixed with them)" if found["along"] else None
    shards = f"{found['shards']:,} written anew" if found["dropped"] else f"{found['shards']:,} to write anew"
    names = ("store", "rows", "along with others", "rows that stay", "shards")
    about = dict(zip(names, (found["output"], rows, along, f"{found['samples']:,}", shards), strict=True))
    pairs_page(stream, {name: value for name, value in about.items() if value})
    if found["rows"] and not found["dropped"]:
        stream.write("\nNothing was changed; --yes takes the rows out for good.\n")


def export_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    pairs_page(stream, {
        "output": found["output"], "format": found["format"], "files": len(found["files"]),
        "samples": f"{found['samples']:,}", "size": format_size(found["bytes"]),
    })  # fmt: skip


def report_page(stream: TextIO, found: Mapping[str, Any]) -> None:
    counted = {"stores": len(found["stores"]), "runs": len(found["runs"])}
    pairs_page(stream, {"page": found["output"], "size": format_size(found["bytes"]), **counted})


# ---- query ----

FORMATS = {"table": None, "csv": write_csv_rows, "json": write_json_rows}


def write_relation(stream: TextIO, relation: Any, form: str) -> None:
    """A DuckDB relation as a table (its first 1000 rows), csv or json."""
    rows = iter(relation.iter_rows())
    write = FORMATS[form]
    if write is not None:
        write(stream, relation.columns, rows)
        return
    write_table(stream, relation.columns, itertools.islice(rows, TABLE_ROWS))
    if next(rows, None) is not None:
        print(f"The first {TABLE_ROWS} rows; --format csv or json gives all.", file=sys.stderr)
