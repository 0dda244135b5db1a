"""Is every byte what the dump wrote? And what is in a store, said in one dictionary."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from . import index, manifest
from .codecs import WHOLE_COLUMN, Part, parts_of
from .errors import ConfigError, FormatVersionError, PredistillError, StoreCorrupt, StoreError, StoreIncomplete
from .identity import file_sha256
from .manifest import Plan, shard_path
from .mapped import MappedShard, check_counts, check_square, counting
from .members import TEACHERS, tellers
from .parts import part_names
from .reader import TeacherStore
from .remote.elsewhere import clean, is_url
from .schema import INPUT_IDS, FieldSpec, is_list, is_ragged
from .shard import ShardPlan
from .shared import LEASE

OTHERS = (".gitattributes", ".cache", ".git")  # of who copied the store
KNOWN = {
    manifest.PLAN,
    manifest.MANIFEST,
    manifest.SHARDS,
    manifest.INDEX,
    manifest.SAMPLES,
    manifest.CARD,
    manifest.LOCK,
    *manifest.FOLDERS,
    *OTHERS,
}

Problem = dict[str, str]
MEASURED = 1000  # shards whose columns' sizes are looked at


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a store: manifest, plan, every shard's bytes and structure, index and samples against the shards; of images
    also whether a sample of rows still gives the pixels that the teacher saw.

    Returns {"ok", "shards", "samples", "bytes", "problems": [{"path", "kind", "detail"}]}; each detail names what to
    do. Raises StoreError only where the folder is not a store at all.
    """
    if is_url(path):
        raise ConfigError(f"a store is verified where its bytes are: predistill pull {clean(str(path))} FOLDER first")
    folder = Path(path)
    found: dict[str, Any] = {"ok": False, "shards": 0, "samples": 0, "bytes": 0, "problems": []}
    try:
        made = manifest.read_manifest(folder)
    except (StoreCorrupt, FormatVersionError, StoreIncomplete) as error:
        kind = "missing" if isinstance(error, StoreIncomplete) else "manifest"
        found["problems"].append(_problem(folder / manifest.MANIFEST, folder, kind, str(error)))
        return found
    plan = manifest.plan_of(made, str(folder))
    problems = [*_plan_problems(folder, plan, made), *_file_problems(folder, made), *_teacher_problems(folder, made)]
    bad_shards = 0
    for shard, entry in zip(plan.shards, made["shards"], strict=True):
        mine = [*_shard_problems(folder, plan, shard, entry)]
        problems += mine
        bad_shards += bool(mine)
        found["shards"] += 1
        found["samples"] += entry["rows"]
        found["bytes"] += entry["bytes"]
    problems += [*_extra_problems(folder, plan), *_folder_problems(folder, made), *_link_problems(folder)]
    if not bad_shards:  # an index can only be held against sound shards
        problems += _index_problems(folder, made)
        problems += _pixel_problems(folder)
    return {**found, "ok": not problems, "problems": problems}


def _plan_problems(folder: Path, plan: Plan, made: Mapping[str, Any]) -> Iterator[Problem]:
    path = folder / manifest.PLAN
    if made["fingerprint"] != plan.fingerprint:
        yield _problem(folder / manifest.MANIFEST, folder, "manifest", "its fingerprint is not that of its plan")
    try:
        stored = manifest.read_plan(folder)
        if stored.to_json() != (plan if stored.shards else plan.base).to_json():  # parts stay where they were dumped
            yield _problem(path, folder, "plan", f"is not the plan that {manifest.MANIFEST} was made from")
    except StoreError as error:
        kind = "plan" if path.exists() else "missing"
        yield _problem(path, folder, kind, f'{error}; {manifest.MANIFEST} holds a copy under "plan"')


def _teacher_problems(folder: Path, made: Mapping[str, Any]) -> Iterator[Problem]:
    """Of an ensemble store: does it say whose columns are whose?"""
    try:
        tellers(TeacherStore(folder, made, False))
    except StoreCorrupt as error:
        yield _problem(folder / manifest.MANIFEST, folder, "manifest", str(error))


def _file_problems(folder: Path, made: Mapping[str, Any]) -> Iterator[Problem]:
    """Tokenizer and samples: everything that is neither shard, index nor card."""
    for name, entry in made.get("files", {}).items():
        path = folder / name
        again = f"delete {manifest.MANIFEST}, then run the same dump again: the shards stay"
        remake = _rebuild(folder) if name == manifest.SAMPLES else again
        if not path.is_file():
            yield _problem(path, folder, "missing", f"is not there; {remake}")
        elif path.stat().st_size != entry["bytes"]:
            yield _problem(
                path, folder, "size", f"{entry['bytes']} bytes expected, {path.stat().st_size} found; {remake}"
            )
        elif file_sha256(path) != entry["sha256"]:
            yield _problem(path, folder, "checksum", f"its sha256 is not {entry['sha256'][:12]}…; {remake}")


def _rebuild(folder: Path) -> str:
    return f"make it anew with: predistill index {folder} --rebuild"


def _shard_problems(folder: Path, plan: Plan, shard: ShardPlan, entry: Mapping[str, Any]) -> Iterator[Problem]:
    path = shard_path(folder, shard.name)
    remake = (
        f"delete {path.name} and {path.stem}.json in {path.parent}, then run the same dump again: "
        "only this shard is made anew"
    )
    if not path.is_file():
        yield _problem(path, folder, "missing", f"is not there; {remake}")
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield _problem(path, folder, "size", f"{entry['bytes']} bytes expected, {size} found; {remake}")
        return
    if file_sha256(path) != entry["sha256"]:
        yield _problem(path, folder, "checksum", f"its sha256 is not {entry['sha256'][:12]}…; {remake}")
        return
    try:
        check_structure(path, plan, shard, entry)
    except PredistillError as error:
        yield _problem(path, folder, "structure", f"{error}; {remake}")
    sidecar = path.with_suffix(".json")
    try:
        said = manifest.read_sidecar(path)
    except (FileNotFoundError, StoreCorrupt) as error:
        yield _problem(sidecar, folder, "missing" if not sidecar.exists() else "sidecar", f"{error}; {remake}")
        return
    if {**entry, "fingerprint": plan.fingerprint} != {**said, "name": shard.name}:
        yield _problem(sidecar, folder, "sidecar", f"does not agree with {manifest.MANIFEST}; {remake}")


def check_structure(path: Path, plan: Plan, shard: ShardPlan, entry: Mapping[str, Any]) -> MappedShard:
    """The shard, once its own description, every buffer and every offset were looked at. Raises StoreCorrupt."""
    mapped = MappedShard(path)
    try:
        mapped.batch.validate(full=True)
    except Exception as error:  # pyarrow raises several kinds
        raise StoreCorrupt(f"{path}: {str(error).splitlines()[0]}") from error
    if mapped.fingerprint != plan.fingerprint or mapped.place != {**shard.to_json(), "rows": mapped.rows}:
        raise StoreCorrupt(f"{path} is another shard, or another store's: it says it is {mapped.place}")
    if mapped.rows != entry["rows"] or mapped.fields != plan.fields:
        raise StoreCorrupt(f"{path} does not hold the rows or fields of the plan")
    lengths, squares = dict[Any, Any](), list[tuple[FieldSpec, Part, Any]]()
    for spec in plan.fields:
        mapped.column(spec.name)
        for part in parts_of(spec) if spec.codec not in WHOLE_COLUMN else ():
            _, starts = mapped.part(spec, part)
            if starts is not None and is_list(part.shape) and part.shape[0] != "*":
                leader = lengths.setdefault(part.shape[0], starts)
                if (leader != starts).any():
                    raise StoreCorrupt(f"{path}: column {spec.name} has other lengths than its row's {INPUT_IDS}")
            elif is_ragged(part.shape):
                _check_counts(mapped, plan, spec, part, starts)
            elif starts is not None and not is_list(part.shape):
                squares.append((spec, part, starts))
    for spec, part, starts in squares:
        check_square(path, spec, part, starts, lengths)
    return mapped


def _check_counts(mapped: MappedShard, plan: Plan, spec: FieldSpec, part: Part, starts: Any) -> None:
    """Does each row hold as many values as the counts of its positions tell?"""
    beside = counting(spec, plan.fields, mapped.path)
    values, rows = mapped.part(beside, *parts_of(beside))
    counts = values[:, 0].astype(np.int64)
    check_counts(spec, part, counts, int(starts[-1]), mapped.path)
    before = np.concatenate([[0], np.cumsum(part.sizes(counts))])
    if (before[rows] != starts).any():
        raise StoreCorrupt(f"{mapped.path}: rows of {spec.name} hold another number of values than {beside.name} tells")


def _extra_problems(folder: Path, plan: Plan) -> Iterator[Problem]:
    expected = {f"{shard.name}{suffix}" for shard in plan.shards for suffix in (".arrow", ".json")}
    present = (
        {entry.name for entry in (folder / manifest.SHARDS).iterdir()} if (folder / manifest.SHARDS).is_dir() else set()
    )
    for name in sorted(name for name in present - expected if not name.endswith(LEASE)):  # a worker's, at work or dead
        yield _problem(
            folder / manifest.SHARDS / name, folder, "extra", "is not in the plan; delete it if it is not yours"
        )
    for name in sorted({entry.name for entry in folder.iterdir()} - {*KNOWN, *part_names(folder)}):
        yield _problem(folder / name, folder, "extra", "is not part of a store; delete it if it is not yours")


def _folder_problems(folder: Path, made: Mapping[str, Any]) -> Iterator[Problem]:
    """What lies beside the files that the manifest lists: a tokenizer.json changes the ids that vocab.txt gives."""
    listed = made.get("files", {})
    folders = {*manifest.FOLDERS, *(Path(name).parts[0] for name in listed if "/" in name)} - {manifest.SHARDS}
    for name in sorted(folders):
        for entry in _inside(folder / name):
            path = Path(entry.path)
            if path.relative_to(folder).as_posix() not in listed and not entry.is_symlink():
                yield _problem(path, folder, "extra", f"is not listed in {manifest.MANIFEST}; delete it")


def _inside(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All in a folder and its folders that is no folder itself; no link is followed."""
    left = [str(folder)] if folder.is_dir() and not folder.is_symlink() else []
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                else:
                    yield entry


def _link_problems(folder: Path) -> Iterator[Problem]:
    """A stranger's link leads to files that are not the store's. README.md is there to be edited, or linked."""
    for top in (folder / name for name in sorted(KNOWN.difference(OTHERS, [manifest.CARD]))):
        links = [Path(entry.path) for entry in _inside(top) if entry.is_symlink()]
        for path in [top] if top.is_symlink() else links:
            yield _problem(path, folder, "link", "is a link; a store has none: put the file itself there, or delete it")


def _index_problems(folder: Path, made: Mapping[str, Any]) -> Iterator[Problem]:
    """Both tables of index.duckdb against the shards."""
    remake, path = _rebuild(folder), folder / manifest.INDEX
    try:
        with index.Index(folder) as stored:
            if not index.agrees(folder, made, stored.connection):
                yield _problem(path, folder, "index", f"does not agree with the shards; {remake}")
    except (StoreCorrupt, duckdb.Error) as error:
        said = str(error).splitlines()[0]
        detail = said if remake in said else f"{said}; {remake}"
        yield _problem(path, folder, "index" if path.exists() else "missing", detail)


def _pixel_problems(folder: Path) -> Iterator[Problem]:
    """Of a store of images: a sample of rows, decoded again."""
    from .images.verify import pixel_problem

    if problem := pixel_problem(folder):
        yield _problem(folder / manifest.SHARDS, folder, "pixels", problem)


def _problem(path: Path, folder: Path, kind: str, detail: str) -> Problem:
    return {"path": str(path.relative_to(folder)), "kind": kind, "detail": detail}


def rebuild_index(path: str | os.PathLike[str]) -> dict[str, int]:
    """index.duckdb and samples.parquet anew from the shards. Returns {"samples", "shards"}."""
    folder = Path(path)
    made = manifest.read_manifest(folder)
    with open(folder / manifest.LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{folder} is being written by a dump; wait for it, or stop it") from error
        index.build(folder, made)
        again = manifest.sealed({**made, "files": manifest.described_files(folder)})
        if again != made:  # another version of DuckDB writes parquet otherwise
            manifest.write_json(folder / manifest.MANIFEST, again)
    return {"samples": sum(entry["rows"] for entry in made["shards"]), "shards": len(made["shards"])}


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `predistill info` says: keys as in the README. An unfinished store is described by what is committed."""
    with TeacherStore.open(path, allow_partial=True) as store:
        rows = sum(split["samples"] for split in store.splits.values())
        return {
            "path": store.url or str(Path(path)),
            "format_version": store.manifest["format_version"],
            "task": store.task,
            "complete": (store.path / manifest.MANIFEST).exists(),
            "bytes": sum(entry["bytes"] for entry in store.manifest["shards"]),
            "samples": rows,
            "splits": store.splits,
            "fields": _field_sizes(store),
            "label_names": store.label_names,
            "teacher": store.identity.get("teacher"),
            "teachers": [one.to_json() for one in tellers(store)] if TEACHERS in store.identity else None,
            "tokenizer": store.identity.get("tokenizer"),
            "processor": store.identity.get("processor"),
            "dataset": store.identity.get("dataset"),
            "versions": store.identity.get("versions"),
            "settings": store.settings,
            "fingerprint": store.fingerprint,
        }


def _field_sizes(store: TeacherStore) -> dict[str, dict[str, Any]]:
    """Bytes from each shard's own buffers: shards are mapped, no values are read. None where they are elsewhere. Of
    more than MEASURED shards, so many are looked at, evenly spread, and taken for all by their files' sizes."""
    sizes: dict[str, Any] = dict.fromkeys(store.fields, 0 if store.url is None else None)
    files = [entry["bytes"] for entry in store.manifest["shards"]]
    looked = np.unique(np.linspace(0, len(files) - 1, min(len(files), MEASURED)).astype(np.int64)).tolist()
    for at in looked if store.url is None else []:
        mapped = store.mapped(at)
        for name in sizes:
            sizes[name] += mapped.column(name).nbytes
    if len(looked) < len(files) and store.url is None:
        share = sum(files) / max(sum(files[at] for at in looked), 1)
        sizes = {name: round(size * share) for name, size in sizes.items()}
    return {
        name: {
            "codec": spec.codec,
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "role": spec.role,
            "bytes": sizes[name],
        }
        for name, spec in store.fields.items()
    }
