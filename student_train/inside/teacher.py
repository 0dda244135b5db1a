"""What a store holds of the inside of its teacher.

B rows, S tokens, D width, H heads, K key heads, d head size. Of images every row has the same positions, so that their
columns have no S and nothing is masked; a convolution's map [C, H, W] is compared as H * W positions of width C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...store.attention import AttentionSettings, attention_probabilities, attention_scores
from ...store.errors import ConfigError, StoreCorrupt
from ...store.schema import FieldSpec, layer_column, symbols
from ..layers import Pairs, layer_map, stored_columns
from ..objective import Batch

POOLED = "pooled"
POOLED_COLUMN = "teacher_pooled"
MODULE = "module"  # kind whose layers are names
_MODULE_COLUMN = "teacher_module_"
_COLUMN = re.compile(r"teacher_(hidden_states|attentions|attention_scores|queries|keys|values)_(\d+)")
OF_QUERIES = ("attentions", "attention_scores")  # what queries and keys tell
MAPS = ("hidden_states", MODULE)  # what may be a convolution's [C, H, W]
_PLAIN = AttentionSettings(1, 1, 1, 1.0)  # of a column that names none: every token sees every other


class TeacherInside:
    """The columns of a store that are about the inside of its teacher.

    depth: its blocks; 0 where the store holds no layer of it. Raises StoreCorrupt for a column that does not tell.
    """

    def __init__(self, columns: Mapping[str, FieldSpec | None]) -> None:
        self.specs = {name: spec for name, spec in columns.items() if spec is not None}
        self._stored: dict[str, list[int]] = {}
        depths = set()
        for name, spec in self.specs.items():
            if found := _COLUMN.fullmatch(name):
                self._stored.setdefault(found[1], []).append(int(found[2]))
                depths.add(_depth(spec))
        if len(depths) > 1:
            raise StoreCorrupt(f"columns of one teacher expected, theirs have {sorted(depths)} blocks: dump it anew")
        self.depth = depths.pop() if depths else 0

    def layers(self, kind: str) -> list[int]:
        """Layers that `kind` can be had of; attentions and scores also from queries and keys."""
        own = set(self._stored.get(kind, ()))
        if kind in OF_QUERIES:
            own |= set(self._stored.get("queries", ())) & set(self._stored.get("keys", ()))
        return sorted(own)

    def check(self, kind: str, name: str) -> None:
        """Raise ConfigError, saying what there is, where the term `name` finds nothing of this kind."""
        if self.layers(kind) or (kind == POOLED and POOLED_COLUMN in self.specs):
            return
        if kind == MODULE and any(one.startswith(_MODULE_COLUMN) for one in self.specs):
            return
        taught = [stored_columns(each, self.layers(each)) for each in self._stored]
        others = [one for one, spec in self.specs.items() if spec.role == "teacher" and not _COLUMN.fullmatch(one)]
        raise ConfigError(
            f"the term {name!r} needs the teacher's {kind}, but the store holds {'; '.join([*taught, *others])}: dump "
            f"{'--capture names of modules' if kind == MODULE else f'--fields {kind}'} too, or leave the term out"
        )

    def pairs(self, text: str, kind: str, student_depth: int) -> Pairs:
        """The layer map `text` for one kind. Raises ConfigError, as layer_map does."""
        named = kind if kind in self._stored or kind not in OF_QUERIES else "queries"
        return layer_map(text, named, student_depth, self.depth, self.layers(kind))

    def columns(self, kind: str, layer: int | str) -> list[str]:
        """Those that `read` reads. Raises ConfigError for a module that was not captured."""
        if kind == MODULE:
            name = _MODULE_COLUMN + str(layer).replace(".", "_")
            if name not in self.specs:
                there = ", ".join(one for one in self.specs if one.startswith(_MODULE_COLUMN)) or "none"
                raise ConfigError(f"the teacher's module {layer} is not in the store, which has {there}: --capture it")
            return [name]
        assert isinstance(layer, int)
        if kind == POOLED:
            return [POOLED_COLUMN]
        if kind in OF_QUERIES and layer not in self._stored.get(kind, ()):
            return [layer_column("queries", layer), layer_column("keys", layer)]
        return [layer_column(kind, layer)]

    def shape(self, kind: str, layer: int | str) -> tuple[int, ...]:
        """Without rows and positions: (D,) of hidden states, (H, d) of queries, (H,) of attentions and scores."""
        shape = self.specs[self.columns(kind, layer)[0]].shape
        sizes = tuple(size for size in shape if not isinstance(size, str))
        if kind in OF_QUERIES or self.grid(kind, layer):
            return sizes[:1]
        if kind == POOLED:
            return (math.prod(sizes),)
        if kind == MODULE:
            return sizes[-1:]
        return sizes if symbols(shape) else sizes[1:]

    def grid(self, kind: str, layer: int | str) -> tuple[int, int] | None:
        """(H, W) of a convolution's map; None of everything else."""
        shape = self.specs[self.columns(kind, layer)[0]].shape
        if kind not in MAPS or symbols(shape) or len(shape) != 3:
            return None
        return int(shape[1]), int(shape[2])

    def positions(self, kind: str, layer: int | str) -> int | None:
        """How many there are in every row of images; None of texts, whose rows differ."""
        spec = self.specs[self.columns(kind, layer)[0]]
        if symbols(spec.shape):
            return None
        sizes = [size for size in spec.shape if isinstance(size, int)]
        if len(sizes) == 1:
            return 1
        if grid := self.grid(kind, layer):
            return math.prod(grid)
        return sizes[-1] if spec.name.startswith(("teacher_attentions", "teacher_attention_scores")) else sizes[0]

    def is_head_mean(self, kind: str, layer: int) -> bool:
        """Is what is stored the mean over heads alone?"""
        return bool(self.specs[self.columns(kind, layer)[0]].parameters.get("mean_over_heads"))

    def settings(self, layer: int) -> AttentionSettings:
        """What attention `layer` does with queries and keys, causality and window among it."""
        for kind in ("queries", *OF_QUERIES):
            spec = self.specs.get(layer_column(kind, layer))
            if spec is not None and "attention" in spec.parameters:
                return AttentionSettings.from_json(spec.parameters["attention"])
        return _PLAIN

    def read(self, kind: str, layer: int | str, batch: Batch, visible: Tensor | None = None) -> Tensor:
        """[B, S, D], [B, H, S, S], [B, S, H, d] or [B, D], in the stored dtype, or float32 where it is made anew.

        visible: bool [B, 1, S, S], which attentions are made anew with.
        """
        columns = self.columns(kind, layer)
        if len(columns) == 1:
            return batch[columns[0]]
        assert isinstance(layer, int)
        settings = self.settings(layer)
        with torch.no_grad():
            scores = attention_scores(batch[columns[0]], batch[columns[1]], settings)
            if kind == "attention_scores":
                return scores
            assert visible is not None
            return attention_probabilities(scores, visible, settings.sinks)


def _depth(spec: FieldSpec) -> int:
    layers = spec.parameters.get("layers")
    if type(layers) is not int or layers < 1:
        raise StoreCorrupt(f"column {spec.name} does not tell how many layers its teacher has: dump it anew")
    return layers
