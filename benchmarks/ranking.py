"""From a finished `unteach compare` to docs/results: its rows, its pictures, a table in the texts.

In docs/results.md each cell stands beside the paper's own figure (arXiv 2604.15482, Tables 1 and 2:
MUSE-Books, Llama-3.2-3B-Instruct), where the paper has that row. Model and questions differ, so
what can be compared is the order and the signs, not the values.

    python -m unteach.benchmarks.ranking runs/wizards --name wizards
    python -m unteach.benchmarks.ranking runs/wizards runs/more "Ours with a gate=runs/gated" \
        --name wizards

Several folders are one ranking that was made in parts, or on several machines. A folder behind a
label holds one row, another variant of a method: it stands in the table by that label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unteach.benchmarks.figures import README, rewrite
from unteach.engine.errors import InputError
from unteach.engine.evaluate.headings import is_stress
from unteach.engine.evaluate.ranking import (
    ABLATION,
    GROUPS,
    HEADINGS,
    NAMES,
    Ranked,
    Trial,
    against_ours,
    draw_pictures,
    stresses_against_ours,
)
from unteach.engine.evaluate.scores import seed_interval
from unteach.engine.evaluate.stress_tables import free_answers, robustness, stress_table

DOCS = README.parent / "docs"
# Forget, General, Neighbor, ASR, MMLU, Overall.
PAPER = {
    "base": (32.1, 84.3, 57.28, 70.5, 60.8, 0.0),
    "oracle": (2.1, 80.1, 58.5, 6.7, 60.7, 90.72),
    "ensemble": (6.2, 60.9, 26.8, 13.5, 60.3, 28.52),
    "duet": (3.2, 71.3, 26.8, 39.5, 49.9, 5.52),
    "sft": (0.3, 49.6, 50.7, 1.5, 50.2, 48.92),
    "ga": (36.9, 85.0, 55.9, 70.0, 36.45, -29.33),
    "simnpo": (21.4, 43.1, 57.7, 70.5, 60.40, -30.48),
    "flat": (0.7, 58.3, 42.7, 39.0, 58.92, 20.44),
    "ngdiff": (13.6, 83.3, 37.7, 17.9, 60.8, 50.52),
    "mollm": (19.9, 83.6, 57.4, 69.2, 60.8, 12.92),
    "eq3": (2.7, 78.1, 58.5, 12.5, 59.2, 80.82),
    "duet-loss": (3.19, 74.0, 57.6, 12.5, 58.2, 74.33),
    "bild-loss": (3.9, 82.3, 56.3, 23.5, 58.3, 69.72),
}
Row = dict[str, Any]


def block(ranking: Row, *, paper: bool = True) -> str:
    """Markdown: the layout of Table 1, and what each row is worth.

    Args:
        paper: every cell as `here (paper)`.
    """
    base, rows = ranking["base"], {row["name"]: row for row in ranking["rows"]}
    scores = [name for name in HEADINGS if name in base["scores"]]
    counts = ", ".join(f"{HEADINGS[n]} {base['scores'][n]['n']}" for n in scores)
    lines = [
        f"| kind | row | seeds | {' | '.join(HEADINGS[n] for n in scores)} | Overall ↑ "
        "| against ours |",
        "| --- | --- | ---: |" + " ---: |" * (len(scores) + 2),
        f"| | Base | | {' | '.join(_base_cells(base, scores, paper))} | 0.0 | |",
    ]
    kinds = {name: kind for kind, names in GROUPS.items() for name in names}
    order = [*(n for names in GROUPS.values() for n in names), *ABLATION, *rows]
    for name in dict.fromkeys(order):
        if name in rows:
            lines.append(_line(rows[name], kinds.get(name, "ablation"), scores, paper))
    lines += [
        "",
        ("In brackets the paper's figure. " if paper else "")
        + f"N: {counts}. ± is half of Student's 95% interval over seeds; `against ours` is the "
        "paired difference in Overall with its 95% interval. " + _tuning(ranking),
    ]
    return "\n".join(lines)


def robustness_block(ranking: Row) -> str:
    """Markdown: a line for each stress, a column for the base and each row that has it."""
    apart = {
        NAMES.get(row["name"], row["name"]): row.get("stresses_against_ours") or {}
        for row in ranking["rows"]
    }
    lines = robustness(_extras(ranking))
    return "\n".join([*lines, *stress_table({name: each for name, each in apart.items() if each})])


def free_block(ranking: Row) -> str:
    """Markdown: what the base and each row say where no options are given; may be empty."""
    return "\n".join(free_answers(_extras(ranking)))


def _extras(ranking: Row) -> dict[str, list[dict[str, Any]]]:
    """What stands beside the scores of the base and of each row, one a seed."""
    rows = {
        NAMES.get(row["name"], row["name"]): [trial["extra"] for trial in row["trials"]]
        for row in ranking["rows"]
    }
    return {"Base": [ranking["base"]["extra"]], **rows}


def _line(row: Row, kind: str, scores: Sequence[str], paper: bool) -> str:
    theirs = PAPER.get(row["name"], ()) if paper else ()
    beside = dict(zip((*HEADINGS, "overall"), theirs, strict=False))
    values = {
        **{n: [trial["scores"][n]["value"] for trial in row["trials"]] for n in scores},
        "overall": [trial["overall"] for trial in row["trials"]],
    }
    cells = [cell(values[name], beside.get(name)) for name in (*scores, "overall")]
    apart = row["against_ours"]
    against = "" if apart is None else "{value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**apart)
    name, trials = NAMES.get(row["name"], row["name"]), len(row["trials"])
    seeds = "" if row["trials"][0]["seed"] is None else str(trials)
    return f"| {kind} | {name} | {seeds} | {' | '.join(cells)} | {against} |"


def _base_cells(base: Row, scores: Sequence[str], paper: bool) -> list[str]:
    beside = dict(zip(HEADINGS, PAPER["base"] if paper else (), strict=False))
    return [cell([base["scores"][name]["value"]], beside.get(name)) for name in scores]


def cell(values: Sequence[float], paper: float | None = None) -> str:
    """A mean, ± half of its 95% interval over seeds where there are several (the paper's)."""
    mean, half = seed_interval(values)
    text = f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"
    return text if paper is None else f"{text} ({paper:.1f})"


def _tuning(ranking: Row) -> str:
    tuning = ranking["tuning"]
    if tuning is None:
        return "Learning rates were given, not chosen."
    given = ", ".join(NAMES.get(name, name) for name in ranking.get("given", ()))
    which = "Each row's learning rate"
    if given:
        which = f"Every learning rate but those of {given}, which were given,"
    return (
        f"{which} was chosen by Overall on {tuning['questions']} questions of "
        f"split `{tuning['split']}`, the same rates for all, one seed; more where rates led alike."
    )


def joined(rankings: Sequence[tuple[str, Row]]) -> Row:
    """One ranking of several of the same protocol and base, each difference taken anew.

    Args:
        rankings: a label for the only row or "", and the content of a ranking.json.
    Returns:
        As a ranking.json, and `given`: rows whose rates were given while others' were chosen.
    Raises:
        InputError: other questions or another base, a label for several rows, or a row twice.
    """
    first, rows, chosen = rankings[0][1], dict[str, Row](), set[str]()
    for label, ranking in rankings:
        if any(ranking["base"][key] != first["base"][key] for key in ("protocol", "scores")):
            raise InputError("The rankings are of other questions or of another base: join none.")
        if label and len(ranking["rows"]) != 1:
            raise InputError(f"The ranking {label} has several rows: a label names a single one.")
        for row in ranking["rows"]:
            name = label or row["name"]
            if name in rows and row["trials"] != rows[name]["trials"]:
                raise InputError(f"Two rankings have a row {name}: name one by LABEL=FOLDER.")
            rows[name] = {**row, "name": name}
            chosen |= {name} if ranking["tuning"] else set()
    ranked = {name: _ranked(row) for name, row in rows.items()}
    against, stressed = against_ours(ranked), stresses_against_ours(ranked)
    for name, row in rows.items():
        row["against_ours"] = asdict(against[name]) if name in against else None
        row["stresses_against_ours"] = {n: asdict(a) for n, a in stressed.get(name, {}).items()}
    tuned = [ranking["tuning"] for _, ranking in rankings if ranking["tuning"]]
    return {
        **first,
        "base": _joined_base([ranking["base"] for _, ranking in rankings]),
        "tuning": tuned[0] if tuned else None,
        "given": [n for n in rows if n not in chosen and rows[n]["trials"][0]["lr"] is not None],
        "rows": [*rows.values()],
    }


def _joined_base(bases: Sequence[Row]) -> Row:
    """The base with what any of the rankings measured of it beside the scores.

    Raises:
        InputError: two measured the same and found something else.
    """
    whole = {**bases[0], "extra": {}, "questions": {}}
    for base in bases:
        for part in ("extra", "questions"):
            for name, found in base[part].items():
                if whole[part].setdefault(name, found) != found:
                    raise InputError(f"The bases of the rankings differ in {name}: join none.")
    return whole


def _ranked(row: Row) -> Ranked:
    trials = tuple(Trial(**trial) for trial in row["trials"])
    return Ranked(row["name"], trials, {float(lr): v for lr, v in row["tried"].items()})


def main(argv: Sequence[str] | None = None) -> None:
    """Take a ranking in: rows and pictures into docs/results, the table into the texts with its
    markers.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="[LABEL=]run folder of `unteach compare`")
    parser.add_argument("--name", required=True, help="of the benchmark, in names of files")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    folder, rankings, lines = options.docs / "results", [], list[str]()
    for run in options.runs:
        label, _, path = run.rpartition("=")
        source = Path(path) / "compare"
        if not (source / "ranking.json").is_file():
            parser.error(f"{path} holds no finished ranking: run `unteach compare` there first.")
        text = (source / "ranking.json").read_text(encoding="utf-8")
        rankings.append((label, json.loads(text)))
        lines += (source / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        ranking = joined(rankings)
    except InputError as error:
        parser.error(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    each_once = "".join(dict.fromkeys(lines))
    (folder / f"{options.name}.jsonl").write_text(each_once, encoding="utf-8")
    rows = {row["name"]: _ranked(row) for row in ranking["rows"]}
    for picture, data in draw_pictures(Trial(**ranking["base"]), rows).items():
        (folder / f"{options.name}-{picture}").write_bytes(data)
    blocks = {"ranking": (block(ranking), block(ranking, paper=False))}
    if any(map(is_stress, ranking["base"]["extra"])):
        blocks["robustness"] = (robustness_block(ranking),) * 2
    if said := free_block(ranking):
        blocks["free"] = (said, said)
    for kind, (in_docs, in_readme) in blocks.items():
        begin, end = (f"<!-- {mark}{kind}:{options.name} -->" for mark in ("", "/"))
        rewrite(options.docs / "results.md", in_docs, begin, end)
        if begin in options.readme.read_text(encoding="utf-8"):
            rewrite(options.readme, in_readme, begin, end)
    print(f"{len(rows)} rows in {folder / options.name}.jsonl")


if __name__ == "__main__":
    main()
