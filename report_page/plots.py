"""What is drawn: functions of figures, each giving one <svg> and a sentence for those who do not see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .svg import INK, SERIES, drawing

MOST_LINES = 8  # of one plot: as many as there are colours
MOST_BARS = 24
LONGEST = 36  # characters of a name beside a plot


class Drawings:
    """Draws plots and numbers them, so that no two on a page share an id."""

    def __init__(self) -> None:
        self.count = 0

    def draw(self, draw: Any, label: str, **size: float) -> str:
        self.count += 1
        return drawing(draw, self.count, label, **size)

    def histogram(self, found: Mapping[str, Any], name: str, of: str) -> str:
        """Shares of rows of each split; counts that differ a hundredfold are drawn by their logarithm."""
        shown = list(found["counts"].items())[:MOST_LINES]
        shares = {split: [count / max(sum(counts), 1) for count in counts] for split, counts in shown}
        nonzero = [share for each in shares.values() for share in each if share]
        steep = bool(nonzero) and max(nonzero) > 100 * min(nonzero)

        def draw(axes: Any) -> None:
            for at, (split, each) in enumerate(shares.items()):
                if len(shares) == 1:
                    axes.stairs(each, found["edges"], color=SERIES[at], fill=True, alpha=0.3)
                axes.stairs(each, found["edges"], color=SERIES[at], linewidth=1.4, label=short(split))
            if steep:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: "")
            axes.set(xlabel=name, ylabel=f"share of {of}" + (" (log)" if steep else ""))
            legend(axes, len(shares))

        return self.draw(draw, f"Histogram of {name}, {of}, by split")

    def calibration(self, found: Mapping[str, Any]) -> str:
        def draw(axes: Any) -> None:
            axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="as sure as right")
            for at, (split, bins) in enumerate(list(found.items())[:MOST_LINES]):
                x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
                axes.plot(x, y, color=SERIES[at], marker="o", markersize=3.5, linewidth=1.4, label=short(split))
            axes.set(xlabel="mean confidence of a bin", ylabel="accuracy of the bin", xlim=(0, 1.02), ylim=(0, 1.02))
            legend(axes, 2)

        return self.draw(draw, "Calibration: accuracy against confidence, by split", height=3.4)

    def bars(self, values: Sequence[tuple[str, float]], axis: str, label: str) -> str:
        """Lying bars, the first on top; what is past MOST_BARS is one bar."""
        shown = list(values[:MOST_BARS])
        if rest := values[MOST_BARS:]:
            shown.append((f"{len(rest)} others", sum(value for _, value in rest)))

        def draw(axes: Any) -> None:
            places = range(len(shown))
            axes.barh(places, [value for _, value in shown], color=SERIES[0], height=0.7)
            axes.set_yticks(places, [short(name) for name, _ in shown])
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set(xlabel=axis)
            axes.ticklabel_format(axis="x", style="plain", useOffset=False)

        return self.draw(draw, label, height=0.7 + 0.22 * len(shown))

    def curves(self, runs: Sequence[Mapping[str, Any]], name: str) -> str:
        shown = [run for run in runs if run["curves"].get(name)][:MOST_LINES]

        def draw(axes: Any) -> None:
            for at, run in enumerate(shown):
                x, y = zip(*run["curves"][name], strict=True)
                axes.plot(x, y, color=SERIES[at], marker="o" if len(x) < 40 else None, markersize=3, linewidth=1.4,
                          label=short(run["name"]))  # fmt: skip
            axes.set(xlabel="optimizer step", ylabel=spoken(name))
            legend(axes, 2, outside=True)

        return self.draw(draw, f"{spoken(name)} by step, of {len(shown)} runs", height=2.6 + 0.2 * len(shown))

    def dots(self, groups: Sequence[Mapping[str, Any]], name: str, teacher: float | None) -> str:
        """Each run of a group as a dot, the mean as a bar; the teacher as a line."""
        shown = [one for one in groups if name in one["values"]][:MOST_BARS]

        def draw(axes: Any) -> None:
            for at, one in enumerate(shown):
                values = one["values"][name]
                axes.plot(values, [at] * len(values), linestyle="", marker="o", markersize=5, alpha=0.7,
                          color=SERIES[0 if one["with_teacher"] else 1])  # fmt: skip
                axes.plot([one["means"][name]] * 2, [at - 0.3, at + 0.3], color=INK, linewidth=1.6)
            if teacher is not None:
                axes.axvline(teacher, color=INK, linestyle="--", linewidth=0.8, label="teacher")
                legend(axes, 2)
            axes.set_yticks(range(len(shown)), [short(group_name(one)) for one in shown])
            axes.set(xlabel=name.replace("_", " "), ylim=(len(shown) - 0.5, -0.5))

        return self.draw(draw, f"{name.replace('_', ' ')} of each group of runs", height=0.9 + 0.32 * len(shown))


def legend(axes: Any, lines: int, outside: bool = False) -> None:
    if lines > 1 and outside:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, fontsize=7.5)
    elif lines > 1:
        axes.legend(fontsize=7.5)


def spoken(metric: str) -> str:
    return "evaluation loss" if metric == "loss" else metric.replace("_", " ")


def group_name(group: Mapping[str, Any]) -> str:
    """The name of its first run, and how many more there are."""
    more = f" + {group['runs'] - 1}" if group["runs"] > 1 else ""
    return f"{group['names'][0][: LONGEST - len(more)]}{more}"


def short(name: Any) -> str:
    """As much as fits beside a plot, without what SVG cannot hold; a legend leaves out what begins with _."""
    text = "".join(letter if letter.isprintable() else "�" for letter in str(name)[: LONGEST + 1])
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return text if not text.startswith("_") else " " + text
