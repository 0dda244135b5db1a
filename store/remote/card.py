"""The card of a store that is shared: what it is, of which teacher and data, under which licences, how well it is kept.

It is README.md; its YAML head is what the Hub reads, and points the Hub's viewer at samples.parquet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import manifest, schema
from ..errors import PredistillError
from ..manifest import Plan
from ..reader import TeacherStore
from ..schema import FieldSpec
from .config import LICENCES

UNKNOWN = "unknown"
_HUB_TASKS = {
    "text-classification": "text-classification", "token-classification": "token-classification",
    "question-answering": "question-answering", "causal-lm": "text-generation",
    "image-classification": "image-classification", "semantic-segmentation": "image-segmentation",
}  # fmt: skip
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_SAMPLED = 256  # rows that figures are measured on
_BOUNDS = {"float16": "2⁻¹¹ of a value", "bfloat16": "2⁻⁹ of a value", "float32": "2⁻²⁴ of a value"}
_CODECS = {"int8": "1/254 of the largest of its 128 values", "uint8": "1/510 of the position's range"}
_SPECIAL = re.compile(r"[\\`*{}\[\]<>|#!~\x00-\x1f]")


def licences_in(card: str | None) -> dict[str, str]:
    """{"license", "teacher_license", "dataset_license"}: those that a card's head names."""
    import yaml

    head = re.match(r"\A---\s*\n(.{0,100000}?)\n---\s*(?:\n|\Z)", card or "", re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        found = None
    found = found if isinstance(found, dict) else {}
    return {name: found[name] for name in LICENCES if isinstance(found.get(name), str) and found[name].isprintable()}


def store_card(
    folder: Path, made: Mapping[str, Any], licences_of: str | None = None, source: str | None = None,
    **licences: str | None,
) -> str:  # fmt: skip
    """Markdown with a YAML head.

    licences_of: another card, whose licences are carried. licences: license, teacher_license, dataset_license.
    source: the address that the examples read from; by default this folder.
    """
    plan = manifest.plan_of(made, str(folder))
    known = {**licences_in(licences_of), **{name: value for name, value in licences.items() if value}}
    with TeacherStore(folder, made, False) as store:
        parts = [
            _head(plan, made, known), f"# {_plain(_title(plan))}", _ABOUT, _facts(plan, made, known),
            _splits(store, made), _fields(plan), _fidelity(store), _reading(source or ".", plan),
        ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(plan: Plan, made: Mapping[str, Any], known: Mapping[str, str]) -> str:
    import yaml

    samples = sum(entry["rows"] for entry in made["shards"])
    head = {
        "pretty_name": _title(plan),
        "tags": ["predistill", "knowledge-distillation"],
        "task_categories": [_HUB_TASKS[plan.task]] if plan.task in _HUB_TASKS else None,
        "size_categories": [next((word for bound, word in _SIZES if samples < bound), "n>1B")],
        "configs": [{"config_name": "default", "data_files": [{"split": "samples", "path": manifest.SAMPLES}]}],
        **{name: known.get(name, UNKNOWN) for name in LICENCES},
    }
    given = {name: value for name, value in head.items() if value is not None}
    return f"---\n{yaml.safe_dump(given, allow_unicode=True, sort_keys=False)}---"


def _title(plan: Plan) -> str:
    parts = [plan.identity.get(part) for part in ("dataset", "teacher")]
    names = [Path(str(part["name"])).name for part in parts if isinstance(part, Mapping) and part.get("name")]
    return " by ".join(names) if len(names) == 2 else f"Teacher outputs, {plan.task}"


_ABOUT = (
    "What a teacher says of every row of a dataset, kept so that students can be trained without running it again: a "
    "store of predistill. Its layout is described in predistill's `store/FORMAT.md`; nothing in it is pickled."
)


def _facts(plan: Plan, made: Mapping[str, Any], known: Mapping[str, str]) -> str:
    rows = [("task", plan.task)]
    rows += [(part, _named(plan.identity[part])) for part in manifest.NAMED if plan.identity.get(part)]
    rows += [
        ("samples", f"{sum(entry['rows'] for entry in made['shards']):,}"),
        ("bytes", f"{sum(entry['bytes'] for entry in made['shards']):,}"),
    ]
    if plan.label_names:
        shown = ", ".join(map(str, plan.label_names[:20]))
        rows.append(("classes", shown + (f", … ({len(plan.label_names)})" if len(plan.label_names) > 20 else "")))
    rows.append(("fingerprint", str(made["fingerprint"])))
    if taken := plan.settings.get("taken_from"):
        rows.append(("taken from", _origin(taken)))
    rows += [(name.replace("_", " ").replace("license", "licence"), known.get(name, UNKNOWN)) for name in LICENCES]
    note = "The licences of the teacher and of the dataset hold for what was made from them."
    return f"{_table(('', ''), rows)}\n\n{note}"


def _origin(taken: Any) -> str:
    try:
        left, fields = taken["left_out"], len(taken["left_out"]["fields"])
        return (
            f"a store of fingerprint {taken['fingerprint']}, without {left['shards']} of its {taken['shards']} shards "
            f"and {fields} of its {taken['fields']} fields"
        )
    except (KeyError, TypeError):
        return UNKNOWN


def _named(identity: Any) -> str:
    if not isinstance(identity, Mapping):
        return str(identity)
    name = str(identity.get("name") or identity.get("class") or "")
    hashes = [f"{key} {str(value)[:12]}" for key, value in sorted(identity.items()) if key.endswith("sha256") and value]
    revision = [f"revision {identity[key]}" for key in ("revision", "commit") if identity.get(key)]
    return ", ".join([part for part in (name, *revision, *hashes) if part]) or UNKNOWN


def _splits(store: TeacherStore, made: Mapping[str, Any]) -> str:
    sizes: dict[str, int] = {}
    for shard, entry in zip(store.shards, made["shards"], strict=True):
        sizes[shard.split] = sizes.get(shard.split, 0) + entry["bytes"]
    rows = [
        (name, *(f"{split[key]:,}" for key in ("samples", "tokens", "shards")), f"{sizes[name]:,}")
        for name, split in store.splits.items()
    ]
    return "## Splits\n\n" + _table(("split", "samples", "tokens", "shards", "bytes"), rows)


def _fields(plan: Plan) -> str:
    rows = [
        (spec.name, " × ".join(map(str, spec.shape)) or "1", spec.dtype, spec.codec, spec.role, _bound(spec))
        for spec in plan.fields
    ]
    return (
        "## Fields\n\n`S` is the number of tokens of a row. Logits are unnormalised, at temperature 1. The error is "
        "what storing may change of a value, at most.\n\n"
        + _table(("column", "shape of a row", "dtype", "codec", "role", "error"), rows)
    )


def _bound(spec: FieldSpec) -> str:
    if spec.codec in _CODECS:
        return _CODECS[spec.codec]
    return _BOUNDS.get(spec.dtype, "exact") if spec.codec == "dense" else "exact"


def _fidelity(store: TeacherStore) -> str:
    """Figures that the store itself can be asked for: agreement with labels, probability that a top k has."""
    lines = []
    try:
        samples = store.sql("SELECT * FROM samples LIMIT 0")
        kinds = dict(zip(samples.columns, map(str, samples.types), strict=True))
        if {kinds.get("label"), kinds.get("teacher_prediction")} <= {"BIGINT", "INTEGER"}:
            query = """SELECT split, count(*), avg((teacher_prediction = label)::INT) FROM samples
                       WHERE label IS NOT NULL AND teacher_prediction IS NOT NULL GROUP BY split ORDER BY split"""
            for split, count, share in store.sql(query).fetchall():
                lines.append(f"- teacher and label agree in {share:.2%} of the {count:,} labelled samples of {split}")
        mass = _kept_mass(store)
        if mass is not None:
            lines.append(f"- the kept logits have {mass:.3%} of the teacher's probability, mean over the first rows")
    except PredistillError:
        return ""
    return "## Fidelity\n\n" + "\n".join(lines) if lines else ""


def _kept_mass(store: TeacherStore) -> float | None:
    import numpy as np

    if not {schema.TOP_K_LOGITS, schema.LOGSUMEXP} <= set(store.fields):
        return None
    rows = store.select(fields=[schema.TOP_K_LOGITS, schema.LOGSUMEXP])
    batch = rows[: min(_SAMPLED, len(rows))]
    kept = np.exp(batch[schema.TOP_K_LOGITS].astype(np.float64) - batch[schema.LOGSUMEXP][..., None])
    real = batch.get("teacher_mask", batch[schema.ATTENTION_MASK]).astype(bool)
    return float(kept.sum(axis=-1)[real].mean()) if real.any() else None


def _reading(source: str, plan: Plan) -> str:
    split, shard = plan.shards[0].split, plan.shards[0].name
    at = source.rstrip("/")
    blocks = {
        "predistill, decoded and padded; shards come when they are read": (
            f'from predistill import TeacherStore\n\nrows = TeacherStore.open("{at}").select(split="{split}")'
        ),
        "pyarrow": (
            "import fsspec\nimport pyarrow as pa\n\n"
            f'table = pa.ipc.open_file(fsspec.open("{at}/shards/{shard}.arrow").open()).read_all()'
        ),
        "datasets": (
            'from datasets import load_dataset\n\n'
            f'samples = load_dataset("parquet", data_files="{at}/samples.parquet", split="train")'
        ),
        "DuckDB": (
            "import duckdb\n\n"
            f"duckdb.sql(\"SELECT split, count(*) FROM '{at}/samples.parquet' GROUP BY split\").show()"
        ),
    }  # fmt: skip
    said = "\n\n".join(f"With {name}:\n\n```python\n{code}\n```" for name, code in blocks.items())
    return f"## Reading it\n\n{said}\n\n`predistill pull {at} FOLDER` takes it whole or in part, and checks every byte."


def _table(titles: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        lines.append("| " + " | ".join(_plain(str(cell)) for cell in row) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text of a stranger's manifest as text: no links, no HTML, one line."""
    return _SPECIAL.sub(lambda found: " " if found[0] < " " else f"\\{found[0]}", text)
