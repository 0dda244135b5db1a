"""Layer maps: which layer of the teacher teaches which layer of the student.

Pairs are (student, teacher) in the numbers of the columns. M student blocks, N teacher blocks; hidden states are
counted 0 to N (0 the embeddings), attentions, scores, queries, keys and values 0 to N - 1. Block i (from 1) of a map
reads as hidden state i, and as attention i - 1:

    uniform    block i learns from block i N / M, rounded half up; TinyBERT (Jiao et al. 2020), Haystack
    every-k    block i learns from block i k
    last       the last block learns from the last
    tutorial   block i learns from block 2i - 1 as far as the teacher reaches ("Model Distillation: Creating Efficient
               Student Models", M. J. Peña, 2023)
    0:0,1:2    as it says

Hidden states pair 0 with 0 besides, but for `last`. (The tutorial reads hidden state 2i - 1 and attention 2i, which
is the same block.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..store.errors import ConfigError
from ..store.schema import layer_column

Pairs = tuple[tuple[int, int], ...]

HIDDEN_STATES = "hidden_states"
_EXPLICIT = re.compile(r"\d+:\d+(,\d+:\d+)*")
_EVERY = re.compile(r"every-([1-9]\d*)")


def layer_map(text: str, kind: str, student_depth: int, teacher_depth: int, stored: Sequence[int]) -> Pairs:
    """The pairs that `text` stands for, ascending as far as it has an order of its own.

    kind: "hidden_states", or "attentions" and the others that have one entry a block. stored: numbers of the teacher's
    columns of this kind. Raises ConfigError for a text that is no map, a pair given twice, a layer that the student or
    the teacher does not have, and one that is not stored.
    """
    text = text.replace(" ", "")
    blocks = _blocks(text, student_depth, teacher_depth)
    if blocks is None:
        pairs = _explicit(text)
    elif kind == HIDDEN_STATES:
        pairs = [(0, 0)] * (text != "last") + blocks
    else:
        pairs = [(student - 1, teacher - 1) for student, teacher in blocks]
    _check_reach(text, kind, pairs, student_depth, teacher_depth)
    _check_stored(text, kind, pairs, stored)
    return tuple(pairs)


def _blocks(text: str, student: int, teacher: int) -> list[tuple[int, int]] | None:
    """The map as blocks counted from 1; None for an explicit one."""
    own = range(1, student + 1)
    if text == "uniform":
        return [(i, max(1, (2 * i * teacher + student) // (2 * student))) for i in own]
    if text == "last":
        return [(student, teacher)]
    if text == "tutorial":
        return [(i, 2 * i - 1) for i in own if 2 * i - 1 <= teacher]
    if every := _EVERY.fullmatch(text):
        return [(i, i * int(every[1])) for i in own]
    return None


def _explicit(text: str) -> list[tuple[int, int]]:
    if not _EXPLICIT.fullmatch(text):
        raise ConfigError(
            f"the layer map {text!r} is not one of uniform, last, tutorial, every-2 (and the like), or student:teacher "
            "pairs as in 0:0,1:2"
        )
    pairs = [(int(student), int(teacher)) for student, teacher in (pair.split(":") for pair in text.split(","))]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ConfigError(f"the layer map {text} gives {pair[0]}:{pair[1]} twice; give each pair once")
    return pairs


def _check_reach(text: str, kind: str, pairs: Sequence[tuple[int, int]], student: int, teacher: int) -> None:
    for who, depth, at in (("student", student, 0), ("teacher", teacher, 1)):
        last = depth if kind == HIDDEN_STATES else depth - 1
        beyond = next((pair for pair in pairs if pair[at] > last), None)
        if beyond is not None:
            raise ConfigError(
                f"the layer map {text} pairs {kind} {beyond[0]}:{beyond[1]} (student:teacher), but the {who} has "
                f"{kind} {f'0 to {last}' if last else 'only 0'}"
            )


def _check_stored(text: str, kind: str, pairs: Sequence[tuple[int, int]], stored: Sequence[int]) -> None:
    missing = next((pair for pair in pairs if pair[1] not in stored), None)
    if missing is None:
        return
    layer = missing[1] if kind == HIDDEN_STATES else missing[1] + 1  # as --layers counts
    raise ConfigError(
        f"the layer map {text} pairs {missing[0]}:{missing[1]} (student:teacher), but the store holds "
        f"{stored_columns(kind, stored)}: choose pairs among them, or dump with layer {layer} in --layers"
    )


def stored_columns(kind: str, stored: Sequence[int]) -> str:
    """`teacher_hidden_states_00, _06` for a message; what is said where there are none: `no teacher_hidden_states`."""
    if not stored:
        return f"no teacher_{kind}"
    first, *others = sorted(stored)
    return ", ".join([layer_column(kind, first), *(f"_{layer:02d}" for layer in others)])
