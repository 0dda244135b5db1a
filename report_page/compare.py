"""Runs beside each other: those that differ in their seed alone are a group, and groups with and without a teacher
are compared where task, student, split and size are the same."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PREFERRED = (
    "accuracy", "f1", "micro_f1", "macro_f1", "exact_match", "mean_iou", "pearson", "perplexity", "token_accuracy",
    "mse", "loss_labels",
)  # fmt: skip
LESS_IS_BETTER = ("perplexity", "mse", "loss", "loss_labels")
USUAL_SPLITS = ("validation", "test")  # what `train` evaluates on where it is not told
AGREEMENT = "teacher_agreement"
_SAME = ("task", "student", "parameters", "eval_split")
_RECIPE = ("recipe", "temperature", "alpha", "rows", "where", "learning_rate", "stores")


def compare(runs: Sequence[Mapping[str, Any]], stores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"metrics": names, "groups", "gains", "teachers"} of runs as `runs.read_run` gives them."""
    names = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    groups = grouped(runs)
    return {
        "metrics": names,
        "groups": groups,
        "gains": gains(groups),
        "teachers": teachers(runs, stores),
    }


def main_metric(metrics: Mapping[str, Any]) -> str | None:
    """The one figure that a run is judged by; of tags that are about entities, F1."""
    order = ("f1", *PREFERRED) if {"f1", "precision", "recall"} <= set(metrics) else PREFERRED
    return next((name for name in order if name in metrics), None)


def grouped(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose settings are equal but for the seed, as one line: mean and standard deviation of every figure."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        told = run["recipe"] is not None
        key = (*(str(run[name]) for name in (*_SAME, *_RECIPE)), "" if told else run["name"])
        found.setdefault(key, []).append(run)
    return [_group(members) for members in found.values()]


def _group(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = members[0]
    names = dict.fromkeys(name for run in members for name in run["metrics"])
    values = {name: [run["metrics"][name] for run in members if name in run["metrics"]] for name in names}
    return {
        "names": [run["name"] for run in members],
        **{name: first[name] for name in (*_SAME, *_RECIPE, "with_teacher")},
        "runs": len(members),
        "means": {name: statistics.fmean(each) for name, each in values.items()},
        "deviations": {name: statistics.stdev(each) if len(each) > 1 else None for name, each in values.items()},
        "values": values,
    }


def gains(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the teacher adds: every group with one against the best without, of the same task, student and split."""
    found = []
    for group in groups:
        without = [
            one for one in groups
            if one["with_teacher"] is False and all(one[name] == group[name] for name in _SAME)
        ]  # fmt: skip
        metric = main_metric(group["means"])
        if not group["with_teacher"] or metric is None:
            continue
        less = metric in LESS_IS_BETTER
        known = [one for one in without if metric in one["means"]]
        if known:
            base = (min if less else max)(known, key=lambda one: one["means"][metric])
            found.append(_gain(group, base, metric, less))
    return found


def _gain(group: Mapping[str, Any], base: Mapping[str, Any], metric: str, less: bool) -> dict[str, Any]:
    difference = group["means"][metric] - base["means"][metric]
    return {
        "with": group["names"], "without": base["names"], "metric": metric, "less_is_better": less,
        "with_mean": group["means"][metric], "with_deviation": group["deviations"][metric],
        "without_mean": base["means"][metric], "without_deviation": base["deviations"][metric],
        "difference": difference, "better": (difference < 0) == less and difference != 0,
        "same_rows": all(group[name] == base[name] for name in ("rows", "where", "stores")),
    }  # fmt: skip


def teachers(runs: Sequence[Mapping[str, Any]], stores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The teacher's own accuracy on the split that runs were evaluated on, of stores that are on the page."""
    found = []
    for store in stores:
        mine = [run for run in runs if store["fingerprint"] in run["stores"]]
        usual = next((name for name in USUAL_SPLITS if any(one["split"] == name for one in store["splits"])), None)
        asked = {run["eval_split"] or usual for run in mine}
        for line in (store["knowledge"] or {"splits": []})["splits"]:
            if line["split"] in asked and line["accuracy"] is not None:
                found.append({"store": store["name"], "split": line["split"], "accuracy": line["accuracy"],
                              "rows": line["labelled"], "runs": [run["name"] for run in mine]})  # fmt: skip
    return found
