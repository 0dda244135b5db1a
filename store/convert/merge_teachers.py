"""Teachers of the same rows become one ensemble store: which they are, and what their columns are called in it.

Inputs, labels and carried columns are there once, those of the first store that has them; each teacher's columns get
its prefix (members.py). Nothing is averaged here: how is chosen when a student is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, StoreMismatch
from ..identity import canonical, short
from ..members import LONGEST, OWN, TEACHERS, Teller, prefix_of, renamed, tellers
from ..reader import TeacherStore
from ..schema import POSITIONS, FieldSpec

_PLACE = ("name", "device", "attention")  # of a teacher's identity: where it is, and how it was computed
_WEIGHTS = ("weights_sha256", "state_sha256", "commit")
_UNKNOWN = "unknown"


class Teachers(NamedTuple):
    """names: of each store {its column: the merged store's}; said: `identity.teachers`; fields: of the merged store."""

    names: list[dict[str, str]]
    said: list[dict[str, Any]]
    fields: list[FieldSpec]


def same_teacher(first: TeacherStore, other: TeacherStore) -> bool:
    """One teacher each, of the same weights: then only its fields can be merged."""
    ours, theirs = tellers(first), tellers(other)
    plain = TEACHERS not in first.identity and TEACHERS not in other.identity
    return plain and who(ours[0]) == who(theirs[0])


def who(said: Teller) -> str:
    """What tells teachers apart: their weights; of one whose weights are unknown all that is known."""
    known = [said.teacher.get(name) for name in _WEIGHTS]
    hashed = [one for one in known if one and one != _UNKNOWN]
    return canonical(hashed or {k: v for k, v in said.teacher.items() if k not in _PLACE[1:]})


def check_teachers(first: TeacherStore, other: TeacherStore) -> None:
    """Everything but the teacher must agree. Raises StoreMismatch."""
    for part in ("tokenizer", "processor"):
        ours, theirs = ((one.identity.get(part) or {}).get("sha256") for one in (first, other))
        if ours != theirs:
            raise StoreMismatch(
                f"identity.{part}.sha256 differs: {first.path} has {short(ours)}, {other.path} has {short(theirs)}; "
                f"teachers with another {part} stay stores of their own: predistill train {first.path} {other.path}"
            )
    kinds = [one.settings.get("problem_type") for one in (first, other)]
    for name, ours, theirs in (
        ("label_names", first.label_names, other.label_names), ("settings.problem_type", *kinds)
    ):  # fmt: skip
        if canonical(ours) != canonical(theirs):
            raise StoreMismatch(
                f"{name} differs: {first.path} has {short(ours)}, {other.path} has {short(theirs)}; only teachers of "
                "the same classes become an ensemble store"
            )


def teachers_of(stores: Sequence[TeacherStore]) -> Teachers:
    """Raises ConfigError for a teacher that is given twice, StoreMismatch for columns that cannot be beside others."""
    names: list[dict[str, str]] = []
    said: list[dict[str, Any]] = []
    known: dict[str, TeacherStore] = {}
    for store in stores:
        own: dict[str, str] = {}
        for one in tellers(store):
            if who(one) in known:
                raise ConfigError(
                    f"{store.path} and {known[who(one)].path} both have teacher {one.name}: merge what there is of one "
                    "teacher first, then the teachers"
                )
            known[who(one)] = store
            prefix = prefix_of(len(said) + 1)
            own |= {stored: prefix + stored.removeprefix(one.prefix) for stored in one.columns.values()}
            said.append({**one.to_json(), "name": _unique(one.name, said), "prefix": prefix})
        names.append(own)
    return Teachers(names, said, _fields(stores, names))


def _unique(name: str, said: Sequence[dict[str, Any]]) -> str:
    taken = {one["name"] for one in said}
    name = "".join(letter if letter.isprintable() else " " for letter in name)[: LONGEST - 9]
    tried = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(one for one in tried if one not in taken)


def _fields(stores: Sequence[TeacherStore], names: Sequence[dict[str, str]]) -> list[FieldSpec]:
    found: dict[str, FieldSpec] = {}
    own = {name for each in names for name in each.values()}
    for store, mine in zip(stores, names, strict=True):
        for spec in store.fields.values():
            placed = renamed(spec, mine)
            if spec.role in OWN and spec.name not in mine and spec.name != POSITIONS:
                raise StoreMismatch(
                    f"column {spec.name} of {store.path} is of a teacher, none of those whose outputs are there"
                )
            if spec.name not in mine and placed.name in own:
                raise StoreMismatch(f"column {spec.name} of {store.path} has the name of another teacher's column")
            before = found.setdefault(placed.name, placed)
            if before.to_json() != placed.to_json():
                raise StoreMismatch(
                    f"column {spec.name} differs: {store.path} has {short(placed.to_json())}, and another store has "
                    f"{short(before.to_json())}; dump both with the same settings"
                )
    return list(found.values())
