"""One HTML page about stores and runs: what the teacher knows, what it costs to keep, how the students compare.

The page opens from disk: its plots are drawn in it, nothing is fetched, nothing in it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .store.errors import ConfigError

DRAWN_BY = '<meta name="generator" content="predistill '  # in the head of every report


@dataclass
class ReportConfig:
    """What `predistill report` may be told."""

    paths: list[str] = field(metadata={"help": "Folders of stores and of runs, in any order.", "argument": True})
    output: str = field(default="report.html", metadata={"help": "The page; an earlier report there is replaced."})


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns {"output", "bytes", "stores", "runs", "groups", "gains"}: the figures that it shows.

    Raises ConfigError for a path that is neither a store nor a run, where matplotlib is missing, and for an output
    that is something else than a report; StoreError for a store that cannot be read.
    """
    check_matplotlib()
    output = free_output(Path(config.output))
    store_paths, run_paths = sorted_out(config.paths)

    from .report_page.about_store import about_stores
    from .report_page.compare import compare
    from .report_page.page import page
    from .report_page.runs import read_runs

    stores = [one for path in store_paths for one in about_stores(path)]
    runs = read_runs(run_paths)
    found = {"stores": stores, "runs": runs, **compare(runs, stores)}
    written = write(output, page(found, __version__))
    return {"output": str(output), "bytes": written, **figures(found)}


def sorted_out(paths: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(stores, runs), each folder once. Raises ConfigError for a path that is neither."""
    from .report_page.runs import is_run
    from .store.manifest import MANIFEST, PLAN
    from .store.remote.elsewhere import is_url

    if not paths:
        raise ConfigError("report STORE|RUN…: at least one folder of a store or of a run is expected; got none")
    stores: dict[str, str] = {}
    runs: dict[str, Path] = {}
    for text in paths:
        path = Path(text)
        if is_url(text):
            stores[text] = text
        elif (path / MANIFEST).is_file() or (path / PLAN).is_file():
            stores[str(path.resolve())] = text
        elif is_run(path):
            runs[str(path.resolve())] = path
        else:
            raise ConfigError(_neither(path))
    return list(stores.values()), list(runs.values())


def _neither(path: Path) -> str:
    """Why a path is refused, and what it holds that would not be."""
    from .report_page.runs import is_run
    from .store.manifest import MANIFEST, PLAN

    line = f"{path} is neither a store (a folder with {PLAN} or {MANIFEST}) nor a run (one that train wrote to)"
    if not path.exists():
        return f"{line}: it does not exist"
    held = sorted(path.iterdir())[:1000] if path.is_dir() else []
    held += [inner for one in held if one.name == "students" and one.is_dir() for inner in sorted(one.iterdir())]
    good = [one for one in held if (one / PLAN).is_file() or (one / MANIFEST).is_file() or is_run(one)]
    return line + (f"; it holds some: give {' '.join(str(one) for one in good[:3])}" if good else "")


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the plots of a report are drawn by matplotlib, which is not installed: pip install predistill[report]"
        ) from error


def free_output(output: Path) -> Path:
    """Raises ConfigError where the page would take the place of anything but a report."""
    if output.is_dir():
        raise ConfigError(f"--output {output}: a file expected; it is a folder")
    if output.exists():
        with open(output, "rb") as file:
            head = file.read(1000)
        if head and DRAWN_BY.encode() not in head:
            raise ConfigError(f"--output {output}: there is a file of that name, which no report made; give another")
    return output


def write(output: Path, text: str) -> int:
    """Whole or not at all; returns its bytes. Raises ConfigError where it cannot be written."""
    from .store.atomic import out_of_space, write_text

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with out_of_space(output.parent, output.with_name(output.name + ".tmp")):
            write_text(output, text)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from error
    return output.stat().st_size


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page was made of, without pictures: for --json."""
    stores = [
        {**store, "hardest": {**store["hardest"], "rows": [
            {name: cell for name, cell in row.items() if name != "thumbnail"} for row in store["hardest"]["rows"]
        ]}}
        for store in found["stores"]
    ]  # fmt: skip
    return {**found, "stores": stores}
