"""docs/parity.md says what the parity tests cover, kind by kind; its figures are within what they allow."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracle_cases import ABSENT, DTYPES, INDEX, tolerance

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURE = re.compile(r"\de[+-]\d\d")

pytestmark = pytest.mark.skipif(not INDEX, reason=ABSENT)


@pytest.fixture(scope="module")
def make_parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_parity", DOCS / "make_parity.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tests_cover(make_parity: ModuleType) -> None:
    """But for the digits of its figures."""
    written = (DOCS / "parity.md").read_text(encoding="utf-8")
    assert FIGURE.sub("#", written) == FIGURE.sub("#", make_parity.page()), "run `python docs/make_parity.py`"


def test_every_recorded_kind_is_on_it(make_parity: ModuleType) -> None:
    listed = {kind: family for family, kinds in make_parity.FAMILIES.items() for kind in kinds}
    assert set(listed) == set(make_parity.originals())
    without = set(make_parity.WITHOUT)
    assert listed == {line["kind"]: line["family"] for line in INDEX if line["kind"] not in without}
    assert without == {line["kind"] for line in INDEX} - set(listed)


def test_what_it_calls_ours_is_there(make_parity: ModuleType) -> None:
    for kinds in make_parity.FAMILIES.values():
        for ours, _ in kinds.values():
            for name in ours.split(", "):
                module, function = name.split(".")
                room = importlib.import_module(f"predistill.student_train.losses.{module}")
                assert callable(getattr(room, function))


def test_its_figures_are_within_what_is_allowed() -> None:
    rows = [line.split(" | ") for line in (DOCS / "parity.md").read_text(encoding="utf-8").splitlines()]
    figures = {row[1].strip("`"): row[4:6] for row in rows if len(row) == 8 and FIGURE.search(row[4])}
    assert len(figures) > 40
    for kind, cells in figures.items():
        for dtype, cell in zip(DTYPES, cells, strict=True):
            for what, figure in zip(("loss", "gradient"), cell.split(", "), strict=True):
                assert float(figure) <= allowed(kind, dtype, what), f"{kind}: {what} {figure}"


def allowed(kind: str, dtype: torch.dtype, what: str) -> float:
    return max(tolerance(line, dtype, what) for line in INDEX if line["kind"] == kind)
