"""What a trained student says of itself: a model card for people, predistill.json for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .settings import DistillationSettings
from .tasks import Task

PROVENANCE, METRICS, CARD = "predistill.json", "metrics.json", "README.md"

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A student with {{ parameters }} parameters, trained by predistill on stored outputs of {{ teacher }}.
The teacher was not loaded during training.

## Results
{% if results %}
| metric | value |
|---|---|
{% for name, value in results %}| {{ name }} | {{ value }} |
{% endfor %}{% else %}
Not evaluated.
{% endif %}
## Use

```python
{% if "pipeline(" in usage | join %}from transformers import pipeline

{% endif %}{{ usage | join("\n") }}
```
{% for note in notes %}
{{ note }}
{% endfor %}
## Training
{% for name, terms, arguments in stages %}{% if name %}
Stage *{{ name }}*, {% if arguments.max_steps > 0 %}{{ arguments.max_steps }} steps{% else
%}{{ "%g" % arguments.num_train_epochs }} epochs{% endif %} at {{ "%g" % arguments.learning_rate }}:
{% endif %}
| term | loss | weight | temperature | options |
|---|---|---|---|---|
{% for term in terms %}| {{ term | join(" | ") }} |
{% endfor %}{% endfor %}
- student: `{{ student }}`
- rows: {{ rows }}{% if where %} (`{{ where }}`){% endif %}
{% for store in stores %}- store: `{{ store.fingerprint[:12] }}`, split `{{ store.split }}`
{% endfor %}{% if ensemble %}- ensemble: {{ ensemble }}
{% endif %}- versions: {{ versions }}

`predistill.json` has every setting.
"""


def provenance(config: Any, stores: Sequence[Any], student: Any, jobs: Sequence[Any]) -> dict[str, Any]:
    """Where a student comes from, JSON-able: stores, terms, settings, versions.

    terms, rows and training_arguments are those of the last stage; `stages` has them all, where there are several.
    """
    last = jobs[-1]
    several = {"stages": [{"name": job.stage.name, **_of(job)} for job in jobs]} if len(jobs) > 1 else {}
    return {
        "stores": [
            {"name": store.place, "fingerprint": store.fingerprint,
             "sha256": store.manifest.get("sha256"), "task": store.task, "split": config.train_split,
             "teacher": store.identity.get("teacher"), "tokenizer": store.identity.get("tokenizer")}
            for store in stores
        ],
        "student": {"source": student.source, "retokenized": student.retokenize},
        **_of(last),
        **several,
        "settings": {key: value for key, value in asdict(config).items() if key != "training_arguments"},
        "versions": versions(),
    }  # fmt: skip


def _of(job: Any) -> dict[str, Any]:
    own = {one.name for one in fields(DistillationSettings)}
    return {
        "terms": [asdict(term) for term in job.objective.terms],
        "rows": len(job.train_rows),
        "batch_rows": job.args.train_batch_size * job.args.world_size,  # of all ranks
        "training_arguments": {name: value for name, value in job.args.to_dict().items() if name not in own},
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("predistill", "torch", "transformers", "accelerate", "pyarrow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def model_card(
    made: Mapping[str, Any], metrics: Mapping[str, Any], task: Task, notes: Sequence[str], title: str,
    usage: Sequence[str] | None = None,
) -> ModelCard:  # fmt: skip
    """A card for the Hub, from what `provenance` returned and the run's metrics. notes: of the task, on the student.
    usage: lines of Python, where the task's own are not for this student."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline,
        tags=["knowledge-distillation", "predistill"],
    )
    teachers = [(store["teacher"] or {}).get("name") for store in made["stores"]]
    scores = {name: value for name, value in metrics.items() if name.startswith("eval_")}
    results = [(name.removeprefix("eval_"), f"{value:.4f}") for name, value in scores.items()
               if isinstance(value, float) and not name.endswith(_TIMES)]  # fmt: skip
    return ModelCard.from_template(
        data, template_str=TEMPLATE, title=title, results=results, stores=made["stores"],
        stages=[(stage.get("name"), [_term_cells(term) for term in stage["terms"]], stage["training_arguments"])
                for stage in made.get("stages", [made])],
        rows=f"{made['rows']:,}", where=made["settings"]["where"],
        parameters=f"{metrics['student_parameters']:,}", student=_public(made["student"]["source"]),
        teacher=", ".join(f"`{_public(name)}`" for name in teachers if name) or "a teacher",
        usage=usage or task.usage, notes=notes, ensemble=_ensemble(made),
        versions=", ".join(f"{name} {number}" for name, number in made["versions"].items()),
    )  # fmt: skip


def _public(name: str) -> str:
    """A Hub id as it is, of a folder its name alone: a card is read elsewhere."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def _ensemble(made: Mapping[str, Any]) -> str:
    """What is said of teachers that were averaged; empty for others."""
    told = made.get("ensemble")
    if not told:
        return ""
    weights = told["weights"]
    if isinstance(weights, Mapping):
        weights = ", ".join(f"`{_public(path)}` {weight:.3f}" for path, weight in weights.items())
    return f"{told['average']} averaged, weights ({told['chosen']}): {weights}"


def _term_cells(term: Mapping[str, Any]) -> list[str]:
    options = ", ".join(f"{name} {value}" for name, value in term["options"].items() if value is not False)
    temperature = "" if term["temperature"] is None else f"{term['temperature']:g}"
    return [term["name"], term["loss"], f"{term['weight']:g}", temperature, options]


_TIMES = ("_runtime", "_per_second", "_preparation_time")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
