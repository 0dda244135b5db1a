"""Is the name of a dataset, or of a teacher, a path or a Hub id? And which paths are whose split."""

from __future__ import annotations

import re
from pathlib import Path

from ..store.errors import ConfigError

DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".conll", ".bio")
_OTHERS = (".txt", ".zip", ".tar", ".bz2", ".xz", ".zst", ".ndjson", ".xlsx", ".xml", ".yaml", ".pkl", ".npy", ".pt")
_NAMED = re.compile(r"(?P<split>\w[\w.-]*)=(?P<path>.+)", re.DOTALL)


def looks_like_path(name: str) -> bool:
    """Is this the name of a file or folder, rather than a Hub id (`name` or `owner/name`)?"""
    plain = name.removesuffix(".gz").lower()
    return (
        Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.endswith(("/", ".gz"))
        or name.count("/") > 1
        or "\\" in name
        or plain.endswith((*DATA_SUFFIXES, *_OTHERS))
    )


def named_paths(dataset: str) -> dict[str, Path] | None:
    """{split: path} of `train=PATH,validation=PATH`, {"": path} of one path, None of a Hub id.

    Raises ConfigError where something that looks like a path is not there.
    """
    named = None if Path(dataset).expanduser().exists() else _NAMED.match(dataset)
    if named:
        parts = [_NAMED.fullmatch(part) for part in re.split(r",(?=\w[\w.-]*=)", dataset)]
        found = [(part["split"], Path(part["path"]).expanduser()) for part in parts if part]
        paths = dict(found)
        if len(paths) < len(found):
            raise ConfigError(f"--dataset {dataset}: each split is given once")
    elif looks_like_path(dataset):
        paths = {"": Path(dataset).expanduser()}
    else:
        return None
    for path in paths.values():
        if not path.exists():
            raise ConfigError(f"--dataset {dataset}: {path} is not there")
    return paths
