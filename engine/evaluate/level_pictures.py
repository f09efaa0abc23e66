"""The pictures of a study, as PNG bytes: one factor's levels, and all levels beside the default."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from unteach.engine.evaluate.paired import Difference
from unteach.engine.evaluate.pictures import BLUE, GREY, ORANGE, ROW_STYLES, png_of
from unteach.engine.evaluate.scores import DIRECTIONS


@dataclass(frozen=True)
class Line:
    """Means of a score level by level, and half of each one's interval where it has one."""

    means: Sequence[float]
    halves: Sequence[float | None]


def draw_levels(
    title: str, labels: Sequence[str], lines: Mapping[str, Line], default: int
) -> bytes:
    """A factor's scores on the left and its Overall on the right, against its levels.

    Levels stand at equal distances; a line joins them only where they are numbers.

    Args:
        lines: by score, and by `overall`.
        default: index of the level that is the recipe's own.
    """
    joined = all(_is_number(label) for label in labels)
    figure = Figure(figsize=(11.0, 4.8), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, 2, width_ratios=[1.6, 1])
    scores = [name for name in DIRECTIONS if name in lines]
    for place, name in enumerate([*scores, "overall"]):
        axes = panels[int(name == "overall")]
        colour, dash, marker = ("black", "-", "o")
        if name != "overall":
            colour, dash, marker = ROW_STYLES[1 + list(DIRECTIONS).index(name)]
        arrow = "↑" if DIRECTIONS.get(name, 1) > 0 else "↓"
        # Points of one level are set apart, or intervals would hide each other.
        aside = 0.06 * (place - (len(scores) - 1) / 2) if name != "overall" else 0.0
        pairs = list(zip(lines[name].means, lines[name].halves, strict=True))
        most = 100.0 if name != "overall" else math.inf
        below = [min(half or 0.0, mean + most - 100) for mean, half in pairs]
        above = [min(half or 0.0, most - mean) for mean, half in pairs]
        axes.errorbar(
            [index + aside for index in range(len(labels))],
            lines[name].means,
            yerr=[below, above] if any(half for _, half in pairs) else None,
            color=colour,
            linestyle=dash if joined else "none",
            marker=marker,
            capsize=3,
            label=f"{name} {arrow}",
            clip_on=False,
        )
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("score")
    panels[1].set_ylabel("Overall ↑")
    low, high = panels[1].get_ylim()
    slack = max(0.0, 20 - (high - low)) / 2  # a few points must not look like a landslide
    panels[1].set_ylim(low - slack, high + slack)
    turned = sum(map(len, labels)) > 30
    for axes in panels:
        axes.axvspan(default - 0.22, default + 0.22, color="#e8e8e8", zorder=0)
        axes.set_xticks(
            range(len(labels)),
            [f"{label}\n(default)" if i == default else label for i, label in enumerate(labels)],
            rotation=25 if turned else 0,
            ha="right" if turned else "center",
        )
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.grid(color="#e5e5e5", axis="y")
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=12)
    return png_of(figure)


def draw_differences(factors: Mapping[str, Mapping[str, Difference]]) -> bytes:
    """How far Overall of each level lies from the default's, with its 95% interval, a line each.

    Args:
        factors: by factor and level, in the order of the picture; the default is not among them.
            At least one level.
    """
    rows = [(name, label, gap) for name, each in factors.items() for label, gap in each.items()]
    figure = Figure(figsize=(8.4, 1.3 + 0.27 * len(rows)), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    for place, (name, _, gap) in enumerate(rows):
        colour = GREY if gap.low <= 0 <= gap.high else BLUE if gap.value > 0 else ORANGE
        axes.errorbar(
            gap.value,
            place,
            xerr=[[max(0.0, gap.value - gap.low)], [max(0.0, gap.high - gap.value)]],
            color=colour,
            marker="o" if colour == GREY else "D",
            capsize=3,
        )
        if place and rows[place - 1][0] != name:
            axes.axhline(place - 0.5, color="#cccccc", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{name}: {label}" for name, label, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("Overall less the default's, points (diamond: its interval has no 0)")
    axes.grid(color="#e5e5e5", axis="x")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    return png_of(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
