"""The tables of the page: heads and rows of figures that the other files found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plots import group_name
from .runs import MOST_METRICS

FEW_CLASSES = 4  # whose matrix says it all
KNOWN = {
    "split": "split", "rows": "samples", "labelled": "labelled", "accuracy": "accuracy",
    "ece": "calibration error (ECE)", "root_mean_square_error": "root mean square error",
    "confidence": "mean confidence", "entropy": "mean entropy (nats)", "loss": "mean loss",
    "loss_by_token": "mean loss by token", "tokens": "mean tokens",
}  # fmt: skip
SIZES = ("split", "samples", "shards", "tokens", "bytes")
HARD = {
    "label": "label", "teacher_prediction": "teacher says", "teacher_loss": "loss", "teacher_confidence": "confidence",
    "teacher_entropy": "entropy",
}  # fmt: skip
_RUN = {
    "name": "run", "student": "student", "recipe": "learns from", "temperature": "temperature", "alpha": "alpha",
    "rows": "rows", "where": "where", "seed": "seed", "epochs": "epochs", "parameters": "parameters",
    "seconds": "seconds of training",
}  # fmt: skip


def store_tables(store: Mapping[str, Any]) -> dict[str, Any]:
    known = store["knowledge"] or {"splits": [], "confusion": None, "confusions": [], "classes": []}
    language, matrix = store["task"] == "causal-lm", known["confusion"]
    many = not matrix or len(matrix["names"]) > FEW_CLASSES
    kept = [
        name for name in KNOWN
        if (language or name != "loss_by_token") and any(line[name] is not None for line in known["splits"])
        and (name != "labelled" or any(line[name] for line in known["splits"]))
    ]  # fmt: skip
    sizes = [name for name in SIZES if name != "tokens" or any(one["tokens"] for one in store["splits"])]
    hardest = store["hardest"]
    hard = [name for name in HARD if any(row[name] is not None for row in hardest["rows"])]
    hard = [name for name in hard if name != "teacher_entropy" or hardest["by"] == name]
    costs = ("name", "role", "codec", "dtype", "shape", "bytes", "bytes_per_sample", "bytes_per_token")
    return {
        "split_head": sizes,
        "hard_columns": hard,
        "hard_head": [HARD[name] for name in hard],
        "split_rows": [[one[name] for name in sizes] for one in store["splits"]],
        "known_head": [KNOWN[name] for name in kept],
        "known_rows": [[line[name] for name in kept] for line in known["splits"]],
        "confusion_rows": [list(one.values()) for one in known["confusions"]] if many else [],
        "class_rows": [list(one.values()) for one in known["classes"]] if many else [],
        "field_rows": [[field[name] for name in costs] for field in store["fields"]],
        "pictures": any("thumbnail" in row for row in hardest["rows"]),
    }


def run_tables(found: Mapping[str, Any]) -> dict[str, Any]:
    """One line a run: its metrics, and the settings in which runs differ; the others stand once."""
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    known = [name for name in _RUN if any(run[name] is not None for run in runs)]
    alike = [name for name in known if len(runs) > 1 and all(run[name] == runs[0][name] for run in runs)]
    rest = [name for name in known if name not in alike and name != "name"]
    metrics = found["metrics"][:MOST_METRICS]
    return {
        "run_head": ["run", *(name.replace("_", " ") for name in metrics), *(_RUN[name] for name in rest)],
        "run_rows": [
            [run["name"], *(run["metrics"].get(name) for name in metrics), *(run[name] for name in rest)]
            for run in runs
        ],
        "run_alike": [(_RUN[name], runs[0][name]) for name in alike if name != "name"],
        "gain_rows": [_gain(one) for one in found["gains"]],
        "teacher_rows": [[one[name] for name in ("store", "split", "rows", "accuracy")] for one in found["teachers"]],
    }


def _gain(one: Mapping[str, Any]) -> list[Any]:
    names = [group_name({"names": one[side], "runs": len(one[side])}) for side in ("with", "without")]
    means = [_spread(one[f"{side}_mean"], one[f"{side}_deviation"]) for side in ("with", "without")]
    less = ", less is better" if one["less_is_better"] else ""
    return [
        *names,
        f"{one['metric'].replace('_', ' ')}{less}",
        *means,
        one["difference"],
        one["better"],
        one["same_rows"],
    ]


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.4g}" + ("" if deviation is None else f"\u00a0±\u00a0{deviation:.2g}")
