"""Every method on the same model, data, budget and scores: `unteach compare`.

The taught model and the caches are made once and shared. A learning rate is found for each method
by the same small sweep, on other questions than those of the test; then the seeds run at the
winner. Each training ends as one line of rows.jsonl, so that a ranking is finished in slices.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from unteach.engine.errors import InputError
from unteach.engine.evaluate.ranking import Ranked, Trial, write_ranking
from unteach.engine.evaluate.told import Told
from unteach.engine.progress import say
from unteach.engine.run import Run
from unteach.engine.stages import target_stage
from unteach.engine.train.methods import METHODS, check_method
from unteach.engine.trials import Prompted, Split, Trials, alone_at

IN_CONTEXT: tuple[Prompted, ...] = ("oracle", "ensemble")
ROWS = (*IN_CONTEXT, *METHODS)
# Seeds beside the first that part learning rates of equal Overall.
TIE_SEEDS = 2


def compare(
    run: Run, names: Sequence[str], seeds: int, rates: Sequence[float], *, stress: bool = False
) -> None:
    """Score every row that is not scored yet, then write the tables and the pictures.

    Args:
        names: of `ROWS`, in the order of the tables.
        seeds: trainings of each method at its best rate: run.seed and those after it.
        rates: learning rates to choose from; a single one is taken as it is.
        stress: also measure what `evaluate` asks for beside the scores, on the base and on every
            seed of each method.
    Raises:
        InputError: a row that cannot be trained or scored, or another process at this ranking,
            before anything runs.
    """
    check_rows(run, names)
    with alone_at(run, "compare"):
        _compare(run, names, seeds, rates, Comparison(run, stress))


def _compare(
    run: Run, names: Sequence[str], seeds: int, rates: Sequence[float], table: Comparison
) -> None:
    table.check_split("test")
    if len(set(rates)) > 1 and set(names) - set(IN_CONTEXT):
        table.check_split("tune")
    target_stage(run)
    base = table.prompted("base", "test")
    first, ranked = run.config.run.seed, []
    for name in names:
        if name in IN_CONTEXT:
            ranked.append(Ranked(name, (table.prompted(name, "test"),)))
            continue
        sweep = table.sweep(name, sorted(set(rates)), first)
        trials = []
        for seed in range(first, first + seeds):
            trials.append(table.row(name, sweep.lr, seed, "test"))
            table.remove_weights(row_settings(name, sweep.lr), seed)
        for seed in sweep.seeds(first)[seeds:]:
            table.remove_weights(row_settings(name, sweep.lr), seed)
        ranked.append(Ranked(name, tuple(trials), sweep.tried))
    if run.world.rank == 0:
        tuning = table.tuning if any(row.tried for row in ranked) else None
        say(write_ranking(table.folder, base, ranked, tuning))
        say(f"compare: {table.folder / 'ranking.md'}")
    run.world.wait()


def chosen_rows(text: str | None) -> tuple[str, ...]:
    """Rows by name, in the order of the tables; None = all of them.

    Raises:
        InputError: a name that no row has; the nearest one is given.
    """
    if text is None:
        return ROWS
    names = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(names - set(ROWS)):
        near = difflib.get_close_matches(name, ROWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(ROWS)}."
        raise InputError(f"--methods: there is no row {name}; {hint}")
    if not names:
        raise InputError(f"--methods names no row; choose among {', '.join(ROWS)}.")
    return tuple(name for name in ROWS if name in names)


def chosen_rates(text: str | None, lr: float) -> tuple[float, ...]:
    """Learning rates to choose from; None = the configured one, a third of it and three times it.

    Raises:
        InputError: something that is no number above 0.
    """
    if text is None:
        return float(f"{lr / 3:.3g}"), lr, float(f"{3 * lr:.3g}")
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--rates {text}: write numbers parted by commas.") from error
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"--rates {text}: a learning rate is a number above 0.")
    return rates


def check_rows(run: Run, names: Sequence[str]) -> None:
    """Refuse every row that cannot end well, before the first begins."""
    for name in names:
        if name in IN_CONTEXT:
            Told("oracle" if name == "oracle" else "ensemble", run.intentions).check()
        else:
            method = run.asked.method.model_copy(update={"name": name})
            check_method(run.asked.model_copy(update={"method": method}), run.taught_records)


class Sweep:
    """The rate that a method did best with, and Overall at each rate, a value a seed."""

    def __init__(self, lr: float, tried: dict[float, list[float]]) -> None:
        self.lr, self.tried = lr, tried

    def seeds(self, first: int) -> range:
        """Seeds that the winner was tried with: their weights are still there."""
        return range(first, first + len(self.tried.get(self.lr, ())))


def leading_rates(tried: Mapping[float, Sequence[float]]) -> list[float]:
    """Rates of the best mean Overall among those that were tried with the most seeds."""
    most = max(len(values) for values in tried.values())
    means = {lr: fmean(values) for lr, values in tried.items() if len(values) == most}
    return [lr for lr, mean in means.items() if mean == max(means.values())]


class Comparison(Trials):
    """One ranking in a run folder: the trials of its rows, and how their rates are found."""

    def __init__(self, run: Run, stress: bool = False) -> None:
        super().__init__(run, "compare", stress="test" if stress else None)

    def row(self, name: str, lr: float, seed: int, split: Split) -> Trial:
        """A method trained at a rate with a seed and scored; its weights stay."""
        return self.trained(row_settings(name, lr), seed, split, f"{name}, lr {lr:g}")

    def sweep(self, name: str, rates: Sequence[float], first: int) -> Sweep:
        """The rate of the best Overall on the tuning questions.

        Few questions make ties: rates that lead alike are tried with the seeds after the first,
        until one leads; after `TIE_SEEDS` of them the smallest serves. The winner's weights stay,
        for the test.
        """
        if len(rates) == 1:
            return Sweep(rates[0], {})
        tried: dict[float, list[float]] = {}
        leaders = list(rates)
        for seed in range(first, first + 1 + TIE_SEEDS):
            for rate in leaders:
                trial = self.row(name, rate, seed, "tune")
                tried.setdefault(rate, []).append(trial.overall)
            ahead = leading_rates(tried)
            best = ahead if seed < first + TIE_SEEDS else [min(ahead)]
            for loser in set(leaders) - set(best):
                for done in range(first, seed + 1):
                    self.remove_weights(row_settings(name, loser), done)
            leaders = best
            if len(leaders) == 1:
                break
        return Sweep(leaders[0], tried)


def row_settings(name: str, lr: float) -> tuple[str, ...]:
    """What makes a row of the ranking out of the recipe."""
    return f"method.name={name}", f"optim.lr={lr!r}"
