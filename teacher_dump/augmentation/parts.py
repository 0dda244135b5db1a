"""Work in parts beside the output: a kill costs one part, and the same command goes on to the same bytes.

    .train.jsonl.augment/
      plan.json           settings, hashes, and which rows each part has; never changed
      part-00003.jsonl    views of a part's rows, whole or not there
      done.json           what was written; the parts are gone then

Every file gets a temporary name, fsync, rename, fsync of its folder; a kernel lock keeps a second run out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...store import manifest
from ...store.errors import ConfigError, StoreError, StoreMismatch
from ...store.identity import differences, file_sha256, short
from ...store.shard import fsync_folder
from ...store.strict import read_json
from ...store.writer import take_lock
from .rewrite import View

_INFORMATION = ("identity.masked_lm.name",)  # a path is no identity


def part_bounds(words: list[int], most: int) -> list[tuple[int, int]]:
    """Rows in parts of at most `most` words, and at least one row each."""
    bounds, start, count = [], 0, 0
    for row, size in enumerate(words):
        if row > start and count + size > most:
            bounds.append((start, row))
            start, count = row, 0
        count += size
    return [*bounds, (start, len(words))]


class Work:
    """Holds the lock from `begin` to `close`. plan: {"settings", "identity", "parts": [[first row, row after it]]}."""

    def __init__(self, output: Path, folder: Path, plan: dict[str, Any], lock: IO[bytes]):
        self.output, self._folder, self._plan, self._lock = output, folder, plan, lock

    @classmethod
    def begin(cls, output: Path, plan: dict[str, Any], overwrite: bool) -> Work:
        """Raises StoreMismatch where work of other settings was begun or done, ConfigError where the output is of
        another making, StoreError where another run is at it."""
        folder = output.parent / f".{output.name}.augment"
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / "lock", "augment")
        try:
            stored = _begun(folder)
            if stored is not None and not overwrite:
                _compare(output, stored, plan)
            elif stored is None and output.exists() and not overwrite:
                raise ConfigError(f"OUTPUT {output} is there already; give another name, or --overwrite")
            elif stored is None or _differ(stored, plan):
                for file in sorted(folder.glob("*.json*")):  # done.json first, plan.json last
                    file.unlink()
                manifest.write_json(folder / "plan.json", plan)
        except BaseException:
            lock.close()
            raise
        return cls(output, folder, plan, lock)

    def done(self) -> dict[str, Any] | None:
        """What `finish` wrote, where the output is still that."""
        if not (self._folder / "done.json").exists() or not self.output.exists():
            return None
        found = read_json(self._folder / "done.json")
        if found.get("sha256") != file_sha256(self.output):
            raise StoreError(f"{self.output} was changed after it was written; give another name, or remove it")
        self._remove_parts()  # which a kill after done.json leaves
        return found

    def missing(self) -> list[int]:
        return [at for at in range(len(self._plan["parts"])) if not self._part(at).exists()]

    def keep(self, at: int, views: Iterable[View]) -> None:
        """A part, whole or not at all; its views are written as they come."""
        path = self._part(at)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(view), ensure_ascii=False) + "\n" for view in views)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(self._folder)

    def finish(self, write: Callable[[Path, Iterable[View]], None], rows: int, factor: int) -> dict[str, Any]:
        """The output from all parts: at its place when it is whole, and the parts removed then."""
        count = 0

        def counted() -> Iterator[View]:
            nonlocal count
            for view in self._views():
                count += 1
                yield view

        temporary = self._folder / "output.tmp"
        write(temporary, counted())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        found = {
            "output": self.output.name, "rows": rows + count, "original_rows": rows, "augmented_rows": count,
            "repeated": rows * factor - count, "bytes": temporary.stat().st_size, "sha256": file_sha256(temporary),
        }  # fmt: skip
        os.replace(temporary, self.output)
        fsync_folder(self.output.parent)
        manifest.write_json(self._folder / "done.json", found)
        self._remove_parts()
        return found

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _part(self, at: int) -> Path:
        return self._folder / f"part-{at:05d}.jsonl"

    def _remove_parts(self) -> None:
        for file in self._folder.glob("part-*"):
            file.unlink()

    def _views(self) -> Iterator[View]:
        for at in range(len(self._plan["parts"])):
            with open(self._part(at), encoding="utf-8") as file:
                yield from (View(**json.loads(line)) for line in file)


def _begun(folder: Path) -> dict[str, Any] | None:
    """The plan of what was begun there; one of which no part is finished holds nobody to it."""
    finished = (folder / "done.json").exists() or any(folder.glob("part-*.jsonl"))
    return read_json(folder / "plan.json") if finished and (folder / "plan.json").exists() else None


def _differ(stored: dict[str, Any], plan: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, stored, current) of what differs; what a person chose before what follows from it."""
    found = [one for one in differences(stored, plan) if one[0] not in _INFORMATION]
    return sorted(found, key=lambda one: not one[0].startswith("settings"))


def _compare(output: Path, stored: dict[str, Any], plan: dict[str, Any]) -> None:
    if found := _differ(stored, plan):
        name, left, right = found[0]
        raise StoreMismatch(
            f"{output}: {name} differs: it was begun with {short(left)}, this run has {short(right)}: use the same "
            "settings, another OUTPUT, or --overwrite"
        )
