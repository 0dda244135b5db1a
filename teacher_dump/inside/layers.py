"""What of a teacher's inside is kept, and of which layers: 0 is the embeddings, n is after block n, or inside it.

Attentions, queries, keys and values have no layer 0, and columns keep transformers' own numbers, so that layer n of
them is column n - 1. No torch here: settings and the command line import this file.
"""

from __future__ import annotations

import re

from ...store.errors import ConfigError

LAYERED = ("hidden_states", "attentions", "attention_scores", "queries", "keys", "values")  # a column a layer
INNER = (*LAYERED, "pooled")
SQUARE = ("attentions", "attention_scores")  # [query, key] of each head
EXACT, QUERIES_KEYS, HEAD_MEAN = "exact", "queries-keys", "head-mean"
STORAGES = (EXACT, QUERIES_KEYS, HEAD_MEAN)
ALL_LAYERS = "all"
_UNIFORM = re.compile(r"uniform:(\d+)")
_WRITTEN = "all, last, uniform:4 or numbers such as 0,3,6"


def check_layers(text: str) -> None:
    """Raises ConfigError for what no teacher has."""
    found = _UNIFORM.fullmatch(text.strip())
    if not (text.strip() in ("all", "last") or (found and int(found[1]) > 0) or _numbers(text)):
        raise ConfigError(f"--layers is {_WRITTEN}; got {text!r}")


def chosen_layers(text: str, depth: int) -> tuple[int, ...]:
    """Ascending layers of a teacher of `depth` blocks. uniform:M: those that a student of M blocks pairs with when its
    layer map is uniform, 0 and i · depth / M for i from 1 to M, halves up. Raises ConfigError past the last block."""
    check_layers(text)
    text = text.strip()
    if text == ALL_LAYERS:
        return tuple(range(depth + 1))
    if text == "last":
        return (depth,)
    if found := _UNIFORM.fullmatch(text):
        size = int(found[1])
        if size > depth:
            raise ConfigError(f"--layers {text}: the teacher has {depth} blocks; give at most uniform:{depth}")
        return tuple((2 * at * depth + size) // (2 * size) for at in range(size + 1))
    layers = tuple(sorted(set(_numbers(text))))
    if layers[-1] > depth:
        raise ConfigError(f"--layers {text}: the teacher has layers 0 (embeddings) to {depth}; got {layers[-1]}")
    return layers


def columns_of(kind: str, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the columns that these layers have of one kind."""
    return layers if kind == "hidden_states" else tuple(layer - 1 for layer in layers if layer > 0)


def stored_kinds(fields: list[str], storage: str) -> tuple[str, ...]:
    """Kinds that get columns: attentions kept as queries and keys are those two."""
    kinds = set(fields) & set(INNER)
    if storage == QUERIES_KEYS and kinds & set(SQUARE):
        kinds = (kinds - set(SQUARE)) | {"queries", "keys"}
    return tuple(kind for kind in INNER if kind in kinds)


def attention_source(fields: list[str], storage: str) -> str | None:
    """Where what is kept of attention comes from: "eager", whose weights are the exact attentions, where nothing else
    of it is asked for; "queries-keys", in the teacher's own implementation; None where none of it is kept."""
    kinds = set(stored_kinds(fields, storage)) & set(LAYERED) - {"hidden_states"}
    return None if not kinds else "eager" if kinds == {"attentions"} else QUERIES_KEYS


def _numbers(text: str) -> list[int]:
    """The layers of "0,3,6"; empty where it is something else."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(re.fullmatch(r"\d{1,4}", part) for part in parts) else []
