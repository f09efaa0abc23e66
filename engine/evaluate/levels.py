"""A study as people read it: for each factor a table and a picture, and a page that links all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unteach.engine.evaluate.level_pictures import Line, draw_differences, draw_levels
from unteach.engine.evaluate.paired import Difference
from unteach.engine.evaluate.ranking import (
    HEADINGS,
    Ranked,
    Trial,
    difference_between,
)
from unteach.engine.evaluate.scores import seed_interval
from unteach.engine.evaluate.stress_tables import (
    robustness,
    stress_differences,
    stress_table,
    stresses_of,
)
from unteach.engine.files import write_atomic, write_json


@dataclass(frozen=True)
class Level:
    """One level of a factor.

    Attributes:
        settings: what it changes of the recipe.
        trials: one a seed.
        default: whether it is the recipe as it is.
    """

    label: str
    settings: tuple[str, ...]
    trials: tuple[Trial, ...]
    default: bool


@dataclass(frozen=True)
class Swept:
    """A factor with all its levels scored on one split."""

    name: str
    base: Trial
    levels: tuple[Level, ...]

    @property
    def default(self) -> Level:
        """The level that is the recipe as it is."""
        return next(level for level in self.levels if level.default)

    @property
    def scores(self) -> list[str]:
        """The scores that there are, and Overall."""
        return [*(name for name in HEADINGS if name in self.base.scores), "overall"]

    @property
    def stem(self) -> str:
        """What its files are called: trials of both splits stand side by side."""
        return self.name if self.base.split == "tune" else f"{self.name}-{self.base.split}"


def write_factor(folder: Path, swept: Swept) -> str:
    """The table and the picture of a factor; returns the table as text."""
    text = factor_page(swept)
    picture = f"{swept.stem}.png"
    labels = [level.label for level in swept.levels]
    lines = {}
    for name in swept.scores:
        found = [
            seed_interval([trial.values()[name] for trial in level.trials])
            for level in swept.levels
        ]
        lines[name] = Line([mean for mean, _ in found], [half for _, half in found])
    default = swept.levels.index(swept.default)
    write_atomic(folder / picture, draw_levels(swept.name, labels, lines, default))
    page = f"{text}\n![{swept.name}]({picture})\n"
    write_atomic(folder / f"{swept.stem}.md", page.encode())
    return text


def factor_page(swept: Swept) -> str:
    """Markdown: a row a level, the default in bold, what it is better by than the default."""
    names = swept.scores
    heads = [HEADINGS.get(name, "Overall ↑") for name in names]
    lines = [
        f"# {swept.name}",
        "",
        _protocol(swept),
        "",
        f"| level | {' | '.join(heads)} | Overall against the default | settings |",
        "| --- |" + " ---: |" * (len(names) + 1) + " --- |",
    ]
    for level in swept.levels:
        cells = [Ranked(level.label, level.trials).cell(name) for name in names]
        cells.append(_apart(level, swept.default))
        label = f"**{level.label}** (default)" if level.default else level.label
        settings = ", ".join(f"`{setting}`" for setting in level.settings) or "—"
        lines.append(f"| {label} | {' | '.join(cells)} | {settings} |")
    if stresses_of([swept.base.extra]):
        extras = {level.label: [trial.extra for trial in level.trials] for level in swept.levels}
        lines += [
            "",
            "## Beyond these questions",
            "",
            *robustness({"Base": [swept.base.extra], **extras}),
        ]
        lines += stress_table(_stressed_apart(swept), than=f"{swept.default.label}, the default,")
    return "\n".join(lines) + "\n"


def _stressed_apart(swept: Swept) -> dict[str, dict[str, dict[str, float]]]:
    """What each level is better by than the default under each stress, where that is known."""
    default = Ranked(swept.default.label, swept.default.trials).questions()
    found = {
        level.label: stress_differences(Ranked(level.label, level.trials).questions(), default)
        for level in swept.levels
        if not level.default
    }
    return {
        label: {stress: asdict(gap) for stress, gap in apart.items()}
        for label, apart in found.items()
        if apart
    }


def write_study(folder: Path, factors: Sequence[Swept]) -> Path:
    """study.md, which links these factors and those of earlier commands around the same default.

    It is made from study.json, which says of every level which trials it is made of.
    """
    base = factors[0].base
    stem = "study" if base.split == "tune" else f"study-{base.split}"
    known: dict[str, Any] = {}
    if (folder / f"{stem}.json").is_file():
        known = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    own = factors[0].default.trials[0].inputs
    known = {name: entry for name, entry in known.items() if entry["default_trial"] == own}
    known |= {swept.name: _entry(swept) for swept in factors}
    write_json(folder / f"{stem}.json", known)
    lines = ["# One factor at a time", "", _protocol(factors[0]), ""]
    lines += [
        "| factor | seeds | default | Overall | best level | Overall | difference |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for name, entry in known.items():
        overall = {label: level["overall"] for label, level in entry["levels"].items()}
        default, best = entry["default"], entry["best"]
        lines.append(
            f"| [{name}]({entry['file']}.md) | {entry['seeds']} | {default} | "
            f"{overall[default]:+.1f} | {best} | {overall[best]:+.1f} | {entry['difference']} |"
        )
    if apart := differences(known):
        write_atomic(folder / f"{stem}.png", draw_differences(apart))
        lines += ["", f"![Overall against the default]({stem}.png)"]
    write_atomic(folder / f"{stem}.md", ("\n".join(lines) + "\n").encode())
    return folder / f"{stem}.md"


def differences(study: Mapping[str, Any]) -> dict[str, dict[str, Difference]]:
    """By factor and level, what Overall is ahead of the default's, where that is known.

    Args:
        study: the content of study.json.
    """
    found = {
        name: {
            label: Difference(**level["difference"])
            for label, level in entry["levels"].items()
            if level.get("difference")  # an older study.json has none
        }
        for name, entry in study.items()
    }
    return {name: each for name, each in found.items() if each}


def _entry(swept: Swept) -> dict[str, Any]:
    """A factor in study.json; of levels that are level the default is the best."""
    default = swept.default
    means = {each.label: Ranked(each.label, each.trials).means() for each in swept.levels}
    best = max(swept.levels, key=lambda level: (means[level.label]["overall"], level.default))
    apart = {level.label: _difference(level, default) for level in swept.levels}
    return {
        "file": swept.stem,
        "default_trial": default.trials[0].inputs,
        "seeds": len(default.trials),
        "default": default.label,
        "best": best.label,
        "difference": _apart(best, default),
        "levels": {
            level.label: {
                "settings": list(level.settings),
                "overall": means[level.label]["overall"],
                "difference": None if (gap := apart[level.label]) is None else asdict(gap),
                "trials": [trial.inputs for trial in level.trials],
            }
            for level in swept.levels
        },
    }


def _apart(level: Level, default: Level) -> str:
    """Overall less the default's, as a cell of a table."""
    if level.default:
        return "—"
    difference = _difference(level, default)
    return "not known" if difference is None else str(difference)


def _difference(level: Level, default: Level) -> Difference | None:
    """Overall less the default's; None for the default itself, and where it is not known."""
    return None if level.default else difference_between(level.trials, default.trials)


def _protocol(swept: Swept) -> str:
    base, seeds = swept.base, len(swept.levels[0].trials)
    counts = ", ".join(f"{n} {base.scores[n]['n']}" for n in HEADINGS if n in base.scores)
    spread = " Cells: mean ± half of Student's 95% interval over seeds." if seeds > 1 else ""
    return (
        f"Split {base.split}, {seeds} seed(s), protocol `{base.protocol[:12]}`; N: {counts}."
        f"{spread} Differences: 95% interval by 10,000 paired draws of questions and seeds."
    )
