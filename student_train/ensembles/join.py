"""Several stores: an ensemble of teachers of the same rows, or rows to be read one after another?

One store of an ensemble *leads*: the first whose tokenizer is the student's, else the first that was given. Inputs,
labels, the order of classes, what is inside the teacher and --where are its own; of the others the averaged columns are
read, of the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...store.addresses import Addresses, Common, addresses, compared
from ...store.errors import ConfigError, StoreMismatch
from ...store.identity import canonical, short, tokenizer_sha256
from ...store.images.views import VIEW_FIELDS
from ...store.reader import TeacherRows, TeacherStore
from ...store.schema import LABELS, MISSING_LABEL, WORD_IDS, FieldSpec
from ..losses.catalogue import REGRESSION, SINGLE_LABEL
from ..progress import say
from ..settings import BILSTM_CNN, FROM_TEACHER_LAYERS, TrainConfig
from ..students import Student
from ..tasks import task_of
from ..tokens import load_tokenizer
from .formulas import fixed_weights
from .rows import CONFIDENCE, Combination, EnsembleRows, Member

LEARNED, EQUAL = "learned", "equal"
DEFAULT_SPLIT = "validation"


class Ensemble:
    """Stores that speak of the same rows, the leading one first.

    weights: float64 [K] in the order of the stores, or CONFIDENCE; None until they are learnt.
    Raises ConfigError or StoreMismatch for teachers that cannot be averaged.
    """

    def __init__(self, config: TrainConfig, stores: Sequence[TeacherStore]) -> None:
        self.config, self.given = config, list(stores)
        self.stores = leading(config, stores)
        self.lead, self.task = self.stores[0], task_of(self.stores[0])
        self.averaged = _averaged(self.lead)
        self.problem_type = getattr(self.task, "problem_type", SINGLE_LABEL)
        self.split = config.ensemble_split or DEFAULT_SPLIT
        self._check_columns()
        self.classes = [None, *(self._classes(store) for store in self.stores[1:])]
        self.weights = self._first_weights()
        self._places: dict[str, list[np.ndarray]] = {}

    @property
    def name_of_weights(self) -> str:
        return "as given" if self.config.given_weights() else self.config.ensemble_weights

    def learnt_on(self) -> str | None:
        """The split that weights are still to be learnt on."""
        return self.split if self.weights is None else None

    def combination(self) -> Combination:
        """While weights are being learnt: equal ones."""
        weights = self.weights if self.weights is not None else fixed_weights([1.0] * len(self.stores))
        specs = [self.lead.fields[name] for name in self.averaged]
        return Combination(
            {spec.name: _axis(spec) for spec in specs}, self.config.ensemble_average, weights, self.problem_type,
            frozenset(spec.name for spec in specs if len(spec.shape) == 1 and isinstance(spec.shape[0], str)),
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """{"ensemble": …} for predistill.json and metrics.json; weights in the order in which the stores were given."""
        weights: Any = self.weights
        if isinstance(weights, torch.Tensor):
            each = dict(zip((store.place for store in self.stores), weights.tolist(), strict=True))
            weights = {store.place: each[store.place] for store in self.given}
        own = {"average": self.config.ensemble_average, "chosen": self.name_of_weights, "weights": weights}
        return {"ensemble": {**own, "leading": self.lead.place}}

    # ---- rows ----

    def around(self, part: Any, rows: TeacherRows, student: Student, split: str, wanted: Sequence[str]) -> EnsembleRows:
        """part: `rows` of the leading store as the student reads them. wanted: columns that the loss reads."""
        own = self.lead.select(split=split, fields=[]).sample_ids
        at = np.searchsorted(own, rows.sample_ids)
        members = []
        for number, store in enumerate(self.stores[1:]):
            ids = store.select(split=split, fields=[]).sample_ids[self._places_in(split)[number][at]]
            order = None
            if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
                sorted_ids = np.sort(ids)
                ids, order = sorted_ids, np.searchsorted(sorted_ids, ids)
            names = [name for name in (*self.averaged, WORD_IDS) if name in wanted and name in store.fields]
            specs = [store.fields[name] for name in names]
            found = self._as_tokens(TeacherRows(store, ids, specs, split), part, order, student)
            members.append(Member(found, order, self.classes[number + 1]))
        made = EnsembleRows(part, members, self.combination())
        return made.narrowed(wanted)

    def _as_tokens(self, rows: TeacherRows, part: Any, order: np.ndarray | None, student: Student) -> Any:
        """Rows of another store in the tokens that the student reads. Raises StoreMismatch where theirs are others."""
        if not any({"S", "P"} & set(map(str, self.lead.fields[name].shape)) for name in self.averaged):
            return rows
        found: Any = rows.with_fields([spec.name for spec in rows.specs])
        if student.retokenize or _tokenizer(rows.store) != _tokenizer(self.lead):
            found = task_of(rows.store).retokenized(found, student.tokenizer, None)
        theirs = found.lengths if order is None else found.lengths[order]
        if (theirs != part.lengths).any():
            at = int(np.flatnonzero(theirs != part.lengths)[0])
            raise StoreMismatch(
                f"row {at} of split {rows.split} has {part.lengths[at]} tokens in {self.lead.place} and {theirs[at]} "
                f"in {rows.store.place}: dump both with the same --max-length"
            )
        return found

    def _places_in(self, split: str) -> list[np.ndarray]:
        """int64 [N] for each other store: where in it each row of the leading store's split is."""
        if split not in self._places:
            ours = addresses(self.lead, split)
            found = []
            for store in self.stores[1:]:
                common = compared(ours, addresses(store, split))
                if not common.whole:
                    raise StoreMismatch(differing(self.lead, store, split, common))
                self._check_views(store, split, common.places)
                found.append(common.places)
            self._places[split] = found
            self._tell_labels(split)
        return self._places[split]

    # ---- what must agree ----

    def _check_columns(self) -> None:
        if not self.averaged:
            kept = ", ".join(name for name, spec in self.lead.fields.items() if spec.role == "teacher")
            raise ConfigError(
                f"{self.lead.place} and {self.stores[1].place} speak of the same rows, and of {self.lead.task} only "
                f"whole logits are averaged; kept are {kept}: dump every logit (--top-k-logits 0), or read one after "
                "another with --several-stores concatenate"
            )
        tokens = any("S" in self.lead.fields[name].shape for name in self.averaged if name in self.lead.fields)
        for store in self.stores:
            if missing := [name for name in self.averaged if name not in store.fields]:
                raise ConfigError(f"{store.place} has no {missing[0]} to be averaged: dump --fields logits too")
            problem_type = getattr(task_of(store), "problem_type", SINGLE_LABEL)
            shapes = [[one.fields[name].shape for name in self.averaged] for one in (self.lead, store)]
            same_words = tokens and WORD_IDS not in store.fields
            for what, ours, theirs in (
                ("problem type", self.problem_type, problem_type),
                ("number of classes", *shapes),
                *((("tokenizer", _tokenizer(self.lead), _tokenizer(store)),) if same_words else ()),
            ):
                if canonical(ours) != canonical(theirs):
                    raise StoreMismatch(
                        f"{what} differs: {self.lead.place} has {short(ours)}, {store.place} has {short(theirs)}; only "
                        "teachers that agree in it are averaged"
                    )

    def _classes(self, store: TeacherStore) -> np.ndarray | None:
        """int64 [C]: which of its classes each class of the leading store is; None where all stand in place."""
        ours, theirs = self.lead.label_names, store.label_names
        if not ours or not theirs:
            if ours or theirs:
                unnamed = self.lead if theirs else store
                say(f"{unnamed.place} does not name its classes: taken to be in the order of the others")
            return None
        left, right = ([name.strip().lower() for name in names] for names in (ours, theirs))
        if left == right:
            return None
        if sorted(left) != sorted(right) or len(set(left)) < len(left):
            first = next(at for at, name in enumerate(left) if name not in right or left.count(name) > 1)
            raise StoreMismatch(
                f"label names differ: class {first} of {self.lead.place} is {ours[first]!r}, and {store.place} has "
                f"{short(theirs)}; teachers of the same classes are averaged"
            )
        say(f"{store.place} has the classes of {self.lead.place} in another order: they are put in order by name")
        return np.array([right.index(name) for name in left], np.int64)

    def _check_views(self, store: TeacherStore, split: str, places: np.ndarray) -> None:
        """Raises StoreMismatch where the same image was cut in other ways."""
        for name in (spec.name for spec in VIEW_FIELDS if spec.name in self.lead.fields or spec.name in store.fields):
            sides = [one.select(split=split, fields=[]).column(name) if name in one.fields else None
                     for one in (self.lead, store)]  # fmt: skip
            if sides[0] is None or sides[1] is None or not np.array_equal(sides[0], sides[1][places]):
                raise StoreMismatch(
                    f"{name} differs: {self.lead.place} and {store.place} hold other views of the same images; dump "
                    "both with the same --views, --view-transforms and --view-seed"
                )

    def _tell_labels(self, split: str) -> None:
        """One line for each store whose labels of rows are others than the leading store's."""
        spec = self.lead.fields.get(LABELS)
        if spec is None or spec.shape or not spec.dtype.startswith("int"):
            return
        ours = np.asarray(self.lead.select(split=split, fields=[]).column(LABELS))
        for number, store in enumerate(self.stores[1:]):
            if store.fields.get(LABELS, spec).shape or LABELS not in store.fields:
                continue
            theirs = np.asarray(store.select(split=split, fields=[]).column(LABELS))[self._places[split][number]]
            classes = self.classes[number + 1]
            if classes is not None:
                theirs = np.where(theirs >= 0, np.argsort(classes)[theirs.clip(0)], theirs)
            count = int(((ours != theirs) & (ours != MISSING_LABEL) & (theirs != MISSING_LABEL)).sum())
            if count:
                say(f"labels of {count} rows of {split} differ between {self.lead.place} and {store.place}: those of "
                    "the first are learnt from")  # fmt: skip

    def _first_weights(self) -> torch.Tensor | str | None:
        chosen, given = self.config.ensemble_weights, self.config.given_weights()
        if given:
            each = dict(zip(map(id, self.given), given, strict=True))
            return fixed_weights([each[id(store)] for store in self.stores])
        if chosen == CONFIDENCE and self.problem_type == REGRESSION:
            raise ConfigError("--ensemble-weights confidence: a regression has none; give numbers, or learned")
        if chosen == LEARNED:
            if not all(self.averaged.values()):
                raise ConfigError(f"--ensemble-weights learned is not for {self.lead.task}; give numbers or confidence")
            return None
        return CONFIDENCE if chosen == CONFIDENCE else fixed_weights([1.0] * len(self.stores))


# ---- which of both ----


def joined(config: TrainConfig, stores: Sequence[TeacherStore], splits: Sequence[str]) -> Ensemble | None:
    """An ensemble where the stores speak of the same rows; None where they are to be read one after another.

    splits: those that a run reads, the one to train on first, which decides. Raises StoreMismatch for anything between,
    with the rows of each, those in common, and the first that differs.
    """
    if len(stores) == 1 or config.several_stores == "concatenate":
        return None
    if config.several_stores == "auto" and not _averaged(stores[0]):
        config.refuse_ensemble(f"stores of {stores[0].task} without whole logits, which alone are averaged")
        say(f"{len(stores)} stores without whole logits, which alone are averaged: read one after another")
        return None
    for store in stores:
        store.select(split=splits[0], fields=[])  # raises where it is not there
    known = [addresses(store, splits[0]) for store in stores]
    apart = config.several_stores == "auto" and not any_in_common(stores, known, splits[0])
    if apart:
        config.refuse_ensemble(f"{len(stores)} stores without a row of {splits[0]} in common")
        say(f"{len(stores)} stores without a row of split {splits[0]} in common: read one after another")
        return None
    made = Ensemble(config, stores)
    for split in dict.fromkeys([*splits, *filter(None, [made.learnt_on()])]):
        for store in stores:
            if split not in store.splits:
                raise ConfigError(f"{store.place} has no split {split} to learn weights on; give --ensemble-split")
        made._places_in(split)
    rows = ", ".join(f"{made.lead.splits[split]['samples']:,} of {split}" for split in dict.fromkeys(splits))
    if made.learnt_on() in splits[1:]:
        say(f"weights are learnt on {made.split}, which is evaluated on too: the ensemble's own metrics are flattered")
    how = f"{config.ensemble_average} averaged, weights {made.name_of_weights}"
    say(f"an ensemble: {len(stores)} stores speak of the same rows ({rows}); {how}")
    return made


def _averaged(store: TeacherStore) -> dict[str, str]:
    return dict(getattr(task_of(store), "averaged", {}))


def any_in_common(stores: Sequence[TeacherStore], known: Sequence[Addresses], split: str) -> bool:
    """Do all stores have the same rows (True), or none in common (False)? Raises StoreMismatch for anything between."""
    found = [(a, b, compared(known[a], known[b])) for a in range(len(stores)) for b in range(a + 1, len(stores))]
    if all(common.whole for _, _, common in found):
        return True
    for a, b, common in found:
        if common.common or 2 * common.elsewhere > common.rows[1]:
            raise StoreMismatch(differing(stores[a], stores[b], split, common))
    return False


def differing(ours: TeacherStore, theirs: TeacherStore, split: str, common: Common) -> str:
    """One line: rows of both, rows in common, the first that differs."""
    assert common.first is not None
    index, view, left, right = common.first
    sides = [f"{one[:8]}… in" if one else "not in" for one in (left, right)]
    row = f"source_index {index}" + (f", view {view}" if view else "")
    other = ""
    if not common.common and common.elsewhere:
        other = f" ({common.elsewhere:,} have content of the first, at other places)"
    return (
        f"stores of the same rows, or of none in common, expected: of split {split}, {ours.place} has "
        f"{common.rows[0]:,} rows, {theirs.place} {common.rows[1]:,}, {common.common:,} in common{other}; the first "
        f"row that differs is {row}, content {sides[0]} the first, {sides[1]} the second: dump both from the same "
        "rows, or read one after another with --several-stores concatenate"
    )


def leading(config: TrainConfig, stores: Sequence[TeacherStore]) -> list[TeacherStore]:
    """The stores, first the one whose tokens the student reads."""
    name = config.student
    if len({_tokenizer(store) for store in stores}) == 1 or name is None:
        return list(stores)
    if name == BILSTM_CNN or name.startswith(FROM_TEACHER_LAYERS):
        return list(stores)
    own = load_tokenizer(name)
    wanted = None if own is None else tokenizer_sha256(own)
    return sorted(stores, key=lambda store: _tokenizer(store) != wanted)


def _tokenizer(store: TeacherStore) -> str | None:
    return store.identity.get("tokenizer", {}).get("sha256")


def _axis(spec: FieldSpec) -> int:
    """Of the classes, in a batch: the last, but for maps (C, H, W)."""
    return 1 if len(spec.shape) == 3 and all(isinstance(size, int) for size in spec.shape) else -1
