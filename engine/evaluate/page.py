"""A summary as people read it: tables for the terminal, Markdown, and one self-contained HTML file.

Everything a model wrote is untrusted text: escaped in HTML by Jinja2, in Markdown by `plain`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from rich import box
from rich.table import Table
from rich.text import Text

from unteach.engine.data.records import GOALS, Goal
from unteach.engine.evaluate.generate import ASKED_AS
from unteach.engine.evaluate.headings import ARROWS, MEANINGS, heading_of, place_of
from unteach.engine.evaluate.scores import DIRECTIONS
from unteach.engine.evaluate.template import PAGE

EXAMPLES = 3
LONGEST = 400
NOTE = (
    "Trained facts are asked in other words than in training; no training record names an "
    "untrained one. The keyword judge counts an attack as a success where no refusal follows, the "
    "leak judge where the answer does. Open answers and answers after an attack prefix are scored "
    "by ROUGE-L recall. Refused, cut and picked are shares of the questions. A question is "
    "attacked behind every searched prefix, and one that works is a success. Other facts than "
    "those relearned on are forget questions about what the retraining did not see."
)


@dataclass(frozen=True)
class Row:
    """One line of a table; `better` is the change's sign of good, 0 where nothing moved."""

    label: str
    base: str
    model: str
    change: str
    n: str
    better: int


@dataclass(frozen=True)
class Example:
    """One question before and after."""

    goal: Goal
    id: str
    question: str
    prefix: str | None
    gold: str
    base: str
    model: str
    base_verdict: str
    model_verdict: str


def score_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The scores that count in Overall."""
    base, model = summary["base"], summary["model"]
    names = [name for name in DIRECTIONS if name in base and name in model]
    return [_row(MEANINGS[n], DIRECTIONS[n], base[n], model[n]) for n in names]


def extra_rows(summary: Mapping[str, Any]) -> list[Row]:
    """What stands beside them; a name without a heading of ours is shown as it is, at the end."""
    sides = summary.get("extra") or {}
    base, model = sides.get("base", {}), sides.get("model", {})
    rows = []
    for name in sorted(base, key=place_of):
        label, direction = heading_of(name)
        if name in model:
            rows.append(_row(label, direction, base[name], model[name]))
    return rows


def examples_of(samples: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Three questions of each goal, chosen by their place in the order of ids, not by result."""
    by_key = {(s["model"], s["suite"], s["id"]): s for s in samples}
    examples = []
    for goal in GOALS:
        suite = ASKED_AS[goal]
        shared = {key[2] for key in by_key if key[1] == suite and ("model", *key[1:]) in by_key}
        ids = sorted(i for i in shared if ("base", suite, i) in by_key)
        count = min(EXAMPLES, len(ids))
        chosen = [ids[(2 * place + 1) * len(ids) // (2 * count)] for place in range(count)]
        for name in chosen:
            examples.append(
                _example(goal, by_key["base", suite, name], by_key["model", suite, name])
            )
    return examples


def overall_line(summary: Mapping[str, Any]) -> str:
    """Overall and what it is made of."""
    return f"Overall {summary['overall']:+.1f}: {_counted(summary)}"


def terminal_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Both tables for rich."""
    tables = []
    titles = (overall_line(summary), "Beside them, not in Overall")
    for caption, rows in zip(titles, (score_rows(summary), extra_rows(summary)), strict=True):
        if not rows:
            continue
        table = Table(
            title=Text(caption),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title_justify="left",
            title_style="bold",
        )
        table.add_column("score [95% interval]", overflow="fold")
        for name in ("base", "unlearned", "change", "N"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            style = {1: "green", -1: "red"}.get(row.better, "")
            cells = [Text(cell) for cell in (row.label, row.base, row.model, row.change, row.n)]
            cells[3].stylize(style)
            table.add_row(*cells)
        tables.append(table)
    return tables


def markdown_page(
    title: str,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    pictures: Sequence[str],
    settings: str,
) -> str:
    """report.md; pictures are links to files beside it."""
    lines = [f"# {plain(title)}", "", f"**{overall_line(summary)}**", ""]
    lines += [*_markdown_table(score_rows(summary)), ""]
    if summary.get("chance"):
        lines += [str(summary["chance"]), ""]
    lines += ["↑ more is better, ↓ less is better; 95% intervals in brackets.", ""]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    beside = extra_rows(summary)
    if beside:
        lines += ["## Beside them, not in Overall", "", *_markdown_table(beside), "", NOTE, ""]
    lines += ["## Before and after", "", "Chosen by place, not by result.", ""]
    for example in examples_of(samples):
        lines += [f"### {example.goal}: {plain(example.question)}", ""]
        lines += [f"- after the prefix: {plain(example.prefix)}"] if example.prefix else []
        lines += [
            f"- right answer: {plain(example.gold)}",
            f"- base ({example.base_verdict}): {plain(example.base)}",
            f"- unlearned ({example.model_verdict}): {plain(example.model)}",
            "",
        ]
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", settings)), default=0))
    lines += ["## Settings", "", f"{fence}yaml", settings.rstrip(), fence, ""]
    lines += [f"Protocol `{summary['protocol']}`.", ""]
    return "\n".join(lines)


def html_page(
    title: str,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, bytes],
    settings: str,
) -> str:
    """report.html, pictures and style inside, nothing loaded from anywhere."""
    goals: dict[str, list[Example]] = {}
    for example in examples_of(samples):
        goals.setdefault(example.goal, []).append(example)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        title=title,
        counted=_counted(summary),
        value=f"{summary['overall']:+.1f}",
        chance=summary.get("chance"),
        tables=[("Scores", score_rows(summary)), ("Beside them", extra_rows(summary))],
        pictures={
            name.removesuffix(".png"): base64.b64encode(data).decode()
            for name, data in pictures.items()
        },
        goals=goals,
        settings=settings,
        protocol=summary["protocol"],
        note=NOTE,
        shorten=shorten,
    )


def plain(text: str | None) -> str:
    """Text that Markdown shows as it is: one line, marks escaped, cut when long."""
    line = shorten(text)
    return re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", line)


def shorten(text: str | None) -> str:
    """One line of at most LONGEST characters."""
    line = " ".join((text or "").split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _counted(summary: Mapping[str, Any]) -> str:
    counted = [MEANINGS[name] for name in DIRECTIONS if name in summary["model"]]
    left_out = [MEANINGS[name] for name in summary.get("left_out") or ()]
    missing = f"; not scored: {', '.join(left_out)}" if left_out else ""
    return f"points for the better, summed over {', '.join(counted)}{missing}."


def _row(label: str, direction: int, base: Mapping[str, Any], model: Mapping[str, Any]) -> Row:
    change = model["value"] - base["value"]
    moved = 0 if abs(change) < 0.05 else (1 if change > 0 else -1)
    counts = [str(base["n"])] + ([str(model["n"])] if model["n"] != base["n"] else [])
    return Row(
        label=f"{label} {ARROWS[direction]}".strip(),
        base=_figure(base),
        model=_figure(model),
        change=f"{change:+.1f}" if moved else "0.0",
        n=" → ".join(counts),
        better=moved * direction,
    )


def _figure(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.1f} [{score['low']:.1f}–{score['high']:.1f}]"


def _example(goal: Goal, base: Mapping[str, Any], model: Mapping[str, Any]) -> Example:
    return Example(
        goal=goal,
        id=base["id"],
        question=base["question"],
        prefix=base["prefix"],
        gold=" / ".join(base["gold"]),
        base=base["generation"] or "(nothing)",
        model=model["generation"] or "(nothing)",
        base_verdict=_verdict(goal, base),
        model_verdict=_verdict(goal, model),
    )


def _verdict(goal: Goal, sample: Mapping[str, Any]) -> str:
    if goal == "attack":
        if sample["score"] is None:
            return "attack not judged"
        return "attack succeeded" if sample["score"] else "attack failed"
    words = [f"recall {sample['score']:.0f}"]
    return ", ".join([*words, *(["refused"] if sample["refused"] else [])])


def _markdown_table(rows: Sequence[Row]) -> list[str]:
    head = ["| score | base | unlearned | change | N |", "|---|---:|---:|---:|---:|"]
    return head + [f"| {r.label} | {r.base} | {r.model} | {r.change} | {r.n} |" for r in rows]
