"""Every method on the same model, data, budget and scores: `unteach compare`.

The taught model and the caches are made once and shared. A learning rate is found for each method
by the same small sweep, on other questions than those of the test; then the seeds run at the
winner. Each training ends as one line of rows.jsonl, so that a ranking is finished in slices.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from unteach.engine.config import Config
from unteach.engine.data.records import GOALS
from unteach.engine.errors import InputError
from unteach.engine.evaluate.headings import is_stress
from unteach.engine.evaluate.ranking import Cost, Ranked, Trial, write_ranking
from unteach.engine.evaluate.report import read_steps
from unteach.engine.evaluate.scores import Score, overall
from unteach.engine.evaluate.stress import any_stress, check_stresses, stressed
from unteach.engine.evaluate.suites import (
    Evaluation,
    evaluate,
    protocol_hash,
    read_mmlu,
    tested_records,
)
from unteach.engine.evaluate.told import NOTHING, Told
from unteach.engine.evaluate.tuning import Tuning, tuning_records, tuning_split
from unteach.engine.files import write_atomic
from unteach.engine.model import tokenizer_fingerprint
from unteach.engine.progress import say
from unteach.engine.run import Run, digest, records_fingerprint
from unteach.engine.stages import target_stage, train_stage, training_cache
from unteach.engine.train.log import reset_peak
from unteach.engine.train.methods import METHODS, check_method, find_method, settle

Routing = Literal["oracle", "ensemble"]
IN_CONTEXT: tuple[Routing, ...] = ("oracle", "ensemble")
ROWS = (*IN_CONTEXT, *METHODS)
Split = Literal["tune", "test"]


def compare(
    run: Run, names: Sequence[str], seeds: int, rates: Sequence[float], *, stress: bool = False
) -> None:
    """Score every row that is not scored yet, then write the tables and the pictures.

    Args:
        names: of `ROWS`, in the order of the tables.
        seeds: trainings of each method at its best rate: run.seed and those after it.
        rates: learning rates to choose from; a single one is taken as it is.
        stress: also measure what `evaluate` asks for beside the scores, on the base and on each
            method's first seed.
    Raises:
        InputError: a row that cannot be trained or scored, before anything runs.
    """
    check_rows(run, names)
    if stress:
        check_stressed(run)
    target_stage(run)
    table = Comparison(run, stress)
    base = table.prompted("base", "test")
    first, ranked = run.config.run.seed, []
    for name in names:
        if name in IN_CONTEXT:
            ranked.append(Ranked(name, (table.prompted(name, "test"),)))
            continue
        sweep = table.sweep(name, sorted(set(rates)), first)
        trials = []
        for seed in range(first, first + seeds):
            trials.append(table.trained(name, sweep.lr, seed, "test"))
            table.remove_weights(name, sweep.lr, seed)
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
        return lr / 3, lr, 3 * lr
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
            check_method(run.asked.model_copy(update={"method": method}), run.records)


def check_stressed(run: Run) -> None:
    """Refuse `--stress` where nothing is asked for, or where it cannot be measured."""
    if not any_stress(run.config):
        raise InputError(
            "--stress measures what the evaluate section asks for, which is nothing: --set "
            "evaluate.few_shot=4, evaluate.quantized=[8,4] or evaluate.relearn_steps=10."
        )
    check_stresses(run.config, run.records)


class Sweep:
    """The rates that a method was tried at, and the one it did best with."""

    def __init__(self, lr: float, tried: dict[float, float]) -> None:
        self.lr, self.tried = lr, tried


class Comparison:
    """One ranking in a run folder: what it is made of, and the lines it has."""

    def __init__(self, run: Run, stress: bool = False) -> None:
        self.run, self.world, self.stress = run, run.world, stress
        self.folder = run.folder / "compare"
        self.path = self.folder / "rows.jsonl"
        self.words = tokenizer_fingerprint(run.tokenizer)
        mmlu = read_mmlu(Path(run.config.data.mmlu)) if run.config.data.mmlu else None
        tune = tuning_records(run.records)
        goals = tuple(g for g in run.config.evaluate.goals if any(r.goal == g for r in tune))
        settings = run.config.evaluate.model_copy(update={"goals": goals})
        self.tuning = Tuning(tuning_split(run.records), len(tested_records(settings, tune)))
        self.tests = {
            "test": (run.config, run.records, mmlu),
            "tune": (run.config.model_copy(update={"evaluate": settings}), tune, None),
        }
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self.path)
        self.world.wait()

    def prompted(self, name: str, split: Split) -> Trial:
        """The model as it is (`base`), or behind intentions: scored without training."""
        told = NOTHING
        if name != "base":
            told = Told("oracle" if name == "oracle" else "ensemble", self.run.intentions)
        prompts = told.intentions.model_dump(mode="json") if told.intentions else None
        inputs = digest([self.run.base_fingerprint, self._protocol(split), told.routing, prompts])
        found = self._line(name, None, None, split, inputs)
        if found is None:
            stress = self._stressed(name, None, split)
            scored = self._scored(self.run.base, f"{name}, {split}", split, told, stress)
            self._append(name, None, None, split, inputs, scored, None)
        return self._expect(name, None, None, split, inputs)

    def trained(self, name: str, lr: float, seed: int, split: Split) -> Trial:
        """A method trained at a rate with a seed and scored; its weights stay."""
        cell = self.cell(name, lr, seed)
        inputs = digest([self.run.base_fingerprint, self._protocol(split), _made_of(cell)])
        if self._line(name, lr, seed, split, inputs) is None:
            self.prompted("base", split)
            fresh = reset_peak(self.world.device)
            train_stage(cell, training_cache(cell))
            model = str(cell.folder / "model")
            stress = self._stressed(name, seed, split)
            scored = self._scored(model, f"{name}, {split}", split, NOTHING, stress)
            cost = cost_of(cell.folder / "train.jsonl", peak_known=fresh)
            self._append(name, lr, seed, split, inputs, scored, cost)
        return self._expect(name, lr, seed, split, inputs)

    def sweep(self, name: str, rates: Sequence[float], seed: int) -> Sweep:
        """The rate of the best Overall on the tuning questions; of equals the smallest.

        The winner's weights stay, for the test.
        """
        if len(rates) == 1:
            return Sweep(rates[0], {})
        tried: dict[float, float] = {}
        for rate in rates:
            tried[rate] = self.trained(name, rate, seed, "tune").overall
            best = max(tried, key=lambda lr: tried[lr])
            for loser in tried:
                if loser != best:
                    self.remove_weights(name, loser, seed)
        return Sweep(best, tried)

    def remove_weights(self, name: str, lr: float, seed: int) -> None:
        """A training's log and its line stay, its weights and checkpoints do not."""
        if self.world.rank == 0:
            for part in ("model", "checkpoints", "seeds.bin"):
                path = self.cell(name, lr, seed).folder / part
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self.world.wait()

    def cell(self, name: str, lr: float, seed: int) -> Run:
        """The run of one training: its own folder, everything made before it shared."""
        asked = self.run.asked
        folder = self.folder / f"{name}-lr-{lr:g}-seed-{seed}"
        config = asked.model_copy(
            update={
                "method": asked.method.model_copy(update={"name": name}),
                "optim": asked.optim.model_copy(update={"lr": lr}),
                "run": asked.run.model_copy(
                    update={"seed": seed, "log_every": 1, "folder": str(folder)}
                ),
            }
        )
        settled = settle(config)
        lesson = (settled.teacher, find_method(name).goals)
        own = (self.run.config.teacher, find_method(self.run.config.method.name).goals)
        key = digest([lesson[0].model_dump(mode="json"), lesson[1]])
        cache = self.run.cache_folder if lesson == own else self.folder / "caches" / key
        return replace(
            self.run, config=settled, asked=config, folder=folder, home=self.run.folder, cache=cache
        )

    def _protocol(self, split: Split) -> str:
        config, records, mmlu = self.tests[split]
        return protocol_hash(config, records, mmlu, self.words)

    def _stressed(self, name: str, seed: int | None, split: Split) -> bool:
        """Whether a trial holds stress scores: the base has them, and each method's first seed."""
        own = name == "base" or seed == self.run.config.run.seed
        return self.stress and split == "test" and own

    def _scored(
        self, path: str, title: str, split: Split, told: Told, stress: bool
    ) -> Evaluation | None:
        """Scores in float32, on rank 0; the others have none."""
        if self.world.rank != 0:
            return None
        config, records, mmlu = self.tests[split]
        load, words = partial(self.run.load, path, "float32"), self.run.tokenizer
        found = evaluate(config, load(), words, records, mmlu=mmlu, title=title, told=told)
        return stressed(config, load, words, records, found) if stress else found

    def _line(
        self, name: str, lr: float | None, seed: int | None, split: Split, inputs: str
    ) -> Trial | None:
        """The finished line of these very inputs, or None; every rank reads the same file."""
        for line in read_trials(self.path):
            key = (line.method, line.lr, line.seed, line.split, line.inputs)
            whole = not self._stressed(name, seed, split) or any(map(is_stress, line.extra))
            if whole and key == (name, lr, seed, split, inputs):
                return line
        return None

    def _expect(
        self, name: str, lr: float | None, seed: int | None, split: Split, inputs: str
    ) -> Trial:
        line = self._line(name, lr, seed, split, inputs)
        assert line is not None
        return line

    def _append(
        self,
        name: str,
        lr: float | None,
        seed: int | None,
        split: Split,
        inputs: str,
        scored: Evaluation | None,
        cost: Cost | None,
    ) -> None:
        if scored is not None:
            total = 0.0
            if name != "base":
                base = self.prompted("base", split)
                known = {n: Score(**score) for n, score in base.scores.items()}
                total = overall(scored.scores, known).value
            line = Trial(
                method=name,
                lr=lr,
                seed=seed,
                split=split,
                inputs=inputs,
                protocol=self._protocol(split),
                overall=total,
                scores={n: asdict(score) for n, score in scored.scores.items()},
                extra={n: asdict(score) for n, score in scored.extra.items()},
                cost=cost,
            )
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(line)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            rate = "" if lr is None else f", lr {lr:g}, seed {seed}"
            say(f"compare: {name}{rate}, {split}: Overall {total:+.1f}")
        self.world.wait()


def cost_of(log: Path, *, peak_known: bool) -> Cost:
    """What a training took, by its log; the lines of a killed one and its resumption add up."""
    steps = read_steps(log)
    return Cost(
        seconds=sum(step["seconds"] for step in steps),
        tokens=sum(step["tokens"] for step in steps),
        peak_mib=max(step["peak_mib"] for step in steps) if peak_known else None,
    )


def read_trials(path: Path) -> list[Trial]:
    """Lines in the order in which they were finished.

    Raises:
        InputError: a line that is none of ours.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        trials = [Trial(**json.loads(line)) for line in lines]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} holds a line that is no row ({error}): remove it.") from error
    return [replace(t, cost=Cost(**t.cost)) if isinstance(t.cost, dict) else t for t in trials]


def _drop_torn_line(path: Path) -> None:
    """A run that was killed while it wrote leaves half a line."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomic(path, whole.encode())


def _made_of(cell: Run) -> list[object]:
    """Everything beside the base that a training's weights depend on."""
    config: Config = cell.config
    trained = [r for r in cell.split("train") if r.goal in find_method(config.method.name).goals]
    return [
        config.method.model_dump(mode="json"),
        config.teacher.model_dump(mode="json"),
        config.optim.model_dump(mode="json"),
        [[goal, config.data.mix.get(goal, 0)] for goal in GOALS],
        [config.data.known_only, config.model.dtype, config.parallel.dtype, config.run.seed],
        cell.intentions.model_dump(mode="json") if cell.intentions else None,
        records_fingerprint(trained),
    ]
