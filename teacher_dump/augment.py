"""More rows from the rows there are, top to bottom: rows, model, parts, output. The same call again continues it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..store.errors import ConfigError, DataError, OutOfSpace, PredistillError
from ..store.identity import file_sha256
from .augmentation.candidates import Candidates
from .augmentation.config import AugmentConfig
from .augmentation.masked_lm import MaskedLM
from .augmentation.neighbours import Neighbours, file_neighbours
from .augmentation.parts import Work, part_bounds
from .augmentation.rewrite import View, views
from .augmentation.squad_json import Squad, read_squad
from .augmentation.table import Table
from .augmentation.words import Passage
from .config import named_paths
from .data import load_rows
from .disk import free_bytes, out_of_space
from .progress import WordProgress, say
from .teachers.teacher import Teacher

_SETTINGS = (
    "multiplication_factor", "replace_probability", "candidates", "seed", "text_column", "text_pair_column", "split",
    "max_length", "suffix",
)  # fmt: skip

_WORDS = {
    "--teacher ": "--masked-lm ", "the same dump": "the same command",
    "a model that was fine-tuned for the task expected": "a masked language model expected",
    "a model with a head for this --task expected; transformers has none for its architecture":
        "a masked language model expected; transformers has none of its architecture",
}  # fmt: skip


class Source(Protocol):
    """Rows to rewrite: a table of columns, or SQuAD's paragraphs."""

    rows: int
    notices: list[str]

    def survey(self) -> tuple[str, list[int], int]:
        """(hash of all rows, words of each, bytes of text). Raises DataError for the first row that cannot be used."""

    def passages(self, start: int, stop: int) -> list[list[Passage]]:
        """What is rewritten of each of these rows."""

    def write(self, path: Path, views: Iterable[View]) -> None:
        """The dataset with these views, which come in order, after its own rows."""


def augment(config: AugmentConfig) -> dict[str, Any]:
    """Write `config.output`: the rows of `config.dataset`, then rewritten ones.

    Returns {"output", "rows", "original_rows", "augmented_rows", "repeated" (views dropped because they said what was
    there already), "bytes", "sha256", "seconds"}. Raises ConfigError, DataError, StoreMismatch (the output was begun
    with other settings), StoreError (another run is at it), OutOfSpace. Whatever stops it, finished parts stay.
    """
    began = time.perf_counter()
    with _in_our_words():
        source = open_source(config)
        for line in source.notices:
            say(f"note: {line}")
        rows_sha256, words, size = source.survey()
        teacher = Teacher(config.reading(), "AutoModelForMaskedLM")
        parts = part_bounds(words, config.part_words)
        plan = _plan(config, teacher, rows_sha256, parts)
        config.path.parent.mkdir(parents=True, exist_ok=True)
        with Work.begin(config.path, plan, config.overwrite) as work, out_of_space(config.path.parent):
            found = work.done()
            if found is None:
                missing = work.missing()
                if missing:
                    _check_room(config, size)
                    _run_parts(config, source, teacher, work, [(at, *parts[at]) for at in missing], words)
                found = work.finish(source.write, source.rows, config.multiplication_factor)
    return {**found, "seconds": round(time.perf_counter() - began, 3)}


def open_source(config: AugmentConfig) -> Source:
    """SQuAD's JSON by its form, everything else as `dump` reads it. Raises ConfigError, DataError."""
    paths = named_paths(config.dataset)
    content = read_squad(paths[""]) if paths and "" in paths else None
    return Table(config, load_rows(config.reading())) if content is None else Squad(config, content)


def _plan(config: AugmentConfig, teacher: Teacher, rows_sha256: str, parts: list[tuple[int, int]]) -> dict[str, Any]:
    """All that the output hangs on; batches and devices are not among it."""
    identity = teacher.identity()
    told = ("name", "config_sha256", "weights_sha256", "commit")
    return {
        "format_version": 1,
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "identity": {
            "masked_lm": {name: identity["teacher"][name] for name in told if name in identity["teacher"]},
            "tokenizer": identity["tokenizer"]["sha256"], "versions": identity["versions"], "rows": rows_sha256,
            "embeddings": file_sha256(Path(config.embeddings).expanduser()) if config.embeddings else None,
        },
        "parts": [list(bounds) for bounds in parts],
    }  # fmt: skip


def _run_parts(
    config: AugmentConfig, source: Source, teacher: Teacher, work: Work, parts: list[tuple[int, int, int]],
    words: list[int],
) -> None:  # fmt: skip
    """Of each part the candidates, all at once, then its views, one at a time."""
    candidates = _candidates(config, teacher)
    rows, left = sum(stop - start for _, start, stop in parts), sum(sum(words[a:b]) for _, a, b in parts)
    say(f"{rows} rows with {left} words to rewrite, {config.multiplication_factor} times each, in {len(parts)} parts")
    with WordProgress(rows, left) as progress:
        for at, start, stop in parts:
            passages = source.passages(start, stop)
            choices = iter(candidates.of([one for row in passages for one in row]))
            made = (
                view
                for row, own in enumerate(passages, start)
                for view in views(row, own, [next(choices) for _ in own], config.multiplication_factor,
                                  config.replace_probability, config.seed)
            )  # fmt: skip
            work.keep(at, made)
            progress.passed(stop - start, sum(words[start:stop]))


def _candidates(config: AugmentConfig, teacher: Teacher) -> Candidates:
    model = MaskedLM(teacher, config.candidates, config.max_length, config.tokens_per_batch)
    if config.embeddings is None:
        nearest = Neighbours(model.words, model.vectors(), model.vector, config.candidates)
    else:
        nearest = file_neighbours(Path(config.embeddings).expanduser(), config.candidates)
    return Candidates(model, nearest)


def _check_room(config: AugmentConfig, size: int) -> None:
    """Parts and output, as long as the text is now; compression is not counted on."""
    needed, free = size * (2 * config.multiplication_factor + 1), free_bytes(config.path.parent)
    if needed > free:
        raise OutOfSpace(
            f"OUTPUT {config.output} needs {needed / 1e9:.3g} GB while it is made, {free / 1e9:.3g} GB are free: make "
            "room, or take a smaller --multiplication-factor"
        )


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    """Errors about what `dump` calls --dataset, --teacher and a dump."""
    try:
        yield
    except (ConfigError, DataError, OutOfSpace) as error:
        raise _renamed(error) from error


def _renamed(error: PredistillError) -> PredistillError:
    text = str(error).removeprefix("--dataset ")
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return type(error)(text)
