"""README.md of a store: what it is, of which teacher and data, under which licences, how true, how it is read.

card.md is its template. Its YAML head is what the Hub reads, and points the Hub's viewer at samples.parquet. All text
that comes from a manifest may be a stranger's, and is written so that it can be neither HTML nor a link.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import manifest, schema
from .errors import PredistillError
from .manifest import Plan
from .remote.config import LICENCES
from .schema import FieldSpec

UNKNOWN = "unknown"
_HUB_TASKS = {
    "text-classification": "text-classification", "token-classification": "token-classification",
    "question-answering": "question-answering", "causal-lm": "text-generation",
    "image-classification": "image-classification", "semantic-segmentation": "image-segmentation",
}  # fmt: skip
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_SHOWN = 20  # class names
_LONGEST_HEAD, _LONGEST_LICENCE = 1 << 16, 1000  # characters
_SAMPLED = 256  # rows that figures are measured on
_BOUNDS = {"float16": "2⁻¹¹ of a value", "bfloat16": "2⁻⁹ of a value", "float32": "2⁻²⁴ of a value"}
_CODECS = {"int8": "1/254 of the largest of its 128 values", "uint8": "1/510 of the position's range"}
_SPECIAL = re.compile(r"[\\`*{}\[\]<>|#!~\x00-\x1f]")


def licences_in(card: str | None) -> dict[str, str]:
    """{"license", "teacher_license", "dataset_license"}: those that a card's head names."""
    fence, *lines = [line.rstrip() for line in (card or "")[:_LONGEST_HEAD].split("\n")]
    if fence != "---" or "---" not in lines:
        return {}
    lines, entries = lines[: lines.index("---")], dict[str, str]()
    for at, line in enumerate(lines):
        name, colon, _ = line.partition(":")
        if colon and name in LICENCES:
            more = itertools.takewhile(lambda one: not one or one[0] == " ", lines[at + 1 : at + _LONGEST_LICENCE])
            entries[name] = "\n".join([line, *more])
    return {name: text for name in LICENCES if (text := _text(entries.get(name, "")))}


def _text(entry: str) -> str:
    """`text` of "name: text", in the notations that YAML has for it; "" where it is a number, a list or anything else.

    The head may be a stranger's: it is not parsed as a whole, since merged and repeated keys, dates and tags cost time
    without end or raise errors of all kinds, and nothing is made of it but text.
    """
    import yaml

    if len(entry) > _LONGEST_LICENCE:
        return ""
    try:
        node: Any = yaml.compose(entry, Loader=yaml.SafeLoader)
        (_, value), *others = node.value
    except Exception:  # PyYAML raises more than YAMLError
        return ""
    plain = not others and isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:str"
    return value.value if plain and value.value.isprintable() else ""


def store_card(
    folder: Path, made: Mapping[str, Any], licences: Mapping[str, str | None] | None = None, source: str = "."
) -> str:
    """Markdown with a YAML head, of the store in `folder`, whose index is there, and whose manifest is `made`.

    licences: by the names in LICENCES; those that are not given are not in the head. source: the address that the
    examples read from; by default the card's folder.
    """
    from jinja2 import Environment

    from .reader import TeacherStore

    plan = manifest.plan_of(made, str(folder))
    known = {name: value for name in LICENCES if (value := (licences or {}).get(name))}
    page = Environment(finalize=_plain, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    )
    with TeacherStore(folder, made, False) as store:
        return page.render(
            head=_Safe(_head(plan, made, known)), title=_title(plan), facts=_facts(plan, made, known),
            splits=_splits(store, made), fields=[_field(spec) for spec in plan.fields], fidelity=_fidelity(store),
            layered=any("layers" in spec.parameters for spec in plan.fields), source=_Safe(source.rstrip("/")),
            split=_Safe(plan.shards[0].split), shard=_Safe(plan.shards[0].name),
        )  # fmt: skip


class _Safe(str):
    """Text that is ours, or was checked: it is written as it is."""


def _plain(value: object) -> object:
    """What the template writes of a value: no links, no HTML, one line."""
    if not isinstance(value, str) or isinstance(value, _Safe):
        return value
    return _SPECIAL.sub(lambda found: " " if found[0] < " " else f"\\{found[0]}", value)


def _head(plan: Plan, made: Mapping[str, Any], known: Mapping[str, str]) -> str:
    import yaml

    samples = sum(entry["rows"] for entry in made["shards"])
    head = {
        "pretty_name": _title(plan),
        "tags": ["predistill", "knowledge-distillation"],
        "task_categories": [_HUB_TASKS[plan.task]] if plan.task in _HUB_TASKS else None,
        "size_categories": [next((word for bound, word in _SIZES if samples < bound), "n>1B")],
        "configs": [{"config_name": "default", "data_files": [{"split": "samples", "path": manifest.SAMPLES}]}],
        **known,
    }
    given = {name: value for name, value in head.items() if value is not None}
    return yaml.safe_dump(given, allow_unicode=True, sort_keys=False)


def _title(plan: Plan) -> str:
    teachers = plan.identity.get("teachers")
    parts = [plan.identity.get("dataset"), plan.identity.get("teacher")]
    if isinstance(teachers, list) and len(teachers) > 1:
        parts[1] = {"name": f"{len(teachers)} teachers"}
    names = [Path(str(part["name"])).name for part in parts if isinstance(part, Mapping) and part.get("name")]
    return " by ".join(names) if len(names) == 2 else f"Teacher outputs, {plan.task}"


def _facts(plan: Plan, made: Mapping[str, Any], known: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = [("task", plan.task)]
    rows += [(part, _named(said)) for part, said in _made_from(plan) if said]
    rows += [
        ("samples", f"{sum(entry['rows'] for entry in made['shards']):,}"),
        ("bytes", f"{sum(entry['bytes'] for entry in made['shards']):,}"),
    ]
    if isinstance(plan.label_names, list) and plan.label_names:
        shown = ", ".join(map(str, plan.label_names[:_SHOWN]))
        more = f", … ({len(plan.label_names)})" if len(plan.label_names) > _SHOWN else ""
        rows.append(("classes", shown + more))
    rows.append(("fingerprint", str(made["fingerprint"])))
    if taken := plan.settings.get("taken_from"):
        rows.append(("taken from", _origin(taken)))
    if merged := plan.identity.get("merged_from"):
        rows.append(("merged from", _merged(merged)))
    rows += [(name.replace("_", " ").replace("license", "licence"), known.get(name, UNKNOWN)) for name in LICENCES]
    return rows


def _made_from(plan: Plan) -> list[tuple[str, Any]]:
    """(what, its identity): of an ensemble store every teacher, by what its columns begin with."""
    found = [(part, plan.identity.get(part)) for part in manifest.NAMED]
    try:
        said = [(f"{one['prefix']}…", one["teacher"]) for one in plan.identity.get("teachers", ())]
    except (KeyError, TypeError):
        return found
    return [*said, *found[1:]] if said else found


def _origin(taken: Any) -> str:
    try:
        left, fields = taken["left_out"], len(taken["left_out"]["fields"])
        return (
            f"a store of fingerprint {taken['fingerprint']}, without {left['shards']} of its {taken['shards']} shards "
            f"and {fields} of its {taken['fields']} fields"
        )
    except (KeyError, TypeError):
        return UNKNOWN


def _merged(merged: Any) -> str:
    """Of the stores that a merge took, as many as there are."""
    try:
        return "stores of fingerprint " + ", ".join(str(one["fingerprint"])[:12] for one in merged)
    except (KeyError, TypeError):
        return UNKNOWN


def _named(identity: Any) -> str:
    if not isinstance(identity, Mapping):
        return str(identity)
    known = dict.fromkeys(_public(str(identity[key])) for key in ("name", "class") if identity.get(key))
    hashes = [f"{key} {str(value)[:12]}" for key, value in sorted(identity.items()) if key.endswith("sha256") and value]
    revision = [f"revision {identity[key]}" for key in ("revision", "commit") if identity.get(key)]
    return ", ".join([*known, *revision, *hashes]) or UNKNOWN


def _public(name: str) -> str:
    """A Hub id as it is; of a path, which says nothing to others, the last part."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def _splits(store: Any, made: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sizes: dict[str, int] = {}
    for shard, entry in zip(store.shards, made["shards"], strict=True):
        sizes[shard.split] = sizes.get(shard.split, 0) + entry["bytes"]
    return [
        (name, *(f"{split[key]:,}" for key in ("samples", "tokens", "shards")), f"{sizes[name]:,}")
        for name, split in store.splits.items()
    ]


def _field(spec: FieldSpec) -> tuple[str, ...]:
    """Name, shape of a row, dtype, codec, role, and what storing may change of a value at most."""
    bound = _CODECS.get(spec.codec) or (_BOUNDS.get(spec.dtype, "exact") if spec.codec == "dense" else "exact")
    return spec.name, " × ".join(map(str, spec.shape)) or "1", spec.dtype, spec.codec, spec.role, bound


def _fidelity(store: Any) -> list[str]:
    """Figures that the store itself can be asked for: agreement with labels, probability that a top k has; of each
    teacher, where there are several."""
    members = [one for one in store.members if one is not store]
    if members:
        return [f"{one.member}: {line}" for one in members for line in _fidelity(one)]
    lines = []
    try:
        samples = store.sql("SELECT * FROM samples LIMIT 0")
        kinds = dict(zip(samples.columns, map(str, samples.types), strict=True))
        if {kinds.get("label"), kinds.get("teacher_prediction")} <= {"BIGINT", "INTEGER"}:
            query = """SELECT split, count(*), avg((teacher_prediction = label)::INT) FROM samples
                       WHERE label IS NOT NULL AND teacher_prediction IS NOT NULL GROUP BY split ORDER BY split"""
            for split, count, share in store.sql(query).fetchall():
                lines.append(f"teacher and label agree in {share:.2%} of the {count:,} labelled samples of {split}")
        mass = _kept_mass(store)
        if mass is not None:
            lines.append(f"the kept logits have {mass:.3%} of the teacher's probability, mean over the first rows")
    except PredistillError:
        return []
    return lines


def _kept_mass(store: Any) -> float | None:
    import numpy as np

    if not {schema.TOP_K_LOGITS, schema.LOGSUMEXP} <= set(store.fields):
        return None
    rows = store.select(fields=[schema.TOP_K_LOGITS, schema.LOGSUMEXP])
    batch = rows[: min(_SAMPLED, len(rows))]
    kept = np.exp(batch[schema.TOP_K_LOGITS].astype(np.float64) - batch[schema.LOGSUMEXP][..., None])
    real = batch.get("teacher_mask", batch[schema.ATTENTION_MASK]).astype(bool)
    return float(kept.sum(axis=-1)[real].mean()) if real.any() else None
