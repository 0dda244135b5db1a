"""Runs, read from what `train` left: predistill.json, metrics.json, trainer_state.json; all may be a stranger's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..store.errors import StoreCorrupt
from ..store.manifest import read_json
from .asked import finite

PROVENANCE, METRICS, STATE = "predistill.json", "metrics.json", "trainer_state.json"
LABELS_ONLY = {"labels"}  # terms that ask no teacher
TIMES = ("_runtime", "_per_second", "_preparation_time")
MOST_POINTS = 1000  # of a curve
MOST_METRICS = 20
LONGEST = 120  # characters of a name


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (PROVENANCE, METRICS, STATE)) or bool(_checkpoints(path))


def read_runs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Each run as a line of the table, with its curves; names are told apart where folders are called the same."""
    names = [path.resolve().name for path in paths]
    doubled = {name for name in names if names.count(name) > 1}
    return [
        read_run(path, f"{path.resolve().parent.name}/{name}" if name in doubled else name)
        for path, name in zip(paths, names, strict=True)
    ]


def read_run(path: Path, name: str) -> dict[str, Any]:
    notes: list[str] = []
    made, metrics = (_read(path / file, notes) for file in (PROVENANCE, METRICS))
    state = _read(_state(path), notes)
    settings, arguments = _mapping(made.get("settings")), _mapping(made.get("training_arguments"))
    stages = made.get("stages")
    terms = [one for stage in (stages if isinstance(stages, list) else [made]) for one in _terms(stage)]
    stores = [_mapping(one) for one in made["stores"]] if isinstance(made.get("stores"), list) else []
    if not metrics:
        notes.append("It has no metrics: it has not ended, or was not evaluated.")
    return {
        "name": name[:LONGEST],
        "task": _text(stores[0].get("task")) if stores else None,
        "student": _public(_mapping(made.get("student")).get("source")),
        "recipe": _recipe(settings, terms),
        "with_teacher": bool({term["name"] for term in terms} - LABELS_ONLY) if terms else None,
        "temperature": finite(settings.get("temperature")) or _temperature(terms),
        "alpha": finite(settings.get("alpha")),
        "rows": finite(made.get("rows")),
        "where": _text(settings.get("where")),
        "seed": finite(arguments.get("seed")),
        "learning_rate": finite(arguments.get("learning_rate")),
        "epochs": finite(metrics.get("epoch")) or finite(state.get("epoch")),
        "eval_split": _text(settings.get("eval_split")),
        "stores": [fingerprint[:64] for one in stores if (fingerprint := _text(one.get("fingerprint")))],
        "parameters": finite(metrics.get("student_parameters")),
        "seconds": finite(metrics.get("train_runtime")),
        "metrics": scores(metrics) or _last(state),
        "curves": curves(state),
        "notes": notes,
    }


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object, or nothing and a note where the file is damaged."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (StoreCorrupt, OSError, UnicodeDecodeError):
        notes.append(f"Its {path.name} cannot be read.")
        return {}


def _state(path: Path) -> Path:
    """trainer_state.json of the run, or of its last checkpoint where it has not ended."""
    return next((one for one in (path, *_checkpoints(path)) if (one / STATE).is_file()), path) / STATE


def _checkpoints(path: Path) -> list[Path]:
    found = [one for one in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", one.name)]
    return sorted((one for one in found if (one / STATE).is_file()), key=lambda one: -int(one.name[11:]))


def scores(found: Mapping[str, Any]) -> dict[str, float]:
    """The evaluation's figures, without its times: {"accuracy": 0.89, "teacher_agreement": 0.96}."""
    kept = {
        str(name).removeprefix("eval_")[:LONGEST]: number
        for name, value in found.items()
        if str(name).startswith("eval_") and not str(name).endswith(TIMES) and (number := finite(value)) is not None
    }
    return dict(list(kept.items())[:MOST_METRICS])


def _history(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = state.get("log_history")
    return [_mapping(one) for one in found] if isinstance(found, list) else []


def _last(state: Mapping[str, Any]) -> dict[str, float]:
    """Of a run without metrics.json: its latest evaluation."""
    return next((found for entry in reversed(_history(state)) if (found := scores(entry))), {})


def curves(state: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """{"train loss": [(step, value)], "accuracy": …} of log_history, thinned to MOST_POINTS."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in _history(state):
        step, loss = finite(entry.get("step")), finite(entry.get("loss"))
        if step is None:
            continue
        trained = {} if loss is None else {"train loss": loss}
        for name, value in {**trained, **scores(entry)}.items():
            if len(found) < MOST_METRICS or name in found:
                found.setdefault(name, []).append((step, value))
    return {name: points[:: -(-len(points) // MOST_POINTS)] for name, points in found.items()}


def _terms(stage: Any) -> list[Mapping[str, Any]]:
    found = _mapping(stage).get("terms")
    kept = [_mapping(one) for one in found] if isinstance(found, list) else []
    return [{**one, "name": str(one.get("name"))[:40]} for one in kept[:20] if one.get("weight") != 0]


def _recipe(settings: Mapping[str, Any], terms: Sequence[Mapping[str, Any]]) -> str | None:
    """The preset, and what is compared: "tinybert: hidden_states mse, logits kl"."""
    said = dict.fromkeys(f"{one['name']} {str(one.get('loss'))[:40]}" for one in terms)
    preset = _text(settings.get("preset"))
    return ": ".join(part for part in (preset, ", ".join(said)) if part) or None


def _temperature(terms: Sequence[Mapping[str, Any]]) -> float | None:
    return next((value for one in terms if (value := finite(one.get("temperature"))) is not None), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value[:LONGEST] if isinstance(value, str) and value else None


def _public(value: Any) -> str | None:
    """A Hub id as it is, of a folder its name alone."""
    text = _text(value)
    return Path(text).name if text and Path(text).is_absolute() else text
