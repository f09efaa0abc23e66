"""One factor at a time around a recipe's own settings: `unteach study`.

A factor is a few levels, each a list of settings on the recipe. The level that makes the recipe as
it is stands for the default; it is trained once for all factors, like any two levels that make the
same training. After each factor its table and its picture are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unteach.engine.errors import InputError
from unteach.engine.evaluate.levels import Level, Swept, write_factor, write_study
from unteach.engine.progress import say
from unteach.engine.run import Run
from unteach.engine.stages import target_stage
from unteach.engine.trials import Split, Trials, alone_at

OWN = "as it is"


@dataclass(frozen=True)
class Factor:
    """What is varied: a name, and `section.key=value` settings by the label of each level."""

    name: str
    levels: Mapping[str, tuple[str, ...]]


def study(
    run: Run, factors: Sequence[Factor], seeds: int, split: Split, *, stress: bool = False
) -> None:
    """Score every level that is not scored yet, then write tables and pictures.

    Args:
        seeds: trainings of each level: run.seed and those after it.
        split: whose questions they are scored on; `tune` to choose, `test` to confirm.
        stress: also measure what `evaluate` asks for beside the scores, on the base and each level.
    Raises:
        InputError: a level that cannot be trained or scored, or another process at this study,
            before anything runs.
    """
    with alone_at(run, "study"):
        _study(run, factors, seeds, split, Trials(run, "study", stress=split if stress else None))


def _study(run: Run, factors: Sequence[Factor], seeds: int, split: Split, trials: Trials) -> None:
    trials.check_split(split)
    planned = [(factor.name, *planned_levels(trials, factor)) for factor in factors]
    distinct = {digest for *_, digests in planned for digest in digests}
    say(f"study: {len(distinct)} trainings of {seeds} seed(s), scored on split {split}")
    target_stage(run)
    base = trials.prompted("base", split)
    done = []
    for name, levels, _ in planned:
        scored = []
        for label, settings in levels.items():
            rows = []
            for seed in range(run.config.run.seed, run.config.run.seed + seeds):
                rows.append(trials.trained(settings, seed, split, f"{name} {label}"))
                trials.remove_weights(settings, seed)
            scored.append(Level(label, settings, tuple(rows), default=not settings))
        done.append(Swept(name, base, tuple(scored)))
        if run.world.rank == 0:
            say(write_factor(trials.folder, done[-1]))
            say(f"study: {write_study(trials.folder, done)}")
    run.world.wait()


def planned_levels(trials: Trials, factor: Factor) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The levels in order, the default's settings empty, and what each makes.

    Where no level makes the recipe as it is, one is put before them.

    Raises:
        InputError: names the factor and the level that cannot be run.
    """
    own, digests = trials.check(()), []
    levels: dict[str, tuple[str, ...]] = {}
    for label, settings in factor.levels.items():
        try:
            digests.append(trials.check(settings))
        except InputError as error:
            raise InputError(f"Factor {factor.name}, level {label}: {error}") from error
        levels[label] = () if digests[-1] == own else settings
    if own not in digests:
        levels, digests = {OWN: (), **levels}, [own, *digests]
    return levels, digests
