"""How much better one row is than another on the same questions: the paired bootstrap.

Two models that are asked the same questions stumble over the same hard ones. Their difference is
therefore known better than either score, if it is taken question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unteach.engine.evaluate.scores import DIRECTIONS

DRAWS = 10_000
CELLS = 2**22  # numbers held at once
# 0 to 100 for each question of each score; None where a judge gave no verdict.
Questions = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Difference:
    """A difference in points, between the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_difference(
    first: Mapping[int | None, Questions],
    second: Mapping[int | None, Questions],
    *,
    signs: Mapping[str, int] = DIRECTIONS,
    seed: int = 0,
) -> Difference | None:
    """First less second: Σ over scores of sign · (mean over seeds and questions).

    Each draw takes questions of every score, the same for both sides, and seeds, with replacement.
    A seed brings all its scores; where both sides have the same seeds they are drawn together, for
    the same seed means the same order of the same data. Percentiles, so the interval is as narrow
    as what was seen: few seeds or questions that all agree say little of others.

    Args:
        first, second: by seed of training.
        signs: scores to add up, each as better (1) or worse (-1) where it is higher; a score that
            nobody has is left out.
        seed: of the draws.
    Returns:
        None where a side has no questions kept, the sides were not asked the same ones, or of some
        score no question was judged on both.
    """
    names = [n for n in signs if any(n in row for row in (*first.values(), *second.values()))]
    rows = [*first.values(), *second.values()]
    for name in names:
        if len({len(row.get(name, ())) for row in rows}) != 1:
            return None
    if not names or not first or not second:
        return None
    if together := first.keys() == second.keys():
        second = {trained: second[trained] for trained in first}
    random = np.random.default_rng(seed)
    weight_RA = _drawn_seeds(random, len(first))
    weight_RB = weight_RA if together else _drawn_seeds(random, len(second))
    value, draws = 0.0, np.zeros(DRAWS)
    for name in names:
        first_AQ, second_BQ = _judged(first, second, name)
        if not first_AQ.shape[1]:
            return None
        value += signs[name] * float(first_AQ.mean() - second_BQ.mean())
        count = first_AQ.shape[1]
        step = max(1, CELLS // count)
        for start in range(0, DRAWS, step):
            part = slice(start, start + step)
            gap_RQ = weight_RA[part] @ first_AQ - weight_RB[part] @ second_BQ
            drawn_RQ = random.integers(0, count, gap_RQ.shape)
            draws[part] += signs[name] * np.take_along_axis(gap_RQ, drawn_RQ, axis=1).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Difference(value, float(low), float(high))


def _drawn_seeds(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """[draws, seeds], the share of each seed in as many picks with replacement."""
    return random.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count


def _judged(
    first: Mapping[int | None, Questions], second: Mapping[int | None, Questions], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[seeds, questions] of both sides, of the questions that were judged in every row."""
    sides = [
        np.array([row[name] for row in side.values()], dtype=np.float64)  # None becomes NaN
        for side in (first, second)
    ]
    whole = ~np.isnan(np.concatenate(sides)).any(axis=0)
    return sides[0][:, whole], sides[1][:, whole]
