"""matplotlib's SVG as a part of a page: its colours become the page's, its ids are its own, equal input gives equal
bytes.

Figures are drawn in stand-in colours, which no palette has; here they become `currentColor` and CSS variables, so
that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, RULE = "#010203", "#010204"  # text and axes; the grid
SERIES = tuple(f"#01030{at}" for at in range(1, 9))  # eight kinds of data
_PAGE = {INK: "currentColor", RULE: "var(--rule)", **{one: f"var(--series-{at})" for at, one in enumerate(SERIES, 1)}}
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "predistill", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "axes.unicode_minus": True, "axes.linewidth": 0.8,
}  # fmt: skip
_NAMESPACE = re.compile(r"\{[^}]*\}")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


def drawing(draw: Any, number: int, label: str, *, height: float = 2.6, width: float = 6.4) -> str:
    """The <svg> of a figure; `draw` is called with its axes. number: of the drawing on its page; label: what it shows.

    height, width: inches, at 72 points an inch.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {**dict(matplotlib.rcParamsDefault), **_SETTINGS}
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.simplefilter("ignore")  # of letters that the font lacks: the browser has others
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        return _inline(_written(figure), f"d{number}-", label)


def _written(figure: Figure) -> bytes:
    stream = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return stream.getvalue()


def _inline(svg: bytes, prefix: str, label: str) -> str:
    root = ET.fromstring(svg)  # our own; comments and the prologue go
    for parent in root.iter():
        for child in [one for one in parent if _NAMESPACE.sub("", one.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            element.set(_NAMESPACE.sub("", name), _attribute(_NAMESPACE.sub("", name), value, prefix))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "class": "plot", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if name == "style":
        for drawn, shown in _PAGE.items():
            value = value.replace(drawn, shown)
    return _REFERENCE.sub(rf"url(#{prefix}\1)", value)
