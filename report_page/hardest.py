"""The rows on which the teacher is furthest from the label, with what is known of them: text, tokens, picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..store import schema
from ..store.errors import PredistillError
from ..store.images.pixels import IMAGE, decode
from ..store.reader import TeacherStore
from .asked import NUMBERS, Asked, finite, quoted
from .knowledge import class_name

MOST_ROWS = 24
MOST_COLUMNS = 8  # carried ones
LONGEST = 300  # characters of a cell
MOST_TOKENS = 128  # decoded
THUMBNAIL = 96  # pixels, the longer edge
LARGEST_IMAGE = 32 << 20  # bytes of an encoded file that is opened for a thumbnail
_ORDERS = {"teacher_loss": "DESC", "teacher_entropy": "DESC", "teacher_confidence": "ASC"}
_SHOWN = ("teacher_loss", "teacher_confidence", "teacher_entropy", "label", "teacher_prediction")
_PLACE = ("sample_id", "split", "source_index", "view")
_OWN = {*_PLACE, *_SHOWN, "content_hash", "shard", "row", "num_tokens"}


def hardest(store: TeacherStore, asked: Asked) -> dict[str, Any]:
    """{"by", "columns", "rows", "notes"}; a row has "split", "source_index", "view", figures, "cells" and, of images,
    "thumbnail". By loss; by entropy, or confidence, where there is none."""
    by = next((name for name in _ORDERS if _has_values(asked, name)), None)
    carried = [name for name in asked.columns if name not in _OWN][:MOST_COLUMNS]
    found: dict[str, Any] = {"by": by, "columns": carried, "rows": [], "notes": []}
    if by is None:
        return found
    found["rows"] = [_row(line, carried, store.label_names) for line in _lines(asked, by, carried)]
    if IMAGE in store.fields:
        found["notes"] += add_thumbnails(store, asked, found["rows"])
    elif not any(asked.columns[name] == "VARCHAR" for name in carried) and add_tokens(store, found["rows"]):
        found["columns"] = ["tokens, decoded", *carried]
    return found


def _has_values(asked: Asked, name: str) -> bool:
    value = asked.number(name)
    return value is not None and asked.rows(f"SELECT count({value}) FROM samples")[0][0] > 0


def _lines(asked: Asked, by: str, carried: Sequence[str]) -> list[dict[str, Any]]:
    """The hardest first: which rows, by their numbers alone; then what the index has of these."""
    value = asked.number(by)
    sound = f"({value}) IS NOT NULL AND sample_id IS NOT NULL AND source_index IS NOT NULL"
    order = f"SELECT sample_id FROM samples WHERE {sound} ORDER BY {value} {_ORDERS[by]}, sample_id"
    ids = [row[0] for row in asked.rows(f"{order} LIMIT {MOST_ROWS}")]
    columns: dict[str, str] = {name: quoted(name) for name in _PLACE}
    for name in _SHOWN:
        if name in asked.columns:
            columns[name] = quoted(name) if asked.columns[name] in NUMBERS else _as_text(name)
    columns |= {f"carried {at}": _as_text(name) for at, name in enumerate(carried)}
    listed = ", ".join(str(int(one)) for one in ids)
    if not listed:
        return []
    query = f"SELECT {', '.join(columns.values())} FROM samples WHERE sample_id IN ({listed}) LIMIT {MOST_ROWS}"
    lines = [dict(zip(columns, row, strict=True)) for row in asked.rows(query)]
    return sorted(lines, key=lambda line: ids.index(line["sample_id"]))


def _as_text(name: str) -> str:
    return f"left(CAST({quoted(name)} AS VARCHAR), {LONGEST + 1})"


def _row(line: Mapping[str, Any], carried: Sequence[str], names: Any) -> dict[str, Any]:
    found = {name: line[name] for name in _PLACE}
    for name in ("teacher_loss", "teacher_confidence", "teacher_entropy"):
        found[name] = finite(line.get(name))
    for name in ("label", "teacher_prediction"):
        value = line.get(name)
        shown = value if value is None or isinstance(value, str) else class_name(names, value)
        found[name] = f"{value:.4g}" if isinstance(value, float) else shown
    return {**found, "cells": [shortened(line[f"carried {at}"]) for at in range(len(carried))]}


def shortened(text: str | None) -> str:
    """On one line, no longer than LONGEST."""
    one = " ".join((text or "")[: LONGEST + 1].split())
    return one if len(one) <= LONGEST else one[: LONGEST - 1] + "…"


# ---- tokens ----


def add_tokens(store: TeacherStore, rows: Sequence[dict[str, Any]]) -> bool:
    """Put the decoded tokens before the cells of each row, where the store has a tokenizer that can be read."""
    if store.url is not None or store.tokenizer_dir is None or schema.INPUT_IDS not in store.fields:
        return False
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(store.tokenizer_dir / "tokenizer.json"))
        reader = store.select(fields=[])
        texts = []
        for row in rows:
            ids = np.asarray(reader[int(row["sample_id"])][schema.INPUT_IDS])[:MOST_TOKENS]
            texts.append(shortened(tokenizer.decode(ids.tolist())))
    except PredistillError:
        raise
    except Exception:  # a stranger's tokenizer; the library raises plain Exception
        return False
    for row, text in zip(rows, texts, strict=True):
        row["cells"].insert(0, text)
    return True


# ---- pictures ----


def add_thumbnails(store: TeacherStore, asked: Asked, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Put a data: URI into each row whose picture can be read; returns what is to be said of the others."""
    if store.url is not None:
        return ["The pictures are in shards that are elsewhere; pull the store to see them."]
    try:
        import PIL  # noqa: F401
    except ImportError:
        return ["The pictures of these rows need Pillow: pip install predistill[images]."]
    unread = 0
    for row in rows:
        try:
            row["thumbnail"] = thumbnail(_file_of(store, asked, row))
        except (PredistillError, ValueError, TypeError, MemoryError):
            unread += 1
    return [f"{unread} of these pictures could not be read."] if unread else []


def _file_of(store: TeacherStore, asked: Asked, row: Mapping[str, Any]) -> bytes:
    """The encoded file of a row: it stands in the first view of its source row."""
    split = str(row["split"]).replace("'", "''")
    query = f"""SELECT shard, row FROM samples WHERE split = '{split}' AND source_index = {int(row["source_index"])}
                ORDER BY view LIMIT 1"""
    shard, at = asked.rows(query)[0]
    number = [one.name for one in store.shards].index(shard)
    column = store.mapped(number).checked(IMAGE)
    if not 0 <= at < len(column):
        raise ValueError(f"row {at} is not in shard {shard}")
    cell = column[at].as_buffer()
    if cell is None or cell.size > LARGEST_IMAGE:
        raise ValueError("no file, or a very large one")
    return cell.to_pybytes()


def thumbnail(data: bytes) -> str:
    """The picture, made small and encoded anew: nothing of the stranger's file gets into the page."""
    image = decode(data, "RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small, kind = io.BytesIO(), "PNG" if max(image.size) <= 32 else "JPEG"
    image.save(small, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(small.getvalue()).decode()}"
