"""What is left of forgetting after each stress, and what is said freely, as tables: scores, and who
is better, by what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from unteach.engine.evaluate.headings import ARROWS, heading_of, is_stress, place_of
from unteach.engine.evaluate.paired import Difference, Questions, paired_difference
from unteach.engine.evaluate.scores import seed_interval

FREE = (
    "forget_refused",
    "attack_refused",
    "neighbor_recall",
    "general_prefixed",
    "neighbor_prefixed",
    "unended",
)


def stresses_of(rows: Iterable[Iterable[str]]) -> list[str]:
    """Names of the stresses that a row has, in the order of a table."""
    return sorted({n for names in rows for n in names if is_stress(n)}, key=place_of)


def robustness(extras: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[str]:
    """A line for each stress that the first of the models has, a column for each model.

    Args:
        extras: what stands beside the scores, by the name of the model, one a seed; the base first.
    """
    return _table(extras, stresses_of(next(iter(extras.values()))))


def free_answers(extras: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[str]:
    """As `robustness`, of what a model says where no options are given; empty where none has it.

    Overall cannot see it: who talks nonsense about the topic picks no right option and refuses
    nothing, and may answer the neighbors alike.
    """
    found = {name for rows in extras.values() for row in rows for name in row}
    return _table(extras, names) if (names := [name for name in FREE if name in found]) else []


def _table(
    extras: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], names: Sequence[str]
) -> list[str]:
    """A line a name, a column for each model that has any of them."""
    measured = {
        label: rows
        for label, rows in extras.items()
        if any(n in row for row in rows for n in names)
    }
    lines = [f"| | N | {' | '.join(measured)} |", "| --- | ---: |" + " ---: |" * len(measured)]
    for name in names:
        words, direction = heading_of(name)
        scores = [[row[name] for row in rows if name in row] for rows in measured.values()]
        count = next(f"{found[0]['n']}" for found in scores if found)
        cells = " | ".join(map(stress_cell, scores))
        lines.append(f"| {words} {ARROWS[direction]} | {count} | {cells} |")
    return lines


def stress_differences(
    first: Mapping[int | None, Questions], second: Mapping[int | None, Questions]
) -> dict[str, Difference]:
    """What the first row is better by than the second under each stress, question by question.

    Args:
        first, second: what each question scored, by seed; one that lacks a stress is left out.
    """
    found: dict[str, Difference] = {}
    for stress in stresses_of(first.values()):
        sides = (
            {seed: asked for seed, asked in row.items() if stress in asked}
            for row in (first, second)
        )
        apart = paired_difference(*sides, signs={stress: heading_of(stress)[1]})
        if apart is not None:
            found[stress] = apart
    return found


def stress_table(
    rows: Mapping[str, Mapping[str, Mapping[str, float]]], than: str = "ours"
) -> list[str]:
    """What each row is better by under each stress; empty where nobody kept questions.

    Args:
        rows: differences with the ends of their intervals, by the row's name and stress.
        than: whom all are compared with, in words.
    """
    if not rows:
        return []
    lines = [
        "",
        f"Better than {than} by, in points [95% interval by paired draws of questions and seeds]:",
        "",
        f"| | {' | '.join(rows)} |",
        "| --- |" + " ---: |" * len(rows),
    ]
    for stress in stresses_of(rows.values()):
        apart = [found.get(stress) for found in rows.values()]
        cells = ["{value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**a) if a else "—" for a in apart]
        lines.append(f"| {heading_of(stress)[0]} | {' | '.join(cells)} |")
    return lines


def stress_cell(scores: Sequence[Mapping[str, float]]) -> str:
    """Mean ± interval over the seeds, or of one seed with the interval of its questions."""
    if not scores:
        return "—"
    mean, half = seed_interval([score["value"] for score in scores])
    if half is None:
        return "{value:.1f} [{low:.1f}–{high:.1f}]".format(**scores[0])
    return f"{mean:.1f} ± {half:.1f}"
