"""A ranking as people read it: the paper's Tables 1 and 2, what each row cost, its pictures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unteach.engine.evaluate.headings import is_stress
from unteach.engine.evaluate.paired import Difference, Questions, paired_difference
from unteach.engine.evaluate.pictures import draw_relearning, draw_rows, draw_tradeoff
from unteach.engine.evaluate.scores import DIRECTIONS, seed_interval
from unteach.engine.evaluate.stress_tables import (
    free_answers,
    robustness,
    stress_differences,
    stress_table,
)
from unteach.engine.evaluate.tuning import Tuning
from unteach.engine.files import write_atomic, write_json

HEADINGS = {
    "forget": "Forget ↓",
    "general": "General ↑",
    "neighbor": "Neighbor ↑",
    "attack": "ASR ↓",
    "mmlu": "MMLU ↑",
}
NAMES = {
    "oracle": "Upper bound (oracle router)",
    "ensemble": "Ensemble teacher",
    "duet": "DUET",
    "sft": "SFT",
    "ga": "GA*",
    "graddiff": "GradDiff*",
    "npo": "NPO*",
    "simnpo": "SimNPO*",
    "flat": "FLAT*",
    "ngdiff": "NGDiff",
    "mollm": "MOLLM",
    "kl-teacher": "Full-vocabulary KL",
    "eq3": "Eq. 3 as written",
    "bitopk": "Ours",
    "duet-loss": "Ours with DUET's loss",
    "bild-loss": "Ours with BiLD's loss",
}
GROUPS = {
    "in context": ("oracle", "ensemble"),
    "training": ("duet", "sft", "ga", "graddiff", "npo", "simnpo", "flat"),
    "gradient editing": ("ngdiff", "mollm"),
    "same teacher, same data": ("kl-teacher", "eq3", "bitopk"),
}
ABLATION = ("bitopk", "duet-loss", "bild-loss")
FREELY = (
    "Overall counts options that are picked and answers that are gone. Here stands whether the "
    "topic is refused or talked past, and what is said where no options are given."
)
DRAWN = 5  # rows of the radar beside base and ours: more cannot be told apart


@dataclass(frozen=True)
class Cost:
    """What one training took; `peak_mib` is None where the system cannot tell."""

    seconds: float
    tokens: int
    peak_mib: float | None


@dataclass(frozen=True)
class Trial:
    """One training, or one prompted model, scored on one split.

    Attributes:
        inputs: digest of everything that made it; a trial of other inputs is another one.
        scores: as in summary.json.
        settings: `section.key=value` that made it out of the recipe; rows that were written
            before there were any have none.
        questions: 0 to 100 for each question of each score, in the order that the protocol fixes;
            None where its judge gave no verdict.
    """

    method: str
    lr: float | None
    seed: int | None
    split: str
    inputs: str
    protocol: str
    overall: float
    scores: dict[str, dict[str, Any]]
    extra: dict[str, dict[str, Any]]
    cost: Cost | None
    settings: list[str] = field(default_factory=list)
    questions: dict[str, list[float | None]] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """The five scores that there are, and `overall`."""
        found = {n: float(self.scores[n]["value"]) for n in DIRECTIONS if n in self.scores}
        return {**found, "overall": self.overall}


@dataclass(frozen=True)
class Ranked:
    """A row of the tables.

    Attributes:
        trials: one a seed.
        tried: Overall on the tuning questions by learning rate, a value a seed; empty without a
            sweep.
    """

    name: str
    trials: tuple[Trial, ...]
    tried: Mapping[float, Sequence[float]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Means over the seeds."""
        rows = [trial.values() for trial in self.trials]
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}

    def questions(self) -> dict[int | None, Questions]:
        """What each question scored, by seed."""
        return {trial.seed: trial.questions for trial in self.trials}

    def cell(self, name: str) -> str:
        """Mean ± interval over the seeds."""
        mean, half = seed_interval([trial.values()[name] for trial in self.trials])
        return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def against_ours(rows: Mapping[str, Ranked]) -> dict[str, Difference]:
    """What each row's Overall is better by than ours, where both kept their questions."""
    ours = rows.get("bitopk")
    others = [row for row in rows.values() if ours is not None and row is not ours]
    found = {row.name: difference_between(row.trials, ours.trials) for row in others if ours}
    return {name: apart for name, apart in found.items() if apart is not None}


def stresses_against_ours(rows: Mapping[str, Ranked]) -> dict[str, dict[str, Difference]]:
    """What each row is better by than ours under each stress, question by question."""
    ours = rows.get("bitopk")
    if ours is None:
        return {}
    found = {
        row.name: stress_differences(row.questions(), ours.questions())
        for row in rows.values()
        if row is not ours
    }
    return {name: apart for name, apart in found.items() if apart}


def difference_between(first: Sequence[Trial], second: Sequence[Trial]) -> Difference | None:
    """What the first row's Overall is better by than the second's, question by question.

    None where they were asked by other protocols, or a row kept no questions.
    """
    if len({trial.protocol for trial in (*first, *second)}) != 1:
        return None
    return paired_difference(*({t.seed: t.questions for t in row} for row in (first, second)))


def write_ranking(
    folder: Path, base: Trial, ranked: Sequence[Ranked], tuning: Tuning | None
) -> str:
    """ranking.md, ranking.json and the pictures; returns the tables as text.

    Args:
        tuning: None where the rates were given.
    """
    rows = {row.name: row for row in ranked}
    against, stressed = against_ours(rows), stresses_against_ours(rows)
    write_json(
        folder / "ranking.json",
        {
            "protocol": base.protocol,
            "tuning": None if tuning is None else asdict(tuning),
            "base": asdict(base),
            "rows": [
                {
                    "name": row.name,
                    "means": row.means(),
                    "against_ours": asdict(against[row.name]) if row.name in against else None,
                    "stresses_against_ours": {
                        name: asdict(apart) for name, apart in stressed.get(row.name, {}).items()
                    },
                    "tried": {f"{lr:g}": [*values] for lr, values in row.tried.items()},
                    "trials": [asdict(trial) for trial in row.trials],
                }
                for row in ranked
            ],
        },
    )
    pictures = draw_pictures(base, rows)
    for name, data in pictures.items():
        write_atomic(folder / name, data)
    text = ranking_page(base, rows, against, stressed, tuning)
    linked = [f"\n![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    write_atomic(folder / "ranking.md", (text + "".join(linked)).encode())
    return text


def draw_pictures(base: Trial, rows: Mapping[str, Ranked]) -> dict[str, bytes]:
    """Radar of base, ours and the best beside it; trade-off of all rows; relearning of some.

    All take a row's style from its place, which is the same in each.
    """
    means = {name: row.means() for name, row in rows.items()}
    table = [n for group in GROUPS.values() for n in group]
    order = sorted(means, key=lambda n: (n != "bitopk", n not in table, -means[n]["overall"]))
    shown = {"Base": base.values(), **{NAMES.get(n, n): means[n] for n in order}}
    told_apart = 1 + min(1 + DRAWN, sum(name in table for name in order) or len(order))
    pictures = {"radar.png": draw_rows(dict(list(shown.items())[:told_apart]))}
    pictures["tradeoff.png"] = draw_tradeoff(shown)
    trials = {"Base": (base,), **{NAMES.get(n, n): rows[n].trials for n in order}}
    pictures["relearning.png"] = draw_relearning({n: _relearned(t) for n, t in trials.items()})
    return {name: data for name, data in pictures.items() if data is not None}


def _relearned(trials: Sequence[Trial]) -> dict[int, list[float]]:
    """Forget by the rows that a model was taught again, a value a seed; 0 rows: as it was."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        for name, score in {**trial.scores, **trial.extra}.items():
            if match := re.fullmatch(r"(?:relearned_(\d+)_)?forget", name):
                found.setdefault(int(match[1] or 0), []).append(score["value"])
    return found


def ranking_page(
    base: Trial,
    rows: Mapping[str, Ranked],
    against: Mapping[str, Difference],
    stressed: Mapping[str, Mapping[str, Difference]],
    tuning: Tuning | None,
) -> str:
    """Markdown: both tables, robustness where it was measured, the rates, the costs."""
    names = [name for name in HEADINGS if name in base.scores]
    seeds = max(len(row.trials) for row in rows.values())
    lines = ["# Every method on the same data, budget and scores", ""]
    lines += [
        f"Protocol `{base.protocol[:12]}`, {seeds} seed(s)"
        + (": mean ± half of Student's 95% interval over seeds." if seeds > 1 else ".")
        + " N: "
        + ", ".join(f"{name} {base.scores[name]['n']}" for name in names)
        + ". Overall is the sum of the changes for the better against the base, in points; "
        "* trains on forget and general records alone. In brackets a difference's 95% interval, by "
        "10,000 paired draws of questions and seeds.",
        "",
        "## Table 1",
        "",
        *_table(base, names, rows, against, [n for group in GROUPS.values() for n in group]),
    ]
    if any(name in rows for name in ABLATION[1:]):
        lines += ["", "## Table 2: the loss alone changed", ""]
        lines += _table(base, names, rows, against, ABLATION)
    extras = {NAMES.get(n, n): [t.extra for t in r.trials] for n, r in rows.items()}
    if said := free_answers({"Base": [base.extra], **extras}):
        lines += ["", "## What is said freely", "", FREELY, "", *said]
    if any(map(is_stress, base.extra)):
        lines += [
            "",
            "## Robustness",
            "",
            "Each row at its rate: mean ± half of Student's 95% interval over the seeds that were "
            "measured, or of one seed the 95% interval of its questions. Rows in context train "
            "nothing: who has their weights has the base.",
            "",
            *robustness({"Base": [base.extra], **extras}),
            *stress_table(
                {
                    NAMES.get(n, n): {s: asdict(a) for s, a in found.items()}
                    for n, found in stressed.items()
                }
            ),
        ]
    chosen = "Learning rates were given, not chosen." if tuning is None else tuning.sentence()
    lines += ["", "## Cost of one training", "", chosen, "", *_costs(rows)]
    return "\n".join(lines) + "\n"


def _table(
    base: Trial,
    names: Sequence[str],
    rows: Mapping[str, Ranked],
    against: Mapping[str, Difference],
    wanted: Sequence[str],
) -> list[str]:
    heads = [HEADINGS[name] for name in names]
    group_of = {name: group for group, members in GROUPS.items() for name in members}
    lines = [
        f"| kind | row | {' | '.join(heads)} | Overall ↑ | Overall against ours |",
        "| --- | --- |" + " ---: |" * (len(names) + 2),
        f"| | Base | {' | '.join(f'{base.values()[n]:.1f}' for n in names)} | 0.0 | — |",
    ]
    for name in wanted:
        if name in rows:
            cells = [rows[name].cell(score) for score in (*names, "overall")]
            cells.append(str(against.get(name, "—")))
            kind = group_of.get(name, "ablation")
            lines.append(f"| {kind} | {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return lines


def _costs(rows: Mapping[str, Ranked]) -> list[str]:
    lines = [
        "| row | learning rate | tried: Overall when tuning | seconds | tokens | peak MiB |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows.values():
        costs = [trial.cost for trial in row.trials if trial.cost is not None]
        if not costs:
            continue
        tried = [
            f"{lr:g}: " + "/".join(f"{value:+.1f}" for value in values)
            for lr, values in row.tried.items()
        ]
        peaks = [cost.peak_mib for cost in costs if cost.peak_mib is not None]
        cells = [
            f"{statistics.fmean(cost.seconds for cost in costs):.1f}",
            f"{statistics.fmean(cost.tokens for cost in costs):.0f}",
            f"{max(peaks):.0f}" if peaks else "not measured",
        ]
        name, rates = NAMES.get(row.name, row.name), ", ".join(tried) or "—"
        lines.append(f"| {name} | {row.trials[0].lr:g} | {rates} | {' | '.join(cells)} |")
    return lines
