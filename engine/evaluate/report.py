"""Evaluations on disk, and the report that people read: report.md, report.html and two pictures.

An evaluation is stored with the hash of its protocol and of the weights it scored, so that a base
is scored once and figures of different protocols are never set side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from unteach.engine.errors import InputError
from unteach.engine.evaluate.page import html_page, markdown_page, terminal_tables
from unteach.engine.evaluate.pictures import draw_loss, draw_radar
from unteach.engine.evaluate.scores import DIRECTIONS, Score, chance_note, overall
from unteach.engine.evaluate.suites import Evaluation, Sample
from unteach.engine.files import write_atomic, write_json
from unteach.engine.progress import say

Role = Literal["base", "model"]
Summary = dict[str, Any]


def write_evaluation(
    run_folder: Path, evaluation: Evaluation, role: Role, protocol: str, weights: str
) -> None:
    """Store one model's evaluation; `write_summary` joins it with the other one.

    Args:
        protocol: from `protocol_hash`.
        weights: fingerprint of the weights that were scored.
    """
    folder = run_folder / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / f"{role}.json",
        {
            "protocol": protocol,
            "weights": weights,
            "scores": {name: asdict(score) for name, score in evaluation.scores.items()},
            "extra": {name: asdict(score) for name, score in evaluation.extra.items()},
            "samples": evaluation.samples,
        },
    )
    for name in ("summary.json", "samples.jsonl"):  # of what was stored before
        (folder / name).unlink(missing_ok=True)


def cached_evaluation(
    run_folder: Path, role: Role, protocol: str, weights: str
) -> Evaluation | None:
    """The stored evaluation of these very weights under this protocol, or None."""
    path = run_folder / "evaluation" / f"{role}.json"
    if not path.is_file():
        return None
    stored = _stored(path)
    if (stored["protocol"], stored["weights"]) != (protocol, weights):
        return None
    scores, extra = _scores(stored["scores"]), _scores(stored["extra"])
    return Evaluation(scores, extra, stored["samples"])


def check_scored(run_folder: Path, weights: str) -> None:
    """Refuse to report scores of a model beside the weights of another.

    Raises:
        InputError: the model was trained again since it was scored.
    """
    path = run_folder / "evaluation" / "model.json"
    if path.is_file() and _stored(path)["weights"] != weights:
        raise InputError(
            f"{run_folder / 'model'} is not the model that was scored: `unteach evaluate` scores "
            "it, then report."
        )


def write_summary(run_folder: Path) -> Summary:
    """Join both evaluations into summary.json and samples.jsonl.

    Raises:
        InputError: one is missing, or they were made by different protocols.
    """
    folder = run_folder / "evaluation"
    base, model = _stored(folder / "base.json"), _stored(folder / "model.json")
    if base["protocol"] != model["protocol"]:
        raise InputError(
            f"Base and model in {folder} were evaluated by different protocols "
            f"({base['protocol'][:12]} and {model['protocol'][:12]}): evaluate both again."
        )
    base_scores = _scores(base["scores"])
    total = overall(_scores(model["scores"]), base_scores)
    summary: Summary = {
        "protocol": base["protocol"],
        "base": base["scores"],
        "model": model["scores"],
        "overall": total.value,
        "left_out": list(total.left_out),
        "chance": chance_note(base_scores),
        "extra": {"base": base["extra"], "model": model["extra"]},
    }
    samples = [
        {"model": role, **sample}
        for role, stored in (("base", base), ("model", model))
        for sample in stored["samples"]
    ]
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(folder / "samples.jsonl", lines.encode())
    write_json(folder / "summary.json", summary)
    return summary


def read_summary(run_folder: Path) -> Summary:
    """A run's summary.json.

    Raises:
        InputError: the run was not evaluated, or the file is no summary.
    """
    path = run_folder / "evaluation" / "summary.json"
    return _read(path, ("protocol", "base", "model", "overall"))


def compare_summaries(summaries: Mapping[str, Summary]) -> list[tuple[str, dict[str, float]]]:
    """Runs by Overall, best first, each with its five scores and `overall`.

    Args:
        summaries: by the name to show.
    Raises:
        InputError: they were made by different protocols; names the first two that differ.
    """
    names = list(summaries)
    for name in names[1:]:
        protocols = [str(summaries[n]["protocol"]) for n in (names[0], name)]
        if protocols[0] != protocols[1]:
            raise InputError(
                f"{names[0]} and {name} were scored by different protocols ({protocols[0][:12]} "
                f"and {protocols[1][:12]}) and cannot be compared: evaluate both with the same "
                "records, MMLU rows, tokenizer and evaluate settings."
            )
    rows = [
        (
            name,
            {s: float(summary["model"][s]["value"]) for s in DIRECTIONS if s in summary["model"]}
            | {"overall": float(summary["overall"])},
        )
        for name, summary in summaries.items()
    ]
    return sorted(rows, key=lambda row: -row[1]["overall"])


def write_report(run_folder: Path) -> Summary:
    """report.md, report.html, radar.png and loss.png from what the run folder holds."""
    summary = write_summary(run_folder)
    samples = read_samples(run_folder)
    steps = read_steps(run_folder / "train.jsonl")
    pictures = {}
    radar = draw_radar(_values(summary["base"]), _values(summary["model"]))
    if radar is not None:
        pictures["radar.png"] = radar
    if steps:
        pictures["loss.png"] = draw_loss(steps)
    for name, data in pictures.items():
        write_atomic(run_folder / name, data)
    config = run_folder / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else ""
    title = f"unteach: {run_folder.resolve().name}"
    markdown = markdown_page(title, summary, samples, list(pictures), settings)
    write_atomic(run_folder / "report.md", markdown.encode())
    html = html_page(title, summary, samples, pictures, settings)
    write_atomic(run_folder / "report.html", html.encode())
    return summary


def read_samples(run_folder: Path) -> list[Sample]:
    """Every sample of evaluation/samples.jsonl, base and model."""
    text = (run_folder / "evaluation" / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Lines of train.jsonl by step; a half-written last line of a killed run is left out."""
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    unread = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            unread += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            steps[row["step"]] = row
    if unread:
        say(f"report: {unread} unreadable line of {path} left out of the training curve")
    return [steps[step] for step in sorted(steps)]


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Scores and what stands beside them, with N and intervals, on the terminal."""
    console = console or Console(highlight=False)
    for table in terminal_tables(summary):
        console.print(table)
    if summary.get("chance"):
        console.print(summary["chance"], markup=False)


def _values(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(score["value"]) for name, score in scores.items()}


def _scores(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    return {name: Score(**score) for name, score in stored.items()}


def _stored(path: Path) -> dict[str, Any]:
    value = _read(path, ("protocol", "weights", "scores", "extra", "samples"))
    for part in ("scores", "extra"):
        for name, score in value[part].items():
            if not _is_score(score):
                raise InputError(
                    f"{path} is damaged (its score {name} is {score!r}): remove it and evaluate "
                    "again."
                )
    return value


def _is_score(value: Any) -> bool:
    """Whether it has the numbers of a `Score`, and nothing else."""
    names = {field.name for field in fields(Score)}
    whole = isinstance(value, dict) and set(value) == names
    return whole and all(isinstance(number, int | float) for number in value.values())


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: run `unteach evaluate` first.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and evaluate again.") from error
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise InputError(f"{path} is no evaluation of this version: remove it and evaluate again.")
    return value
