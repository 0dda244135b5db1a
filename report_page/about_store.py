"""One store: what it is and what it was made from, what its teacher knows, what it costs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..store import manifest
from ..store.members import tellers
from ..store.reader import TeacherStore
from ..store.verify import describe
from .asked import Asked
from .hardest import hardest
from .knowledge import knowledge

MADE_FROM = ("teacher", "tokenizer", "processor", "dataset")
MOST_LINES = 100  # of splits, of settings
LONGEST = 200  # characters of a value


def about_stores(path: str) -> list[dict[str, Any]]:
    """Everything that the page says of a store, of an ensemble store teacher by teacher; an unfinished one is reported
    on as far as it is.

    Raises StoreError for what is no store, or is damaged.
    """
    told = describe(path)
    with TeacherStore.open(path, allow_partial=True) as store:
        members = store.members if told["complete"] else [store]
        return [_about(path, one, *_of_member(told, store, one)) for one in members]


def _of_member(told: Mapping[str, Any], whole: TeacherStore, store: TeacherStore) -> tuple[dict[str, Any], set[str]]:
    """(what is told of one teacher, the columns of the whole store that it does not know by that name)"""
    if store is whole:
        return dict(told), set()
    columns = {one.name: set(one.columns.values()) for one in tellers(whole)}
    others = set().union(*(each for name, each in columns.items() if name != store.member))
    fields = {name: field for name, field in told["fields"].items() if name not in others}
    made = {**told, "teacher": store.identity["teacher"], "settings": store.settings, "fields": fields}
    return made, set().union(*columns.values()) - set(store.fields)


def _about(path: str, store: TeacherStore, told: Mapping[str, Any], unknown: Collection[str]) -> dict[str, Any]:
    known: dict[str, Any] = {"knowledge": None, "hardest": {"by": None, "columns": [], "rows": [], "notes": []}}
    splits = list(told["splits"])[:MOST_LINES]
    indexed = None
    if store.shards:
        with Asked(store, partial=not told["complete"]) as asked:
            asked.columns = {name: kind for name, kind in asked.columns.items() if name not in unknown}
            indexed = asked.rows("SELECT count(*) FROM samples")[0][0]
            known = {"knowledge": knowledge(asked, splits, told["label_names"]), "hardest": hardest(store, asked)}
    return {
        "name": name_of(path, store.url) + (f": {store.member}" if store.member else ""),
        "task": str(told["task"]),
        "complete": told["complete"],
        "shards": len(store.shards),
        "planned_shards": len(manifest.read_plan(store.path).shards) if not told["complete"] else len(store.shards),
        "samples": told["samples"],
        "bytes": told["bytes"],
        "fingerprint": told["fingerprint"],
        "classes": len(told["label_names"]) if isinstance(told["label_names"], list) else None,
        "made_from": [(part, line) for part in MADE_FROM if (line := named(told[part]))],
        "versions": named(told["versions"]),
        "settings": settings(told["settings"]),
        "splits": split_sizes(store, told["splits"]),
        "checks": checks(store, told, indexed),
        "fields": field_costs(told),
        **known,
    }


def name_of(path: str, url: str | None) -> str:
    """The folder's own name: where it lies is nobody's business who reads the page."""
    return url or Path(path).resolve().name or str(path)


def named(identity: Any) -> str:
    """ "name bert, class BertFor…, weights_sha256 7028366aa3a1…" of a part of the identity, whatever that is."""
    if not isinstance(identity, Mapping):
        return "" if identity is None else str(identity)[:LONGEST]
    parts = []
    for key, value in list(identity.items())[:MOST_LINES]:
        if value is None or isinstance(value, dict | list):
            continue
        text = Path(str(value)).name if key == "name" and Path(str(value)).is_absolute() else str(value)
        parts.append(f"{key} {text[:12] + '…' if str(key).endswith('sha256') else text[:LONGEST]}")
    return ", ".join(parts)


def settings(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [(str(name), json.dumps(value, ensure_ascii=False)) for name, value in list(found.items())[:MOST_LINES]]
    return [(name, text if len(text) <= LONGEST else text[: LONGEST - 1] + "…") for name, text in lines]


def split_sizes(store: TeacherStore, splits: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    sizes: dict[str, int] = {}
    for shard, entry in zip(store.shards, store.manifest["shards"], strict=True):
        sizes[shard.split] = sizes.get(shard.split, 0) + entry["bytes"]
    return [{"split": name, **counts, "bytes": sizes[name]} for name, counts in list(splits.items())[:MOST_LINES]]


def checks(store: TeacherStore, told: Mapping[str, Any], indexed: int | None) -> list[dict[str, Any]]:
    """{"what", "ok"}: those that cost nothing. ok is None where nothing can be said."""
    made = store.manifest["shards"]
    here = None
    if store.url is None:
        here = sum(_size(store.shard_path(at)) == entry["bytes"] for at, entry in enumerate(made))
    return [
        {"what": "all planned shards are made", "ok": told["complete"]},
        {"what": "the manifest is as it was written", "ok": True if told["complete"] else None},
        {"what": "every shard has the manifest's size", "ok": None if here is None else here == len(made)},
        {"what": "the index has the manifest's rows", "ok": None if indexed is None else indexed == told["samples"]},
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def field_costs(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each column with its bytes, of a sample and of a token; the dearest first."""
    samples = told["samples"]
    tokens = sum(split["tokens"] for split in told["splits"].values())
    lines = [
        {
            "name": name, "role": field["role"], "codec": field["codec"], "dtype": field["dtype"],
            "shape": " × ".join(map(str, field["shape"])) or "1", "bytes": field["bytes"],
            "bytes_per_sample": field["bytes"] / samples if field["bytes"] is not None and samples else None,
            "bytes_per_token": field["bytes"] / tokens if field["bytes"] is not None and tokens else None,
        }
        for name, field in told["fields"].items()
    ]  # fmt: skip
    return sorted(lines, key=lambda line: -(line["bytes"] or 0))
