"""Text that every Python installation has: the source of the standard library.

A row is a few consecutive lines of one module, labelled by the package it is from (`passages`), or somewhat longer and
as they stand (`code`). Whole modules go to one side: to training or to validation; rows of validation that share most
of their lines with training rows (copied helpers, twins for two platforms) are dropped. Nothing is random: the same
Python gives the same rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAMILIES = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "web": ("http", "urllib", "wsgiref"),
    "xml": ("xml",),
    "unittest": ("unittest",),
    "processes": ("multiprocessing", "concurrent"),
    "imports": ("importlib",),
}
SKIPPED = {"test", "tests", "__pycache__", "_vendor"}
WORDS = (16, 48)  # a passage holds at least and about this many words
CODE_WORDS = (16, 72)
SHARED_LINES = 0.5  # of a validation row's lines, when it counts as a near copy
_WORD = re.compile(r"[A-Za-z_]+")


Rows = list[dict[str, str]]


def passages() -> tuple[Rows, Rows]:
    """(training rows, validation rows), each {"text", "label", "module"}; label is the name of a family."""
    return _sides(0.2, _passages)


def code() -> tuple[Rows, Rows]:
    """The same of source as it stands, indentation and imports included."""
    return _sides(0.1, _code)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _sides(validation_share: float, cut: Callable[[Path], Iterator[str]]) -> tuple[Rows, Rows]:
    sides: list[Rows] = [[], []]
    for family, names in FAMILIES.items():
        modules = sorted(_files(names), key=lambda found: hashlib.sha256(found[0].encode()).digest())
        texts = [(module, list(cut(path))) for module, path in modules]
        held, wanted = 0, validation_share * sum(len(passages) for _, passages in texts)
        for module, passages in texts:
            is_held = held + len(passages) <= wanted * 1.1
            held += len(passages) if is_held else 0
            sides[is_held] += [{"text": text, "label": family, "module": module} for text in passages]
    training, validation = sides
    seen = {line for row in training for line in _lines(row["text"])}
    return training, [row for row in validation if _share(row["text"], seen) < SHARED_LINES]


def _files(names: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(module name, file) of all that is inside these packages."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in names:
        for folder, inner, files in os.walk(library / name):
            inner[:] = sorted(set(inner) - SKIPPED)
            for file in sorted(files):
                if file.endswith(".py"):
                    found = Path(folder, file)
                    yield ".".join(found.relative_to(library).with_suffix("").parts), found


def _passages(path: Path) -> Iterator[str]:
    """Consecutive lines, cut at an empty line or a statement once they hold enough words; imports are left out."""
    kept: list[str] = []
    count = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = len(_WORD.findall(line))
        starts = not line.strip() or line.lstrip().startswith(("def ", "class ", "async def ", "@"))
        if count >= WORDS[1] or (count >= WORDS[1] // 2 and starts):
            yield "\n".join(kept)
            kept, count = [], 0
        if words and not re.match(r"\s*(import|from)\s", line):
            kept.append(line.strip())
            count += words
    if count >= WORDS[0]:
        yield "\n".join(kept)


def _code(path: Path) -> Iterator[str]:
    """Consecutive lines, cut before a definition or a line without indentation once they hold half the words."""
    kept: list[str] = []
    count = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        starts = line.lstrip().startswith(("def ", "class ", "async def ", "@")) or line[:1].strip()
        if count >= CODE_WORDS[1] or (count >= CODE_WORDS[1] // 2 and starts):
            yield "\n".join(kept)
            kept, count = [], 0
        if line.strip():
            kept.append(line.rstrip())
            count += len(_WORD.findall(line))
    if count >= CODE_WORDS[0]:
        yield "\n".join(kept)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(_WORD.findall(line)) > 3]


def _share(text: str, seen: set[str]) -> float:
    lines = _lines(text)
    return sum(line in seen for line in lines) / max(1, len(lines))
