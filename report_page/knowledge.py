"""What the teacher knows, asked of the index: accuracy, calibration, confusions, distributions, split by split.

Every query groups or limits, so that ten million rows come back as a few hundred numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .asked import Asked, finite

BINS = 15  # of confidence, equally wide, as in Guo et al. 2017, arXiv:1706.04599
BARS = 40  # of a histogram
MOST_CLASSES = 30  # in a matrix
MOST_PAIRS = 20  # in the list of confusions
HELD_OUT = ("validation", "test", "dev", "eval", "tune")
DRAWN = {
    "teacher_confidence": "confidence (largest probability)",
    "teacher_entropy": "entropy (nats)",
    "teacher_loss": "loss",
    "num_tokens": "tokens",
}
SUMMARIES = ("confidence", "entropy", "loss")
_RIGHT = "(teacher_prediction = label)"


def knowledge(asked: Asked, splits: Sequence[str], names: Any) -> dict[str, Any]:
    """{"splits", "histograms", "calibration", "confusion", "confusions", "classes", "notes"}.

    splits: in the store's order; names: of the classes, as the manifest has them, whatever that is.
    """
    judged = asked.is_integer("label", "teacher_prediction")
    table = split_table(asked, splits)
    bins = calibration(asked) if judged and asked.number("teacher_confidence") else {}
    for line in table:
        line["ece"] = expected_error(bins.get(line["split"], []))
    held = held_out(table) if judged else None
    return {
        "splits": table,
        "histograms": {name: found for name in DRAWN if (found := histogram(asked, name, splits))},
        "calibration": {name: bins[name] for name in splits if name in bins},
        "confusion": confusion(asked, held, names) if held else None,
        "confusions": confusions(asked, held, names) if held else [],
        "classes": classes(asked, held, names) if held else [],
        "held_out": held,
        "notes": notes(asked, table),
    }


def split_table(asked: Asked, splits: Sequence[str]) -> list[dict[str, Any]]:
    """One line a split: rows, labelled rows, accuracy, and means. A split without rows has a line too."""
    label, guess = asked.number("label"), asked.number("teacher_prediction")
    both = f"({label}) IS NOT NULL AND ({guess}) IS NOT NULL" if label and guess else "false"
    integers = asked.is_integer("label", "teacher_prediction")
    error = f"({label}) - ({guess})" if label and guess and not integers else "NULL::DOUBLE"
    loss, tokens = asked.number("teacher_loss"), asked.number("num_tokens")
    weighed = f"sum(({loss}) * ({tokens})) / nullif(sum(CASE WHEN ({loss}) IS NOT NULL THEN {tokens} END), 0)"
    columns = {
        "rows": "count(*)",
        "labelled": f"count({label})" if label else "0",
        "accuracy": f"avg({_RIGHT}::INT) FILTER (WHERE {both})" if integers else "NULL",
        "root_mean_square_error": f"sqrt(avg(power({error}, 2)))",
        **{name: f"avg({asked.number(f'teacher_{name}') or 'NULL::DOUBLE'})" for name in SUMMARIES},
        "loss_by_token": weighed if loss and tokens else "NULL",
        "tokens": f"avg({tokens})" if tokens else "NULL",
    }  # fmt: skip
    query = f"SELECT split, {', '.join(columns.values())} FROM samples GROUP BY split"
    found = {str(row[0]): row[1:] for row in asked.rows(query)}
    empty = [0, 0, *[None] * (len(columns) - 2)]
    return [
        {"split": split, **dict(zip(columns, map(_number, found.get(split, empty)), strict=True))} for split in splits
    ]


def _number(value: Any) -> Any:
    return value if isinstance(value, int) else finite(value)


def histogram(asked: Asked, name: str, splits: Sequence[str]) -> dict[str, Any] | None:
    """{"edges": [BARS + 1], "counts": {split: [BARS]}}; None where the column has no values.

    Confidence is of 0 … 1, everything else of 0 (or less) … the largest value.
    """
    value = asked.number(name)
    if value is None:
        return None
    low, high = asked.rows(f"SELECT min({value}), max({value}) FROM samples")[0]
    if low is None:
        return None
    low, high = min(low, 0.0), max(high, 1.0) if name == "teacher_confidence" else high
    if high <= low:
        high = low + 1
    width = (high - low) / BARS
    if not math.isfinite(width) or width <= 0:
        return None
    place = f"CAST(least(greatest(floor((v - {low!r}) / {width!r}), 0), {BARS - 1}) AS INTEGER)"
    values = f"SELECT split, {value} AS v FROM samples"
    query = f"SELECT split, {place} AS place, count(*) FROM ({values}) WHERE v IS NOT NULL GROUP BY ALL"
    counts: dict[str, list[int]] = {}
    for split, at, count in asked.rows(query):
        counts.setdefault(str(split), [0] * BARS)[at] = count
    edges = [low + at * width for at in range(BARS)] + [high]
    return {"edges": edges, "counts": {split: counts[split] for split in splits if split in counts}}


def calibration(asked: Asked) -> dict[str, list[dict[str, Any]]]:
    """Of each split, its bins that hold labelled rows: {"low", "high", "rows", "confidence", "accuracy"}."""
    value = asked.number("teacher_confidence")
    query = f"""
        SELECT split, CAST(least(greatest(ceil(c * {BINS}) - 1, 0), {BINS - 1}) AS INTEGER) AS bin,
               count(*), avg(c), avg(correct::INT)
        FROM (SELECT split, {value} AS c, {_RIGHT} AS correct FROM samples
              WHERE label IS NOT NULL AND teacher_prediction IS NOT NULL)
        WHERE c IS NOT NULL GROUP BY ALL"""
    found: dict[str, list[dict[str, Any]]] = {}
    for split, at, rows, confidence, accuracy in sorted(asked.rows(query), key=lambda row: row[:2]):
        one = {"low": at / BINS, "high": (at + 1) / BINS, "rows": rows, "confidence": confidence, "accuracy": accuracy}
        found.setdefault(str(split), []).append(one)
    return found


def expected_error(bins: Sequence[Mapping[str, Any]]) -> float | None:
    """Expected calibration error: the mean over rows of |accuracy - confidence| of their bin."""
    rows = sum(one["rows"] for one in bins)
    return sum(one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / rows if rows else None


def held_out(table: Sequence[Mapping[str, Any]]) -> str | None:
    """The split that confusions are of: one that the teacher was hardly trained on, where there is one."""
    judged = [line["split"] for line in table if line["accuracy"] is not None]
    return next((name for name in HELD_OUT if name in judged), judged[0] if judged else None)


def _of(split: str) -> str:
    name = split.replace("'", "''")
    return f"split = '{name}' AND label IS NOT NULL AND teacher_prediction IS NOT NULL"


def confusion(asked: Asked, split: str, names: Any) -> dict[str, Any] | None:
    """{"split", "names": [C], "counts": [C][C]} by label, then by prediction; None for too many classes."""
    low, high = asked.rows(
        f"SELECT min(least(label, teacher_prediction)), max(greatest(label, teacher_prediction)) "
        f"FROM samples WHERE {_of(split)}"
    )[0]
    count = max(high + 1, len(names) if isinstance(names, list) else 0)
    if low < 0 or count > MOST_CLASSES:
        return None
    counts = [[0] * count for _ in range(count)]
    query = f"SELECT label, teacher_prediction, count(*) FROM samples WHERE {_of(split)} GROUP BY ALL"
    for label, guess, rows in asked.rows(query):
        counts[label][guess] = rows
    return {"split": split, "names": [class_name(names, at) for at in range(count)], "counts": counts}


def confusions(asked: Asked, split: str, names: Any) -> list[dict[str, Any]]:
    """The pairs of label and other prediction that occur most often."""
    query = f"""SELECT label, teacher_prediction, count(*) AS n FROM samples
                WHERE {_of(split)} AND label != teacher_prediction
                GROUP BY ALL ORDER BY n DESC, label, teacher_prediction LIMIT {MOST_PAIRS}"""
    return [
        {"label": class_name(names, label), "prediction": class_name(names, guess), "rows": rows}
        for label, guess, rows in asked.rows(query)
    ]


def classes(asked: Asked, split: str, names: Any) -> list[dict[str, Any]]:
    """The labels on which the teacher is right least often."""
    query = f"""SELECT label, count(*), avg({_RIGHT}::INT) AS accuracy FROM samples WHERE {_of(split)}
                GROUP BY label ORDER BY accuracy, label LIMIT {MOST_PAIRS}"""
    return [
        {"label": class_name(names, label), "rows": rows, "accuracy": accuracy}
        for label, rows, accuracy in asked.rows(query)
    ]


def class_name(names: Any, at: Any) -> str:
    """The name of class `at`, or its number where it has none."""
    known = isinstance(names, list) and isinstance(at, int) and 0 <= at < len(names)
    return str(names[at])[:80] if known else str(at)


def notes(asked: Asked, table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What cannot be said, and why."""
    found = []
    if not any(asked.number(name) for name in ("teacher_confidence", "teacher_entropy", "teacher_loss")):
        found.append("This store keeps no summaries (confidence, entropy, loss), so little is known of its rows.")
    if not any(line["labelled"] for line in table):
        found.append("Its index has no label a row, so there is no accuracy, calibration or confusion to show.")
    found += [f"Split {line['split']} has no rows." for line in table if not line["rows"]]
    return found[:20]
