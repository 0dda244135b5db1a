"""The writer of a store whose plan grows, for any number of processes: whoever has nothing left to do reads on, and
appends a part.

    with GrowingWriter.begin(path, plan) as writer:
        part = writer.part(split, start) or writer.append(Part(...))
        for shard in writer.claim_of(part):
            ...
            writer.commit(builder)
        writer.finish(card)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import manifest
from .errors import StoreError
from .manifest import Plan
from .parts import Part, Parts, part_file, with_parts
from .shard import ShardPlan
from .shared import PLANNING, SharedWriter, waited


class GrowingWriter(SharedWriter):
    """As SharedWriter. Raises also StoreCorrupt where a part is not as it was appended; StoreError where parts stayed
    elsewhere, as of a store that was pulled."""

    def __init__(self, path: Path, plan: Plan, *more: Any):
        super().__init__(path, plan, *more)
        self._parts, self._at = Parts(path, plan.base), dict[tuple[str, int], Part]()
        if not self._parts.all and (plan.shards or any((path / manifest.SHARDS).glob("*.json"))):
            raise StoreError(
                f"{path} is a copy of what was dumped with --streaming, or lost rows to predistill drop, and only the "
                "dump's own folder can go on; give another --output-dir"
            )
        self._known(self._parts.all)

    @property
    def ends(self) -> dict[str, int]:
        """How many rows of each split have parts."""
        return {part.split: part.stop for part in self._at.values()}

    def part(self, split: str, start: int) -> Part | None:
        """The one that begins at this row."""
        if (split, start) not in self._at:
            self._known(self._parts.look())
        return self._at.get((split, start))

    def file_of(self, part: Part) -> str:
        return part_file(self._parts.all.index(part) + 1)

    def append(self, part: Part) -> Part:
        """Returns the part that is there now: this one, unless another worker was quicker. A finished store is
        unfinished from then on."""
        with waited(self.path / manifest.SHARDS / PLANNING, self._kind, self._timeout):
            if self.part(part.split, part.start) is None and not self._closed.is_set():
                (self.path / manifest.MANIFEST).unlink(missing_ok=True)
                self._parts.append(part)
                self._known([part])
        return self._at.get((part.split, part.start), part)

    def claim_of(self, part: Part) -> Iterator[ShardPlan]:
        """Its shards, as far as nobody else has them."""
        for shard in part.shards:
            if not manifest.is_committed(self.path, self.plan, shard) and self._claimed(shard):
                yield shard

    def missing(self) -> list[ShardPlan]:
        """Of all the parts that there are now."""
        self._known(self._parts.look())
        self.plan = with_parts(self.plan, self._parts.all)
        return super().missing()

    def _known(self, parts: list[Part]) -> None:
        self._at |= {(part.split, part.start): part for part in parts}
