"""The paired bootstrap against a case by hand, a slow one, and worlds whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from unteach.engine.evaluate import paired
from unteach.engine.evaluate.paired import Questions, paired_difference
from unteach.engine.evaluate.scores import DIRECTIONS, Score, mean, overall


def test_one_question_of_four_by_hand() -> None:
    # Four draws of differences 100, 0, 0, 0 hit the first Binomial(4, 1/4) times: 0 times with
    # probability 0.316, at most 2 times with 0.949 and at most 3 with 0.996.
    first = {0: {"forget": [0.0, 0.0, 100.0, 100.0]}}
    second = {0: {"forget": [100.0, 0.0, 100.0, 100.0]}}
    found = paired_difference(first, second)
    assert found is not None
    assert (found.value, found.low, found.high) == (25.0, 0.0, 75.0)
    assert str(found) == "+25.0 [+0.0, +75.0]"


def rows(seed: int, seeds: Sequence[int]) -> dict[int | None, Questions]:
    """Two scores of different size, by seed of training."""
    generator = np.random.default_rng(seed)
    sizes = {"forget": 30, "mmlu": 50}
    return {
        each: {name: generator.choice([0.0, 40.0, 100.0], n).tolist() for name, n in sizes.items()}
        for each in seeds
    }


def slow(
    first: Mapping[int | None, Questions], second: Mapping[int | None, Questions], draws: int
) -> tuple[float, float]:
    """The same in plain Python: pick seeds, pick questions, add up."""
    dice, found = random.Random(1), []
    for _ in range(draws):
        mine = dice.choices(list(first), k=len(first))
        other = mine if list(first) == list(second) else dice.choices(list(second), k=len(second))
        total = 0.0
        for name, sign in DIRECTIONS.items():
            if name not in next(iter(first.values())):
                continue
            count = len(next(iter(first.values()))[name])
            picked = dice.choices(range(count), k=count)
            gaps = []
            for side, chosen in ((first, mine), (second, other)):
                values = [side[s][name][q] for s in chosen for q in picked]
                gaps.append(sum(v for v in values if v is not None) / len(values))
            total += sign * (gaps[0] - gaps[1])
        found.append(total)
    found.sort()
    return found[round(0.025 * draws)], found[round(0.975 * draws)]


@pytest.mark.parametrize("others", [(0, 1, 2), (7, 8)])
def test_agrees_with_a_slow_one(others: tuple[int, ...]) -> None:
    first, second = rows(3, (0, 1, 2)), rows(4, others)
    found = paired_difference(first, second)
    assert found is not None
    low, high = slow(first, second, 3000)
    # The standard error of such a percentile is about 2.7 standard deviations / sqrt(draws).
    error = 2.7 * (found.high - found.low) / 3.92 / 3000**0.5
    assert abs(found.low - low) < 4 * error and abs(found.high - high) < 4 * error


def test_value_is_the_difference_of_both_overalls() -> None:
    base, first, second = (rows(seed, (0,)) for seed in (1, 2, 3))

    def scores(row: Mapping[int | None, Questions]) -> dict[str, Score]:
        return {n: mean([(v or 0.0) / 100 for v in values]) for n, values in row[0].items()}

    against = [overall(scores(side), scores(base)).value for side in (first, second)]
    found = paired_difference(first, second)
    assert found is not None and found.value == pytest.approx(against[0] - against[1])


def test_interval_holds_the_truth_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired, "DRAWS", 500)
    generator = np.random.default_rng(0)
    hits, worlds, widths = 0, 300, {"paired": 0.0, "apart": 0.0}
    for _ in range(worlds):
        ease = generator.uniform(0, 1, 60)  # of a question, for both sides alike
        better, worse = (
            (100.0 * (generator.uniform(size=60) < chance)).tolist()
            for chance in (0.1 + 0.8 * ease, 0.8 * ease)
        )
        found = paired_difference({0: {"general": better}}, {0: {"general": worse}})
        shuffled = generator.permutation(worse).tolist()
        apart = paired_difference({0: {"general": better}}, {0: {"general": shuffled}})
        assert found is not None and apart is not None
        hits += found.low <= 10 <= found.high
        widths["paired"] += found.high - found.low
        widths["apart"] += apart.high - apart.low
    assert 0.91 <= hits / worlds <= 0.98
    assert widths["paired"] < 0.9 * widths["apart"], "pairing is what makes it sharp"


def test_equal_seeds_are_drawn_together() -> None:
    # Every seed is 10 points better than the same seed of the other side, on every question.
    first: dict[int | None, Questions] = {s: {"general": [20.0 * s + 10] * 5} for s in range(3)}
    second: dict[int | None, Questions] = {s: {"general": [20.0 * s] * 5} for s in range(3)}
    together = paired_difference(first, second)
    assert together is not None and (together.low, together.high) == pytest.approx((10.0, 10.0))
    assert paired_difference(first, {s: second[s] for s in (2, 0, 1)}) == together
    apart = paired_difference(first, {s: second[s - 3] for s in (3, 4, 5)})
    assert apart is not None and apart.low < 0 < 30 < apart.high


def test_same_numbers_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rows(3, (0, 1)), rows(4, (0, 1))
    whole = paired_difference(first, second)
    monkeypatch.setattr(paired, "CELLS", 999)
    assert paired_difference(first, second) == whole


def test_what_was_not_judged_or_not_asked() -> None:
    judged = {0: {"attack": [100.0, None, 0.0]}}
    found = paired_difference(judged, {0: {"attack": [0.0, 0.0, None]}})
    assert found is not None and found.value == -100.0, "the first question alone counts"
    assert paired_difference({0: {}}, {0: {}}) is None
    nothing = {0: {"attack": [None, None], "forget": [1.0]}}
    assert paired_difference(nothing, nothing) is None, "an Overall without one of its scores"
    assert paired_difference({0: {"attack": [1.0]}}, {0: {}}) is None
    assert paired_difference({0: {"attack": [1.0]}}, {0: {"attack": [1.0, 2.0]}}) is None
