"""From a finished `unteach study` to docs/results: its rows, its picture, a table in the text.

python -m unteach.benchmarks.study runs/wizards --name wizards
python -m unteach.benchmarks.study runs/wizards --name wizards --split test
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unteach.benchmarks.figures import rewrite
from unteach.benchmarks.ranking import DOCS, cell
from unteach.engine.evaluate.headings import ARROWS, heading_of
from unteach.engine.evaluate.levels import differences
from unteach.engine.evaluate.paired import Difference
from unteach.engine.evaluate.ranking import HEADINGS
from unteach.engine.evaluate.stress_tables import stress_differences, stresses_of

Row = dict[str, Any]


def block(study: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """Markdown: a line a level, the default's once, and by how much each is ahead of it.

    Args:
        study: content of study.json.
        rows: lines of rows.jsonl by their `inputs`.
    """
    apart = differences(study)
    trials = [rows[i] for i in _inputs(study)]
    scores = [name for name in HEADINGS if name in trials[0]["scores"]]
    heads = " | ".join(HEADINGS[name] for name in scores)
    lines = [
        f"| factor | level | seeds | {heads} | Overall ↑ | against the default |",
        "| --- | --- | ---: |" + " ---: |" * (len(scores) + 2),
    ]
    entries = list(study.items())
    first = entries[0][1]
    lines.append(_line("", "the recipe as it is", first["levels"][first["default"]], rows, scores))
    for name, entry in entries:
        for label, level in entry["levels"].items():
            if label != entry["default"]:
                gap = apart.get(name, {}).get(label, "not known")
                lines.append(_line(name, label, level, rows, scores, str(gap)))
    counts = ", ".join(f"{HEADINGS[n]} {trials[0]['scores'][n]['n']}" for n in scores)
    lines += [
        "",
        f"Split `{trials[0]['split']}`; N: {counts}. Differences: 95% interval by 10,000 paired "
        "draws of questions and seeds.",
    ]
    return "\n".join([*lines, *stress_block(study, rows)])


def stress_block(study: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    """Markdown: a line a level, a column a stress, with what it is better by than the default.

    Empty where the default was put under none.
    """
    first = next(iter(study.values()))
    own = [rows[i] for i in first["levels"][first["default"]]["trials"]]
    stresses = [n for n in stresses_of(r.get("extra", {}) for r in own) if "held_out" not in n]
    if not stresses:
        return []
    heads = [f"{words} {ARROWS[sign]}" for words, sign in map(heading_of, stresses)]
    lines = ["", f"| factor | level | {' | '.join(heads)} |"]
    lines.append("| --- | --- |" + " ---: |" * len(heads))
    levels = {("", "the recipe as it is"): own}
    for name, entry in study.items():
        for label, level in entry["levels"].items():
            if label != entry["default"]:
                levels[name, label] = [rows[i] for i in level["trials"]]
    for (name, label), trials in levels.items():
        apart = {} if trials is own else _apart(trials, own)
        cells = []
        for stress in stresses:
            found = [
                trial["extra"][stress]["value"] for trial in trials if stress in trial["extra"]
            ]
            gap = f" ({apart[stress]})" if stress in apart else ""
            cells.append(cell(found) + gap if found else "—")
        lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    counts = ", ".join(
        f"{h} {own[0]['extra'][n]['n']}" for h, n in zip(heads, stresses, strict=True)
    )
    return [*lines, "", f"N: {counts}. In brackets, better than the recipe by, in points."]


def _apart(trials: Sequence[Row], own: Sequence[Row]) -> dict[str, Difference]:
    first, second = ({t["seed"]: t["questions"] for t in side} for side in (trials, own))
    return stress_differences(first, second)


def _line(
    factor: str,
    label: str,
    level: Row,
    rows: Mapping[str, Row],
    scores: Sequence[str],
    gap: str = "",
) -> str:
    trials = [rows[inputs] for inputs in level["trials"]]
    values = [[trial["scores"][name]["value"] for trial in trials] for name in scores]
    cells = [cell(each) for each in (*values, [trial["overall"] for trial in trials])]
    return f"| {factor} | {label} | {len(trials)} | {' | '.join(cells)} | {gap} |"


def _inputs(study: Mapping[str, Any]) -> list[str]:
    """Which trials the study is made of, each once, in its order."""
    levels = (level for entry in study.values() for level in entry["levels"].values())
    return list(dict.fromkeys(inputs for level in levels for inputs in level["trials"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Take a study in: rows and picture into docs/results, the table into docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of `unteach study`")
    parser.add_argument("--name", required=True, help="of the benchmark, in names of files")
    parser.add_argument("--split", choices=("tune", "test"), default="tune")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(argv)
    source, folder = options.run / "study", options.docs / "results"
    stem = "study" if options.split == "tune" else "study-test"
    if not (source / f"{stem}.json").is_file():
        parser.error(
            f"{options.run} holds no finished study on split {options.split}: run `unteach study` "
            "there first."
        )
    study = json.loads((source / f"{stem}.json").read_text(encoding="utf-8"))
    lines = (source / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["inputs"]: row for row in map(json.loads, lines)}
    folder.mkdir(parents=True, exist_ok=True)
    kept = "".join(json.dumps(rows[inputs]) + "\n" for inputs in _inputs(study))
    (folder / f"{options.name}-{stem}.jsonl").write_text(kept, encoding="utf-8")
    if (source / f"{stem}.png").is_file():
        shutil.copyfile(source / f"{stem}.png", folder / f"{options.name}-{stem}.png")
    begin, end = (f"<!-- {mark}{stem}:{options.name} -->" for mark in ("", "/"))
    rewrite(options.docs / "results.md", block(study, rows), begin, end)
    print(f"{len(study)} factors in {folder / options.name}-{stem}.jsonl")


if __name__ == "__main__":
    main()
