"""Are the rebuilt pixels those that the teacher saw? Their hashes tell, of some batches of a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from ...store.errors import StoreMismatch
from ...store.images.pixels import PIXEL_HASH, PIXEL_VALUES, pixel_hash
from ..objective import Batch
from ..progress import say

EVERY = 100  # batches: the first is looked at, and then one of so many
_MAKERS = ("pillow", "numpy", "transformers")  # packages that may make other pixels in another version


class PixelCheck:
    """mode: "warn" says it once, "refuse" raises StoreMismatch, "off" looks at nothing. stored: versions of the dump.

    Hashing takes about 1 ms a row of 224 x 224 pixels, which is nothing beside one batch in a hundred.
    """

    def __init__(self, stored: Mapping[str, str], mode: str = "warn") -> None:
        self.stored, self.mode, self.said = dict(stored), mode, False
        self._seen: dict[bool, int] = {}

    def look(self, batch: Batch, training: bool) -> None:
        """batch: pixel_values float32 [B, C, H, W], pixel_hash int64 [B]; one without hashes is let through."""
        number = self._seen[training] = self._seen.get(training, -1) + 1
        if self.mode == "off" or self.said or number % EVERY or PIXEL_HASH not in batch:
            return
        made = pixel_hash(batch[PIXEL_VALUES].detach().cpu())
        differ = int(np.count_nonzero(made != batch[PIXEL_HASH].cpu().numpy()))
        if not differ:
            return
        line = (
            f"pixels of {differ} of {len(made)} rows are not those that the teacher saw: {self._versions()}; logits "
            "may be of slightly other images"
        )
        if self.mode == "refuse":
            raise StoreMismatch(f"{line}: install what the store was made with, dump anew, or --pixel-check warn")
        say(f"warning: {line}")
        self.said = True

    def _versions(self) -> str:
        there = {name: self.stored[name] for name in _MAKERS if name in self.stored}
        here = {name: _version(name) for name in _MAKERS}
        apart = [name for name in there if there[name] != here[name]]
        if there and not apart:
            return f"the store was made with the same {_listed(there)}, so its shards or this computer are other"
        shown = apart or list(_MAKERS)
        return f"the store was made with {_listed({name: there.get(name, 'unknown') for name in shown})}, here is " + (
            _listed({name: here[name] for name in shown})
        )


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
