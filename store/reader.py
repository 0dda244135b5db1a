"""TeacherStore: open a store, select rows, read them back.

store = TeacherStore.open("stores/sst2")
rows = store.select(split="train", where="teacher_confidence < 0.9", fields=["teacher_logits"])
rows[[4, 1, 9]]                        # arrays that the caller owns
for batch in rows.batches([[0, 1], [2, 3]]): ...   # arrays that are reused, one thread ahead
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from . import manifest, schema
from .codecs import WHOLE_COLUMN, stored_parts
from .errors import ConfigError, StoreCorrupt
from .gather import Allocate, Gather, Slot, allocate
from .index import Index, MemoryIndex
from .mapped import MappedShard, recent
from .prefetch import Prefetcher
from .remote.elsewhere import is_url
from .rows import BatchRows
from .schema import FieldSpec

if TYPE_CHECKING:
    import datasets

ALWAYS = (schema.INPUT_IDS, "token_type_ids", schema.POSITION_IDS, schema.LABELS)  # read whatever `fields` asks for
FEW = 16  # shards that are opened to tell about all; of more, the index and some of them do
Indices = int | slice | Sequence[int] | np.ndarray


class TeacherStore:
    """A store, opened for reading. Nothing is mapped before the first row that needs it.

    Raises StoreError, StoreIncomplete (unless allow_partial), StoreCorrupt, FormatVersionError.
    """

    url: str | None = None  # of a store whose folder is a cache's
    member: str | None = None  # of a teacher of an ensemble store: its name

    def __init__(self, path: str | os.PathLike[str], made: Mapping[str, Any], partial: bool):
        self.path, self.manifest, self._partial = Path(path), dict(made), partial
        plan = manifest.plan_of(made, str(self.path))
        self.task, self.settings, self.identity, self.label_names = (
            plan.task,
            plan.settings,
            plan.identity,
            plan.label_names,
        )
        self.fields: dict[str, FieldSpec] = {spec.name: spec for spec in plan.fields}
        self.fingerprint: str = made["fingerprint"]
        self.shards = plan.shards
        self.first_row = np.zeros(len(plan.shards) + 1, np.int64)
        np.cumsum([entry["rows"] for entry in made["shards"]], out=self.first_row[1:])
        self._recent = recent(self._map)
        self._index = Index(self.path, int(self.first_row[-1]))

    @classmethod
    def open(cls, path: str | os.PathLike[str], allow_partial: bool = False) -> TeacherStore:
        """path: a folder, or a URL (hf://datasets/user/name, s3://…), whose shards come into a cache as they are read.

        allow_partial: of an unfinished store in a folder, read the shards that are committed.
        """
        if is_url(path):
            from .remote.opened import open_remote

            return open_remote(str(path))
        folder = Path(path)
        if allow_partial and not (folder / manifest.MANIFEST).exists():
            return cls(folder, _partial_manifest(folder), True)
        return cls(folder, manifest.read_manifest(folder), False)

    @functools.cached_property
    def splits(self) -> dict[str, dict[str, int]]:
        """{"train": {"samples", "shards", "tokens"}}, in plan order."""
        found: dict[str, dict[str, int]] = {}
        for shard, entry in zip(self.shards, self.manifest["shards"], strict=True):
            split = found.setdefault(shard.split, {"samples": 0, "shards": 0, "tokens": 0})
            split["samples"] += entry["rows"]
            split["shards"] += 1
            split["tokens"] += entry["tokens"]
        return found

    @property
    def tokenizer_dir(self) -> Path | None:
        folder = self.path / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def place(self) -> str:
        """Where it was opened from; of a teacher of an ensemble store with its name."""
        where = self.url or str(self.path)
        return f"{where}:{self.member}" if self.member else where

    @property
    def members(self) -> list[TeacherStore]:
        """Of an ensemble store its teachers, each as a store of its own; else the store itself."""
        from .members import members_of

        return members_of(self)

    def select(
        self, split: str | None = None, where: str | None = None, fields: Sequence[str] | None = None
    ) -> TeacherRows:
        """Rows of one split (None: all), kept by a SQL expression over `samples`, with some fields (None: all).

        Inputs and labels always come along. Raises ConfigError for a split, field or expression that is not there.
        """
        if split is not None and split not in self.splits:
            raise ConfigError(f"{self.path}: split {split!r} is not there; it has {', '.join(self.splits)}")
        for name in fields or ():
            if name not in self.fields:
                raise ConfigError(f"{self.path}: field {name!r} is not stored; it has {', '.join(self.fields)}")
        names = list(self.fields) if fields is None else [*ALWAYS, *fields, *_companions(self.fields, fields)]
        chosen = [spec for name, spec in self.fields.items() if name in names]
        return TeacherRows(self, self._sample_ids(split, where), chosen, split)

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """A relation over the tables `samples` and `shards`: read-only, no external access, configuration locked."""
        return self._index.sql(query)

    def to_dataset(self, split: str | None = None) -> datasets.Dataset:
        """A `datasets.Dataset` around the mapped shards; worker processes reopen the store."""
        from .hf import to_dataset

        return to_dataset(self, split)

    def mapped(self, shard: int) -> MappedShard:
        """Shard number `shard` of the manifest, mapped at first use, and again where many others were meanwhile."""
        return self._recent(shard)

    def _map(self, shard: int) -> MappedShard:
        mapped, said = MappedShard(self.shard_path(shard)), self.manifest["shards"][shard]["bytes"]
        if mapped.bytes != said:
            raise StoreCorrupt(f"{mapped.path}: {said} bytes by the manifest; got {mapped.bytes}")
        return mapped

    def longest(self, ids: np.ndarray | range) -> tuple[int, int] | None:
        """(place, tokens) of the longest of some sample_ids, by the index; None where there is none to ask."""
        there = not self._partial and (self.path / manifest.INDEX).exists()
        return self._index.longest(ids) if there else None

    def shard_path(self, shard: int) -> Path:
        return manifest.shard_path(self.path, self.shards[shard].name)

    def close(self) -> None:
        self._index.close()
        self._recent.cache_clear()

    def __enter__(self) -> TeacherStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherStore.open, (self.path, self._partial)

    def _sample_ids(self, split: str | None, where: str | None) -> np.ndarray | range:
        """A range where rows are contiguous, so that a whole split of 10 million rows costs no memory."""
        if where is not None:
            if self._partial:
                self._index = MemoryIndex(self.path, self.manifest)
            return self._index.sample_ids(where, split)
        numbers = [at for at, shard in enumerate(self.shards) if split in (None, shard.split)]
        self._check_largest(numbers)
        if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return range(int(self.first_row[numbers[0]]), int(self.first_row[numbers[-1] + 1]))
        pieces = [np.arange(self.first_row[at], self.first_row[at + 1]) for at in numbers]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def _check_largest(self, numbers: Sequence[int]) -> None:
        """Before memory is taken for as many rows as the manifest counts: is the largest of these shards, where it is
        here, as large as it says?"""
        largest = numbers[int(np.diff(self.first_row)[numbers].argmax())] if numbers else 0
        if not numbers or not self.shard_path(largest).is_file():
            return
        said, found = self.manifest["shards"][largest]["bytes"], self.shard_path(largest).stat().st_size
        if found != said:
            raise StoreCorrupt(f"{self.shard_path(largest)}: {said} bytes by the manifest; got {found}")


class TeacherRows:
    """Some rows of a store, in source order, with some of its fields. Safe to pickle and to fork.

    stored: of these fields, those whose bfloat16 or int8 is not decoded (codecs.stored_parts).
    """

    def __init__(
        self, store: TeacherStore, ids: np.ndarray | range, fields: Sequence[FieldSpec], split: str | None,
        stored: Collection[str] = (),
    ):  # fmt: skip
        self.store, self._ids, self.specs, self.split = store, ids, list(fields), split
        self.stored = frozenset(spec.name for spec in fields if spec.name in stored and stored_parts(spec))
        self._gather = Gather(self.specs, store.first_row, store.mapped, self.stored)

    @property
    def fields(self) -> dict[str, FieldSpec]:
        return {spec.name: spec for spec in self.specs}

    def with_fields(self, names: Sequence[str], stored: Collection[str] = ()) -> TeacherRows:
        """The same rows with inputs, labels and those of `names` that are in the store, `stored` as they are there."""
        wanted = {*ALWAYS, *names, *_companions(self.store.fields, [n for n in names if n in self.store.fields])}
        specs = [spec for name, spec in self.store.fields.items() if name in wanted]
        return TeacherRows(self.store, self._ids, specs, self.split, stored)

    def kept(self, wanted: np.ndarray) -> TeacherRows:
        """Those of the rows that bool [N] says."""
        ids = self._ids if wanted.all() else self.sample_ids[wanted]
        return TeacherRows(self.store, ids, self.specs, self.split, self.stored)

    @property
    def sample_ids(self) -> np.ndarray:
        """int64 [N]: positions in the whole store, the `sample_id` of the index."""
        return np.arange(self._ids.start, self._ids.stop) if isinstance(self._ids, range) else self._ids

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each row; every shard is opened. Raises ConfigError where the store has no tokens."""
        self._check_tokens()
        name, found = schema.INPUT_IDS, np.empty(len(self), np.int64)
        for shard, places, local in self._by_shard():
            starts = self._gather.extent(shard, name, self._gather.parts[name][0]).starts
            assert starts is not None
            found[places] = np.diff(starts)[local]
        return found

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens of these rows, by their numbers; the shards that they are in are opened."""
        self._check_tokens()
        return BatchRows(self._gather, self._resolve(rows)).lengths(schema.INPUT_IDS, "S")

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """(row, tokens) of the longest row, the first of them; by the index where there are more than FEW shards."""
        self._check_tokens()
        if len(self.store.shards) > FEW and (found := self.store.longest(self._ids)) is not None:
            return found
        at = int(np.argmax(self.lengths)) if len(self) else 0
        return at, int(self.lengths[at]) if len(self) else 0

    def _check_tokens(self) -> None:
        if schema.INPUT_IDS not in self.fields:
            raise ConfigError(f"{self.store.path}: rows of task {self.store.task} have no tokens")

    @property
    def nbytes(self) -> int:
        """Bytes of the selected columns, about: a shard's columns times the part of its rows that is selected. Of more
        than FEW shards, that part of their files that it is in FEW of them, evenly spread."""
        counts, entries = self._counts(), self.store.manifest["shards"]
        touched = np.flatnonzero(counts)
        files = np.array([entries[at]["bytes"] / max(entries[at]["rows"], 1) * counts[at] for at in touched])
        looked = np.unique(np.linspace(0, len(touched) - 1, FEW).astype(np.int64)) if len(touched) else touched
        held = sum(self._columns_bytes(at) * counts[at] for at in touched[looked].tolist())
        return int(held * files.sum() / max(files[looked].sum(), 1))

    def _columns_bytes(self, shard: int) -> float:
        """Of a row of a shard, on average."""
        mapped = self.store.mapped(shard)
        return sum(mapped.column(spec.name).nbytes for spec in self.specs) / max(mapped.rows, 1)

    def _counts(self) -> np.ndarray:
        """int64 [shards]: how many of these rows are in each."""
        ids, first = self._ids, self.store.first_row
        if isinstance(ids, range):
            return np.diff(np.clip(first, ids.start, ids.stop))
        return np.diff(np.searchsorted(ids, first))

    def column(self, name: str) -> Any:
        """All values of a sample-level column, [N, *shape], decoded; a list for carried columns."""
        if name not in self.store.fields:
            raise ConfigError(f"{self.store.path}: field {name!r} is not stored; it has {', '.join(self.store.fields)}")
        spec = self.store.fields[name]
        if schema.symbols(spec.shape):
            raise ConfigError(f"field {name} differs in length from row to row; read it in batches")
        gather = Gather([spec], self.store.first_row, self.store.mapped)
        return gather.batch(self.sample_ids, Slot())[name]

    def batches(
        self, indices: Iterable[Sequence[int] | np.ndarray], buffers: int = 2, allocate: Allocate = allocate
    ) -> Iterator[dict[str, Any]]:
        """Padded batches in reused memory, gathered one thread ahead: the fast path.

        indices: an iterable of index lists into these rows. A batch is valid until `buffers` - 1 more were taken.
        allocate: bytes -> uint8 array, for memory of another kind (pinned).
        """
        if buffers < 1:
            raise ConfigError(f"buffers is at least 1; got {buffers}")
        store = self.store
        return iter(Prefetcher(
            self._gather, lambda shard: str(store.shard_path(shard)), indices, self._resolve, self._row_bytes, buffers,
            allocate,
        ))  # fmt: skip

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, key: Indices) -> dict[str, Any]:
        """Padded arrays that the caller owns; one index gives one row without padding."""
        if isinstance(key, (int, np.integer)):
            one = self._gather.batch(self._resolve([operator.index(key)]), Slot())
            return {name: values[0] for name, values in one.items()}
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        return self._gather.batch(self._resolve(key), Slot())

    def __getitems__(self, keys: Sequence[int]) -> dict[str, Any]:
        """What a torch DataLoader calls for a batch: one gather, not one a row."""
        return self[list(keys)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.store, self._ids, [spec.name for spec in self.specs], self.split, self.stored)

    def _resolve(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 sample_ids of indices into these rows; negative ones count from the end."""
        at = np.asarray(indices)
        if at.dtype == np.bool_ and at.shape == (len(self),):
            at = np.flatnonzero(at)
        if not at.size:
            return np.zeros(0, np.int64)
        if at.dtype.kind not in "iu" or at.ndim != 1:
            raise ConfigError(f"rows are chosen by a list of integers; got {at.dtype} of shape {at.shape}")
        low, high, count = int(at.min()), int(at.max()), len(self)
        if low < -count or high >= count:
            raise IndexError(f"row {high if high >= count else low} is not among the {count} selected")
        at = at.astype(np.int64, copy=False) if low >= 0 else np.where(at < 0, at + count, at).astype(np.int64)
        return at + self._ids.start if isinstance(self._ids, range) else self._ids[at]

    @functools.cached_property
    def _row_bytes(self) -> float:
        """Bytes of a row of the first shard, about: what a chunk of batches is measured in."""
        if not len(self):
            return 1.0
        mapped = self.store.mapped(int(np.searchsorted(self.store.first_row, self._ids[0], side="right")) - 1)
        names = [spec.name for spec in self.specs if spec.codec not in WHOLE_COLUMN]
        return sum(mapped.column(name).nbytes for name in names) / max(mapped.rows, 1)

    def _by_shard(self) -> Iterator[tuple[int, slice, np.ndarray]]:
        """(shard, places among these rows, rows in the shard), for all of them."""
        counts = self._counts()
        ends = np.cumsum(counts)
        for shard in np.flatnonzero(counts).tolist():
            begin, end = int(ends[shard] - counts[shard]), int(ends[shard])
            ids = np.arange(begin, end) + self._ids.start if isinstance(self._ids, range) else self._ids[begin:end]
            yield shard, slice(begin, end), ids - self.store.first_row[shard]


def _reopen(
    store: TeacherStore, ids: np.ndarray | range, names: list[str], split: str | None, stored: Collection[str]
) -> TeacherRows:
    return TeacherRows(store, ids, [store.fields[name] for name in names], split, stored)


def _companions(fields: Mapping[str, FieldSpec], chosen: Sequence[str]) -> list[str]:
    """Columns that others cannot be read without."""
    counts = [fields[name].parameters["counts"] for name in chosen if "K" in fields[name].shape]
    return [*counts, *([schema.POSITIONS] if any(fields[name].shape[:1] == ("P",) for name in chosen) else [])]


def _partial_manifest(folder: Path) -> dict[str, Any]:
    plan = manifest.read_plan(folder)
    done = manifest.committed(folder, plan)
    kept = [shard for shard in plan.shards if shard.name in done]
    partial = manifest.Plan(plan.task, plan.settings, plan.identity, plan.fields, kept, plan.label_names)
    return {
        "format_version": schema.FORMAT_VERSION,
        "plan": partial.to_json(),
        "fingerprint": plan.fingerprint,
        "shards": [{"name": shard.name, **done[shard.name]} for shard in kept],
    }
