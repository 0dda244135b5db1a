"""The page: one HTML file, styles and drawings in it, nothing fetched, nothing that runs.

Names and texts come from strangers' stores. The template escapes everything but our own drawings, and its head
forbids scripts and any address but `data:`, should anything ever get past that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .compare import AGREEMENT, main_metric
from .knowledge import DRAWN
from .plots import MOST_LINES, Drawings, group_name, spoken
from .tables import run_tables, store_tables

HERE = Path(__file__).parent
MOST_CURVES = 4  # evaluation figures that have a plot
_DIRECTIONS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def page(found: Mapping[str, Any], version: str) -> str:
    """HTML of what `report.report` found; version: of predistill."""
    drawings = Drawings()
    stores = [
        {**store, **store_tables(store), "id": f"store-{at}", "plots": list(knowledge_plots(store, drawings)),
         "cost_plot": cost_plot(store, drawings)}
        for at, store in enumerate(found["stores"], 1)
    ]  # fmt: skip
    runs = {**{name: found[name] for name in ("runs", "gains", "teachers")}, **run_tables(found)}
    plots = list(run_plots(found, drawings))
    template = environment().get_template("page.html")
    return template.render(stores=stores, **runs, plots=plots, version=version, title=title(found))


def title(found: Mapping[str, Any]) -> str:
    names = [one["name"] for one in (*found["stores"], *found["runs"])]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=clean,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"cell": cell, "size": size, "is_number": is_number}
    made.globals |= {"style": Markup((HERE / "page.css").read_text(encoding="utf-8"))}
    return made


# ---- text ----


def clean(value: Any) -> Any:
    """What a page cannot hold, or what would turn its text round, becomes a replacement character."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(letter if _is_text(letter) else "\ufffd" for letter in value)


def _is_text(letter: str) -> bool:
    code = ord(letter)
    control = code < 32 and letter not in "\t\n" or 127 <= code < 160
    return not (control or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE or letter in _DIRECTIONS)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any) -> str:
    """A value as tables show it: four digits of a fraction, thousands apart, – for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or isinstance(value, float) and value.is_integer() and 1 <= abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float | None) -> str:
    """In powers of 1000, to three digits."""
    if count is None:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


# ---- plots: {"svg", "caption", "head", "rows"}, the last two being its figures as a table ----


def figure(svg: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"svg": Markup(svg), "caption": caption, "head": head, "rows": rows}


def knowledge_plots(store: Mapping[str, Any], drawings: Drawings) -> Iterator[dict[str, Any]]:
    known = store["knowledge"] or {"histograms": {}, "calibration": {}}
    of = "documents" if store["task"] == "causal-lm" else "samples"
    for column, found in known["histograms"].items():
        edges, counts = found["edges"], found["counts"]
        rows = [
            (f"{low:.4g} … {high:.4g}", *(each[at] for each in counts.values()))
            for at, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
            if any(each[at] for each in counts.values())
        ]
        caption = f"{DRAWN[column]}: how the {of} of each split are spread."
        yield figure(drawings.histogram(found, DRAWN[column], of), caption, [DRAWN[column], *counts], rows)
    if known["calibration"]:
        yield calibration_plot(known["calibration"], drawings)


def calibration_plot(bins: Mapping[str, Any], drawings: Drawings) -> dict[str, Any]:
    rows = [
        (split, f"{one['low']:.3f} … {one['high']:.3f}", one["rows"], one["confidence"], one["accuracy"])
        for split, each in bins.items()
        for one in each
    ]
    caption = "Calibration: a teacher on the dashed line is right as often as it is sure. 15 bins of equal width."
    return figure(drawings.calibration(bins), caption, ["split", "bin", "rows", "mean confidence", "accuracy"], rows)


def cost_plot(store: Mapping[str, Any], drawings: Drawings) -> Markup | None:
    known = [(field["name"], field["bytes"] / 1e6) for field in store["fields"] if field["bytes"]]
    return Markup(drawings.bars(known, "MB", "Bytes of each column")) if known else None


def run_plots(found: Mapping[str, Any], drawings: Drawings) -> Iterator[dict[str, Any]]:
    """The main figure and the agreement of each group, then curves."""
    runs, groups = found["runs"], found["groups"]
    best = main_metric({name: True for run in runs for name in run["metrics"]})
    for name in dict.fromkeys(one for one in (best, AGREEMENT) if one):
        if any(name in group["values"] for group in groups):
            line = found["teachers"][0]["accuracy"] if name == "accuracy" and len(found["teachers"]) == 1 else None
            names = ("means", "deviations")
            rows = [(group_name(one), one["runs"], *(one[each].get(name) for each in names)) for one in groups]
            svg = drawings.dots(groups, name, line)
            caption = f"{name.replace('_', ' ')}: a dot a run, a bar the mean of runs that differ in their seed alone."
            caption += " Blue with the teacher, orange without."
            yield figure(svg, caption, ["runs", "number", "mean", "standard deviation"], rows)
    drawn = dict.fromkeys(["train loss", *(name for name in (best, AGREEMENT, "loss") if name)])
    for name in list(drawn)[:MOST_CURVES]:
        if any(len(run["curves"].get(name, ())) > 1 for run in runs):
            yield curve_plot(spread_out(runs, groups), name, drawings)


def spread_out(runs: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first run of each group, the second of each, and so on: a plot has room for a few."""
    place = {name: at for group in groups for at, name in enumerate(group["names"])}
    return sorted(runs, key=lambda run: place[run["name"]])


def curve_plot(runs: Sequence[Mapping[str, Any]], name: str, drawings: Drawings) -> dict[str, Any]:
    known = [(run["name"], points) for run in runs if (points := run["curves"].get(name))]
    rows = [(run, points[0][0], points[0][1], points[-1][0], points[-1][1]) for run, points in known]
    more = f" {MOST_LINES} of {len(known)} runs are drawn, some of each group." if len(known) > MOST_LINES else ""
    other = " Losses of different terms are not of one scale." if "loss" in name else ""
    caption = f"{spoken(name)} while training.{other}{more}"
    return figure(drawings.curves(runs, name), caption, ["run", "first step", "value", "last step", "value"], rows)
