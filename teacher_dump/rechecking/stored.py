"""A dump's task over rows that are stored already: their tokens are read, not made, and no dataset is needed.

n rows, S tokens of each, P of them with entries.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from ...store import ConfigError, FieldSpec, TeacherStore, schema
from ...store.images.views import VIEW_FIELDS, VIEW_MIX_WITH, mixed
from ...store.schema import INPUT_IDS, LABELS, LOGITS, POSITION_IDS, POSITIONS, SAMPLE_COUNTS, TOKEN_TYPES
from ..config import DumpConfig
from ..data import SourceData
from ..inside.inner import DTYPE, STORAGE, Inner, Way, place_of
from ..inside.layers import EXACT, INNER
from ..tasks import TASKS, Samples
from .config import RecheckConfig

_PROBES: dict[str, dict[str, list[Any]]] = {  # one row of the usual columns, for what looks at a dataset first
    "text-classification": {"text": ["a"]},
    "token-classification": {"tokens": [["a"]]},
    "question-answering": {"question": ["a"], "context": ["a"]},
    "causal-lm": {"text": ["a"]},
    "image-classification": {"image": [None]},
    "semantic-segmentation": {"image": [None]},
}
_DTYPES = ("float16", "bfloat16", "float32")
_PREFIX = f"{schema.LOGSUMEXP}_at_"


def config_of(store: TeacherStore, asked: RecheckConfig) -> DumpConfig:
    """The settings that the store was dumped with, as far as they decide what a teacher says of its rows."""
    if store.task not in _PROBES:
        raise ConfigError(f"verify --teacher re-runs {', '.join(_PROBES)}; {store.path} holds {store.task}")
    said, task = store.settings, TASKS[store.task]
    known = task.settings
    own: dict[str, Any] = {} if task.of_images else {"text_column": next(iter(_PROBES[store.task]))}
    own |= {name: "none" for name in ("label_column", "mask_column") if name in known}
    if "label_order" in known:
        own |= {"label_names": list(store.label_names or ()), "label_order": "by-id"}
    if "problem_type" in known and said.get("problem_type"):
        own["problem_type"] = said["problem_type"]
    if "top_k_logits" in known:
        own |= _of_tokens(store)
    dtype = store.identity.get("teacher", {}).get("dtype")
    kept = [name for name in said.get("fields", ["logits"]) if name == "logits" or name in INNER]
    return DumpConfig(
        teacher=str(asked.teacher), dataset="stored", task=store.task, output_dir=str(store.path), dtype="float32",
        fields=kept or ["logits"], layers=_layers(said, kept), capture=list(said.get("capture", [])),
        attention_storage=EXACT if task.of_images else said.get(STORAGE, EXACT), device=asked.device,
        device_map=asked.device_map, tp_plan=asked.tp_plan,
        teacher_revision=asked.teacher_revision, trust_remote_code=asked.trust_remote_code,
        teacher_dtype=dtype if dtype in _DTYPES else "auto", **own,
    )  # fmt: skip


def source_of(store: TeacherStore) -> SourceData:
    probe = _PROBES[store.task]
    features = datasets.Features({"image": datasets.Image()}) if TASKS[store.task].of_images else None
    return SourceData(str(store.path), None, {"train": datasets.Dataset.from_dict(probe, features)})


def inner_of(store: TeacherStore) -> Inner | None:
    """Columns of the teacher's inside, in float32: what it says now is not rounded."""
    found = [spec for spec in store.fields.values() if spec.role == "teacher" and place_of(spec)[0]]
    if not found:
        return None
    wide = [FieldSpec(one.name, one.shape, "float32", parameters=one.parameters) for one in found]
    return Inner(Way(store.settings.get(STORAGE, EXACT), str(store.settings.get(DTYPE, "float32"))), tuple(wide))


def samples_of(store: TeacherStore, ids: np.ndarray, inputs: set[str]) -> Samples:
    """Rows of the store as `prepare` would have made them. ids: sample_ids; inputs: names that the model takes."""
    if TASKS[store.task].of_images:
        return _images_of(store, ids)
    names = [spec.name for spec in store.fields.values() if spec.role in ("input", "label", "carried")]
    partly = [one for one in store.fields.values() if one.shape[:1] == ("P",) and one.name != POSITIONS]
    smallest = [min(partly, key=lambda one: len(one.shape)).name] if partly else []  # it brings the positions along
    rows = store.select(fields=[*names, *smallest])[ids]
    mask = rows[schema.ATTENTION_MASK].astype(bool)
    values: dict[str, Any] = {}
    for name in names:
        spec = store.fields[name]
        if spec.codec == "arrow":
            values[name] = _arrow(rows[name], spec)
        elif spec.codec != "bytes" and not (name == TOKEN_TYPES and TOKEN_TYPES not in inputs):
            values[name] = rows[name][mask] if spec.shape[:1] == ("S",) else rows[name]
    lengths = {"S": mask.sum(axis=1).astype(np.int64)}
    if POSITIONS in store.fields:
        there = rows["teacher_mask"]
        values[POSITIONS] = there.nonzero()[1].astype(np.int32)
        lengths["P"] = there.sum(axis=1).astype(np.int64)
    for name in (INPUT_IDS, LABELS):
        if name in values and np.issubdtype(values[name].dtype, np.integer):
            values[name] = values[name].astype(np.int64)
    return Samples(lengths, values, np.zeros((len(ids), 16), np.uint8), np.asarray(ids, np.int64))


def _images_of(store: TeacherStore, ids: np.ndarray) -> Samples:
    """Rows of images: their files, which stand in the first view of each, and how the view of each was drawn."""
    from ...store.images.files import Files
    from ..rows.image_rows import ImageSamples

    kept = [name for name in (LABELS, *(spec.name for spec in VIEW_FIELDS)) if name in store.fields]
    rows = store.select(fields=kept)[ids]
    views, files = {name: rows[name] for name in kept if name != LABELS}, Files(store)
    partners = [b""] * len(ids)
    if VIEW_MIX_WITH in views:
        places = np.flatnonzero(mixed(views))
        for at, file in zip(places, files.of(ids[places], views[VIEW_MIX_WITH][places]), strict=True):
            partners[at] = file
    made = ImageSamples(
        {"S": np.ones(len(ids), np.int64)}, {name: rows[name] for name in (LABELS,) if name in rows},
        np.zeros((len(ids), 16), np.uint8), np.asarray(ids, np.int64),
    )  # fmt: skip
    made.files, made.partners, made.views, made.hashes = files.of(ids), partners, views, np.zeros(len(ids), np.int64)
    return made


def _of_tokens(store: TeacherStore) -> dict[str, Any]:
    """How a language model's logits are kept, told by the columns."""
    fields = store.fields
    own: dict[str, Any] = {"positions": "completion" if POSITIONS in fields else "all"}
    if POSITION_IDS in fields:
        own |= {"packing": True, "max_length": store.settings.get("max_length")}
    if SAMPLE_COUNTS in fields:
        said = fields[SAMPLE_COUNTS].parameters
        own |= {"sampled_logits": said["draws"], "sample_temperature": float(said.get("temperature", 1.0))}
    else:
        own["top_k_logits"] = 0 if LOGITS in fields else 1
    if temperatures := [float(name.removeprefix(_PREFIX)) for name in fields if name.startswith(_PREFIX)]:
        own["temperatures"] = temperatures
    return own


def _layers(said: dict[str, Any], kept: list[str]) -> str | None:
    return said.get("layers") if set(kept) & set(INNER) - {"pooled"} else None


def _arrow(values: list[Any], spec: FieldSpec) -> Any:
    """A carried column; of lists of words as the tasks make it."""
    import pyarrow as pa

    kind = pa.list_(pa.string()) if spec.name == schema.TOKENS else None
    return pa.array(values, kind)
