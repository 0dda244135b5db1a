"""How stores can become one: more rows, more fields of the same rows, or more teachers; and why they cannot.

What decides what a row is must agree: task, classes, teacher, tokenizer, settings, fields. Where the teacher ran and by
which library versions moves values within the bound of their dtype: it may differ, is told, and stands in the manifest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..addresses import Addresses, Common, addresses, compared
from ..codecs import WHOLE_COLUMN
from ..errors import ConfigError, StoreMismatch
from ..identity import differences, short
from ..members import TEACHERS, tellers
from ..reader import TeacherStore
from .merge_teachers import check_teachers, same_teacher

ROWS, FIELDS, ENSEMBLE = "rows", "fields", "teachers"
LAYOUT = ("splits", "shard_size", "tokens_per_batch")  # settings that say where rows stand, not what is in them
_MORE = {FIELDS: "the same rows of its teacher", ENSEMBLE: "the same rows of another teacher", ROWS: "other rows"}
_WHERE = ("name", "device", "attention")  # of a teacher's identity: its place, and how it was computed


class Shared(NamedTuple):
    """Of the splits that two stores both have."""

    splits: dict[str, Common]
    rows: int  # at equal addresses, with equal content

    @property
    def whole(self) -> bool:
        return all(common.whole for common in self.splits.values())


def kind_of(stores: Sequence[TeacherStore], keep_duplicates: bool) -> str:
    """ROWS, FIELDS or ENSEMBLE. Raises StoreMismatch, ConfigError."""
    kinds = [_kind_of(stores[0], other, keep_duplicates) for other in stores[1:]]
    if len(set(kinds)) > 1:
        told = [f"{stores[1 + kinds.index(kind)].path} has {_MORE[kind]}" for kind in _MORE if kind in kinds]
        raise ConfigError(f"beside {stores[0].path}, {' and '.join(told)}: merge one after the other")
    return kinds[0]


def _kind_of(first: TeacherStore, other: TeacherStore, keep_duplicates: bool) -> str:
    if first.path.resolve() == other.path.resolve():
        raise ConfigError(f"{other.path} is given twice")
    _refuse(first, other, {"task": first.task}, {"task": other.task})
    found = shared(first, other)
    by_chance = keep_duplicates and not found.whole and dataset_of(first) != dataset_of(other)
    if not found.rows or by_chance:
        check_rows(first, other)
        return ROWS
    if not found.whole or set(first.splits) != set(other.splits):
        raise StoreMismatch(_partly(first, other, found))
    if same_teacher(first, other):
        check_fields(first, other)
        return FIELDS
    check_teachers(first, other)
    return ENSEMBLE


def shared(first: TeacherStore, other: TeacherStore) -> Shared:
    both = [split for split in first.splits if split in other.splits]
    splits = {split: compared(addresses(first, split), addresses(other, split)) for split in both}
    return Shared(splits, sum(common.common for common in splits.values()))


def _partly(first: TeacherStore, other: TeacherStore, found: Shared) -> str:
    """Counts, and the first row that differs."""
    counts = [
        f"{split}: {one.rows[0]} rows and {one.rows[1]}, {one.common} shared" for split, one in found.splits.items()
    ]
    for one, two in ((first, other), (other, first)):
        counts += [f"{split}: in {one.path} alone" for split in one.splits if split not in two.splits]
    differing = [(split, one.first) for split, one in found.splits.items() if one.first]
    where = ""
    if differing:
        split, (index, view, ours, theirs) = differing[0]
        said = f"content {ours[:12] or 'not there'} and {theirs[:12] or 'not there'}"
        where = f"; the first that differs is {split} source_index {index}, view {view}: {said}"
    return f"{first.path} and {other.path} share some rows and not others ({'; '.join(counts)}){where}"


def check_rows(first: TeacherStore, other: TeacherStore) -> None:
    """Rows side by side: everything but the data must agree."""
    _refuse(first, other, _identity(first), _identity(other))
    _refuse(first, other, {"settings": _content(first)}, {"settings": _content(other)})
    ours, theirs = ({name: spec.to_json() for name, spec in store.fields.items()} for store in (first, other))
    _refuse(first, other, {"fields": ours}, {"fields": theirs})
    for name, spec in first.fields.items():
        if spec.codec in WHOLE_COLUMN and first.shards and other.shards:
            kinds = [str(store.mapped(0).column(name).type) for store in (first, other)]
            _refuse(first, other, {f"type of column {name}": kinds[0]}, {f"type of column {name}": kinds[1]})
    _note(first, other)


def check_fields(first: TeacherStore, other: TeacherStore) -> None:
    """Fields side by side: the same teacher and tokenizer; columns of both must be of one kind."""
    _refuse(first, other, _identity(first), _identity(other))
    both = [name for name in first.fields if name in other.fields]
    ours, theirs = ({name: store.fields[name].to_json() for name in both} for store in (first, other))
    _refuse(first, other, {"fields": ours}, {"fields": theirs})
    if len(both) == len(other.fields):
        raise ConfigError(f"{other.path} has no field that {first.path} has not: there is nothing to merge")
    _note(first, other)


def duplicates(ours: Addresses, theirs: Addresses) -> tuple[int, int]:
    """(rows of `theirs` whose content `ours` has too, the first of them; -1 where there is none)."""
    kind = np.dtype([("high", np.uint64), ("low", np.uint64)])
    left, right = (np.ascontiguousarray(one.content_hash).view(kind).reshape(-1) for one in (ours, theirs))
    found = np.flatnonzero(np.isin(right["high"], left["high"]))
    known = set(left[np.isin(left["high"], right["high"][found])].tolist())
    again = [at for at in found.tolist() if tuple(right[at].tolist()) in known]
    return len(again), again[0] if again else -1


def dataset_of(store: TeacherStore) -> object:
    """What tells datasets apart; two that do not say are not one."""
    return (store.identity.get("dataset") or {}).get("rows_sha256") or store.path


def _content_of(teacher: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in teacher.items() if key not in _WHERE}


def _identity(store: TeacherStore) -> dict[str, Any]:
    """What a merge refuses to mix."""
    made: dict[str, Any] = {"label_names": {str(at): name for at, name in enumerate(store.label_names or ())}}
    made["identity.teacher"] = _content_of(store.identity.get("teacher") or {})
    if TEACHERS in store.identity:
        made[f"identity.{TEACHERS}"] = {one.prefix: _content_of(one.teacher) for one in tellers(store)}
    for part in ("tokenizer", "processor"):
        made[f"identity.{part}"] = {
            key: value for key, value in (store.identity.get(part) or {}).items() if key != "name"
        }
    return made


def _content(store: TeacherStore) -> dict[str, Any]:
    return {key: value for key, value in store.settings.items() if key not in LAYOUT}


def _refuse(first: TeacherStore, other: TeacherStore, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if found := differences(ours, theirs):
        name, left, right = found[0]
        more = f" (and {len(found) - 1} more: {', '.join(one[0] for one in found[1:4])})" if len(found) > 1 else ""
        raise StoreMismatch(
            f"{name} differs: {first.path} has {short(left)}, {other.path} has {short(right)}{more}; only stores that "
            "agree become one"
        )


def _note(first: TeacherStore, other: TeacherStore) -> None:
    ours, theirs = (
        {"versions": store.identity.get("versions"), "teacher": store.identity.get("teacher")}
        for store in (first, other)
    )
    for name, left, right in differences(ours, theirs):
        if not name.endswith(".name"):
            line = f"note: {name} differs: {first.path} has {short(left)}, {other.path} has {short(right)}"
            print(line, file=sys.stderr, flush=True)
