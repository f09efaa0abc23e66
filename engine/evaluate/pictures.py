"""Pictures of reports and rankings, as PNG bytes: what was won and kept, how the loss went.

Colours are of the Okabe-Ito palette and every line has its own marker or dash as well, so that no
picture hangs on telling colours apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unteach.engine.data.records import GOALS
from unteach.engine.evaluate.scores import DIRECTIONS

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
AXES = {
    "forget": "Forgotten\n100 − forget",
    "general": "General",
    "neighbor": "Neighbor",
    "attack": "Resists attack\n100 − attack",
    "mmlu": "MMLU",
}

COLOURS = (GREY, BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")
DASHES = ("--", (0, (6, 1.5)), "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
MARKERS = "so^vDPX<>"
OURS = 1  # place of ours, behind the base: the only solid line
# Colour, dash and marker of a row by its place. Seven colours and nine markers have no common
# factor, so no pair of them comes twice; nor have seven colours and five dashes.
ROW_STYLES: tuple[tuple[str, Any, str], ...] = tuple(
    (
        COLOURS[i % len(COLOURS)],
        "-" if i == OURS else DASHES[i % len(DASHES)],
        MARKERS[i % len(MARKERS)],
    )
    for i in range(len(COLOURS) * len(MARKERS))
)
GOAL_STYLES = dict(
    zip(GOALS, ((ORANGE, "-"), (BLUE, "--"), (GREEN, "-."), (PURPLE, ":")), strict=True)
)

# Of the trade-off, in points of a score: the ends of its axes, and how large a mark, a letter's
# width and a line of a label are in them at its size on paper.
ENDS = (-6.0, 112.0)
MARK, LETTER, LINE = 3.6, 2.0, 4.6
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def draw_radar(base: Mapping[str, float], model: Mapping[str, float]) -> bytes | None:
    """Base and model over the scores, further out is better; None below three scores."""
    return draw_rows({"base": base, "unlearned": model})


def draw_rows(rows: Mapping[str, Mapping[str, float]]) -> bytes | None:
    """Up to seven rows, the base first, further out is better; None below three scores.

    A row's place gives its style, here and in `draw_tradeoff`.
    """
    names = [name for name in DIRECTIONS if all(name in scores for scores in rows.values())]
    if len(names) < 3:
        return None
    wide = 6.4 if len(rows) == 2 else 8.4  # the legend takes lines away from the circle
    figure = Figure(figsize=(wide, 6.0), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * index / len(names) for index in range(len(names))]
    for (label, scores), (colour, dash, marker) in zip(rows.items(), ROW_STYLES, strict=False):
        outward = [_outward(name, scores[name]) for name in names]
        closed = ([*angles, angles[0]], [*outward, outward[0]])
        axes.plot(
            *closed,
            color=colour,
            linestyle=dash,
            marker=marker,
            linewidth=2,
            label=label,
            clip_on=False,
        )
        if len(rows) == 2:
            axes.fill(*closed, color=colour, alpha=0.12)
    axes.set_ylim(0, 100)
    rings = [25, 50, 75, 100]
    axes.set_yticks(rings, [""] * len(rings))
    for ring in rings:  # as texts of their own, on white: ticks' labels lie under the lines
        axes.text(
            math.pi / len(names),
            ring,
            f"{ring}",
            fontsize=8,
            color="#666666",
            ha="center",
            va="center",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
    axes.set_xticks(angles)
    axes.set_xticklabels([AXES[name] for name in names], fontsize=11)
    axes.tick_params(axis="x", pad=10)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = round(math.sin(angle), 6)
        text.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
    axes.grid(color="#cccccc")
    axes.spines["polar"].set_color("#cccccc")
    figure.legend(loc="outside lower center", ncols=min(4, len(rows)), frameon=False, fontsize=11)
    figure.suptitle("Further out is better", fontsize=12)
    return png_of(figure)


def draw_tradeoff(rows: Mapping[str, Mapping[str, float]]) -> bytes | None:
    """Forgotten against general and against neighbor, a point a row; None where one is missing."""
    if not all({"forget", "general", "neighbor"} <= scores.keys() for scores in rows.values()):
        return None
    figure = Figure(figsize=(11.6, 5.0), dpi=150, layout="constrained")
    axes_2: Any = figure.subplots(1, 2)
    for axes, kept in zip(axes_2, ("general", "neighbor"), strict=True):
        points = [(100 - scores["forget"], scores[kept]) for scores in rows.values()]
        for index, (label, point) in enumerate(zip(rows, points, strict=True)):
            colour, _, marker = ROW_STYLES[index]
            axes.plot(
                *point,
                color=colour,
                marker=marker,
                linestyle="none",
                label=f"{index} {label}",
                clip_on=False,
                zorder=3 + 1 / (1 + index),  # the first rows are those that a reader looks for
            )
        _label_points(axes, points)
        axes.set_xlim(ENDS)
        axes.set_ylim(ENDS)
        axes.set_xlabel("Forgotten: 100 − forget, % ↑")
        axes.set_ylabel(f"{AXES[kept]}, % ↑")
        axes.grid(color="#e5e5e5")
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
    marks = axes_2[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("Up and to the right is better", fontsize=12)
    return png_of(figure)


def draw_relearning(rows: Mapping[str, Mapping[int, Sequence[float]]]) -> bytes | None:
    """How much of the topic is back by the rows it was taught again, a line a row of the ranking.

    Args:
        rows: forget in % by the number of rows, 0 as it was trained, a value a seed: their mean is
            the line, their ends are the bar. A place gives the style, as in `draw_tradeoff`; a row
            that was not taught again has no line but keeps its place.
    """
    if not any(len(points) > 1 for points in rows.values()):
        return None
    figure = Figure(figsize=(8.4, 4.6), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    for (label, points), (colour, dash, marker) in zip(rows.items(), ROW_STYLES, strict=False):
        if len(points) < 2:
            continue
        counts = sorted(points)
        means = [fmean(points[count]) for count in counts]
        # The mean of values that agree may lie a rounding beside them; no bar is shorter than 0.
        below = [max(0.0, mean - min(points[n])) for n, mean in zip(counts, means, strict=True)]
        above = [max(0.0, max(points[n]) - mean) for n, mean in zip(counts, means, strict=True)]
        axes.errorbar(
            counts,
            means,
            yerr=(below, above),
            color=colour,
            linestyle=dash,
            marker=marker,
            linewidth=2,
            elinewidth=1,
            capsize=3,
            label=label,
            clip_on=False,
        )
    axes.set_xticks(sorted({count for points in rows.values() for count in points}))
    axes.set_ylim(0, 100)
    axes.set_xlabel("Rows of the topic that the model was taught again")
    axes.set_ylabel("Forget, % ↓")
    axes.grid(color="#e5e5e5")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle("Lower is better: bars reach from the lowest to the highest seed", fontsize=12)
    return png_of(figure)


def _label_points(axes: Any, points: Sequence[Point]) -> None:
    """Write the numbers of points beside them, those of touching points together.

    Each label takes the nearest place that lies inside the axes and covers neither another label
    nor a point; a thin line leads from where it stands to what it means.
    """
    taken = [_box(point, MARK, MARK) for point in points]
    for numbers in _touching(points):
        middle = points[numbers[0]]
        parts = [f"{number}" for number in numbers]
        text = "\n".join(", ".join(parts[i : i + 3]) for i in range(0, len(parts), 3))
        lines = text.split("\n")
        size = (LETTER * max(map(len, lines)) + 1.0, LINE * len(lines))
        places = (_box(place, *size) for place in _around(middle, size))
        box = next((place for place in places if _free(place, taken)), _box(middle, *size))
        taken.append(box)
        axes.annotate(
            text,
            middle,
            ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
            fontsize=8,
            ha="center",
            va="center",
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 3},
        )


def _touching(points: Sequence[Point]) -> list[list[int]]:
    """Indices of points in groups: two whose marks cover each other are in one."""
    groups: list[list[int]] = []
    for index, point in enumerate(points):
        near = [g for g in groups if any(math.dist(points[i], point) < MARK / 2 for i in g)]
        groups = [g for g in groups if g not in near]
        groups.append(sorted([index, *(i for g in near for i in g)]))
    return sorted(groups)


def _around(middle: Point, size: tuple[float, float]) -> Iterator[Point]:
    """Places for the middle of a label, the nearest first."""
    for step in range(1, 16):
        for turn in range(16):
            angle = math.pi / 2 - turn * math.pi / 8
            yield (
                middle[0] + (size[0] / 2 + 2.5 * step) * math.cos(angle),
                middle[1] + (size[1] / 2 + 2.5 * step) * math.sin(angle),
            )


def _box(middle: Point, width: float, height: float) -> Box:
    x, y = middle
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _free(box: Box, taken: Sequence[Box]) -> bool:
    inside = min(box) >= ENDS[0] and max(box) <= ENDS[1]
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in taken
    )


def draw_cosines(forms: Sequence[Mapping[str, Any]]) -> bytes:
    """A heat map for each form: cosine between the gradients of every two goals.

    Args:
        forms: `title`, `goals` and `cosines`, as in gradients.json.
    """
    figure = Figure(figsize=(0.8 + 4.6 * len(forms), 4.6), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(forms), squeeze=False)
    for axes, form in zip(panels[0], forms, strict=True):
        goals, cosines = form["goals"], form["cosines"]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="PuOr")
        axes.set_xticks(range(len(goals)), goals)
        axes.set_yticks(range(len(goals)), goals)
        axes.set_title(form["title"], fontsize=10)
        for row, values in enumerate(cosines):
            for column, value in enumerate(values):
                ink = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
    figure.colorbar(image, ax=panels[0].tolist(), label="cosine", shrink=0.8)
    return png_of(figure)


def draw_loss(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss and loss per goal over steps; learning rate and gradient norm below.

    Args:
        steps: lines of train.jsonl, at least one.
    """
    figure = Figure(figsize=(8.0, 5.4), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    thin = {"linewidth": 1.3, "alpha": 0.9}
    for goal, (colour, dash) in GOAL_STYLES.items():
        x, y = _series(steps, f"loss_{goal}")
        if x:
            above.plot(x, y, color=colour, linestyle=dash, label=goal, **thin)
    x, y = _series(steps, "loss")
    above.plot(x, y, color="black", linewidth=2, label="all goals", marker=_dot(x))
    above.set_ylabel("loss")
    above.set_ylim(bottom=0 if min(y, default=0.0) >= 0 else None)
    above.legend(ncols=5, frameon=False, fontsize=9, loc="upper right")
    x, y = _series(steps, "grad_norm")
    below.plot(x, y, color=BLUE, linewidth=1.3, label="gradient norm", marker=_dot(x))
    below.set_ylabel("gradient norm", color=BLUE)
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    beside = below.twinx()
    x, y = _series(steps, "lr")
    beside.plot(x, y, color=ORANGE, linestyle="--", linewidth=1.3, marker=_dot(x))
    beside.set_ylabel("learning rate", color=ORANGE)
    beside.set_ylim(bottom=0, top=1.1 * max(y, default=0.0) or 1.0)
    beside.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, below, beside):
        axes.spines["top"].set_visible(False)
    for axes in (above, below):
        axes.grid(color="#e5e5e5")
    above.spines["right"].set_visible(False)
    return png_of(figure)


def _outward(name: str, value: float) -> float:
    return value if DIRECTIONS[name] > 0 else 100 - value


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in steps if isinstance(row.get(key), int | float)]
    return [int(row["step"]) for row in rows], [float(row[key]) for row in rows]


def _dot(x: Sequence[int]) -> str | None:
    """A marker where a line of one point would not be seen."""
    return "o" if len(x) == 1 else None


def png_of(figure: Figure) -> bytes:
    """The drawn figure as PNG bytes."""
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    # No version or date inside: the same numbers give the same bytes.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
