"""What a store holds of the inside of its teacher, and both sides of a batch: the teacher's tensors, the student's.

B rows, S tokens, D width, H heads, K key heads, d head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..store.attention import AttentionSettings, attention_probabilities, attention_scores, visible_keys
from ..store.errors import ConfigError, StoreCorrupt
from ..store.schema import ATTENTION_MASK, POSITION_IDS, FieldSpec, layer_column
from .layers import Pairs, layer_map, stored_columns
from .objective import Batch
from .projections import Projections
from .stored import StoredBatch

POOLED = "pooled"
POOLED_COLUMN = "teacher_pooled"
_COLUMN = re.compile(r"teacher_(hidden_states|attentions|attention_scores|queries|keys|values)_(\d+)")
_OF_QUERIES = ("attentions", "attention_scores")  # what queries and keys tell
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
        if kind in _OF_QUERIES:
            own |= set(self._stored.get("queries", ())) & set(self._stored.get("keys", ()))
        return sorted(own)

    def check(self, kind: str, name: str) -> None:
        """Raise ConfigError, saying what there is, where the term `name` finds nothing of this kind."""
        if self.layers(kind) or (kind == POOLED and POOLED_COLUMN in self.specs):
            return
        taught = [stored_columns(each, self.layers(each)) for each in self._stored]
        others = [one for one, spec in self.specs.items() if spec.role == "teacher" and not _COLUMN.fullmatch(one)]
        raise ConfigError(
            f"the term {name!r} needs the teacher's {kind}, but the store holds {'; '.join([*taught, *others])}: dump "
            f"--fields {kind} too, or leave the term out"
        )

    def pairs(self, text: str, kind: str, student_depth: int) -> Pairs:
        """The layer map `text` for one kind. Raises ConfigError, as layer_map does."""
        named = kind if kind in self._stored or kind not in _OF_QUERIES else "queries"
        return layer_map(text, named, student_depth, self.depth, self.layers(kind))

    def columns(self, kind: str, layer: int) -> list[str]:
        """Those that `read` reads."""
        if kind == POOLED:
            return [POOLED_COLUMN]
        if kind in _OF_QUERIES and layer not in self._stored.get(kind, ()):
            return [layer_column("queries", layer), layer_column("keys", layer)]
        return [layer_column(kind, layer)]

    def shape(self, kind: str, layer: int) -> tuple[int, ...]:
        """Without rows and tokens: (D,) of hidden states, (H, d) of queries, (H,) of attentions and scores."""
        shape = self.specs[self.columns(kind, layer)[0]].shape
        sizes = tuple(size for size in shape if not isinstance(size, str))
        return sizes[:1] if kind in _OF_QUERIES else sizes

    def is_head_mean(self, kind: str, layer: int) -> bool:
        """Is what is stored the mean over heads alone?"""
        return bool(self.specs[self.columns(kind, layer)[0]].parameters.get("mean_over_heads"))

    def settings(self, layer: int) -> AttentionSettings:
        """What attention `layer` does with queries and keys, causality and window among it."""
        for kind in ("queries", *_OF_QUERIES):
            spec = self.specs.get(layer_column(kind, layer))
            if spec is not None and "attention" in spec.parameters:
                return AttentionSettings.from_json(spec.parameters["attention"])
        return _PLAIN

    def read(self, kind: str, layer: int, batch: Batch, visible: Tensor | None = None) -> Tensor:
        """[B, S, D], [B, H, S, S], [B, S, H, d] or [B, D], in the stored dtype, or float32 where it is made anew.

        visible: bool [B, 1, S, S], which attentions are made anew with.
        """
        columns = self.columns(kind, layer)
        if len(columns) == 1:
            return batch[columns[0]]
        settings = self.settings(layer)
        with torch.no_grad():
            scores = attention_scores(batch[columns[0]], batch[columns[1]], settings)
            if kind == "attention_scores":
                return scores
            assert visible is not None
            return attention_probabilities(scores, visible, settings.sinks)


class Sides:
    """A batch as the losses of the inside ask for it; what several of them ask for is made once.

    found: what was recorded of the student, by (kind, layer), its first rows those of the batch. projections: of the
    student's hidden states. attention: settings of those layers of the student whose attention is computed here, of
    queries and keys that were recorded.
    """

    def __init__(
        self, batch: Batch, teacher: TeacherInside, found: Mapping[Any, Tensor] | None = None,
        projections: Projections | None = None, attention: Mapping[int, AttentionSettings] | None = None,
    ) -> None:  # fmt: skip
        if ATTENTION_MASK not in batch:
            raise ConfigError("losses of what is inside a model need attention_mask, which these rows do not have")
        self._batch = StoredBatch(batch, teacher.specs)
        self._teacher, self._projections = teacher, projections
        self._found, self._attention = {} if found is None else found, attention or {}
        self.mask = batch[ATTENTION_MASK].bool()  # [B, S]
        self._visible: dict[tuple[Any, ...], Tensor] = {}

    def visible(self, layer: int) -> Tensor:
        """bool [B, 1, S, S]: the keys that each query of the teacher's attention `layer` sees."""
        return self._seen(self._teacher.settings(layer))

    def _seen(self, settings: AttentionSettings) -> Tensor:
        key = settings.causal, settings.window
        if key not in self._visible:
            self._visible[key] = visible_keys(self.mask, settings, self._batch.get(POSITION_IDS))
        return self._visible[key]

    def teacher(self, kind: str, layer: int) -> Tensor:
        visible = self.visible(layer) if kind in _OF_QUERIES else None
        return self._teacher.read(kind, layer, self._batch, visible)

    def student(self, kind: str, layer: int, projection: str = "") -> Tensor:
        """projection: a key of the projections; as it is where there is none of this key."""
        if kind in _OF_QUERIES and layer in self._attention:
            return self._attended(kind, layer)
        value = self._found[kind, layer][: len(self.mask)]
        if self._projections is not None and projection in self._projections:
            return self._projections(projection, value)
        return value

    def _attended(self, kind: str, layer: int) -> Tensor:
        settings = self._attention[layer]
        queries, keys = (self._found[name, layer][: len(self.mask)] for name in ("queries", "keys"))
        scores = attention_scores(queries, keys, settings)
        return scores if kind == "attention_scores" else attention_probabilities(scores, self._seen(settings))


def _depth(spec: FieldSpec) -> int:
    layers = spec.parameters.get("layers")
    if type(layers) is not int or layers < 1:
        raise StoreCorrupt(f"column {spec.name} does not tell how many layers its teacher has: dump it anew")
    return layers
