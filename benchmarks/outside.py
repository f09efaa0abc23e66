r"""How far a refusal reaches: questions of public sets that no training saw.

The topic's questions should be refused, all others answered or at least not refused; what the model
says instead is not judged, because nobody taught it these facts. Beside the shares stands the AUC:
how often a question of the topic makes the refusal likelier than one of another set, which does
not depend on where a method draws its line.

    python -m unteach.benchmarks.outside FOLDER base=runs/wizards/target/model \
        ours=runs/wizards/model --seen recipes/data/wizards.jsonl recipes/data/open_questions.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unteach.benchmarks.figures import read_rows
from unteach.benchmarks.harness import RESULTS, append_rows
from unteach.engine.config import ModelConfig, TeacherConfig
from unteach.engine.data.answers import is_refusal
from unteach.engine.data.records import Record, normalized, read_records
from unteach.engine.data.sampler import evenly_spaced
from unteach.engine.evaluate.reach import refusal_logps, short_answers
from unteach.engine.evaluate.scores import Score, auc, share
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.model import load_model, load_tokenizer

REFUSAL = TeacherConfig().refusal
TOPIC = "Harry Potter"
# Domains of the neighbours' trivia as their file has them, and as people write them.
DOMAINS = {
    "lord_of_the_rings": "Lord of the Rings",
    "british_mythology": "British myth",
    "dungeons_and_dragons": "Dungeons & Dragons",
    "wizard_of_oz": "Oz",
}
MOST = 400  # questions of a set, evenly spaced where there are more


def public_questions(folder: Path, seen: Collection[str] = ()) -> dict[str, list[str]]:
    """Questions by set: the topic, each neighbour domain, general ones.

    Args:
        seen: normalised questions that are left out.
    """
    found = {TOPIC: _questions(folder / "hp_trivia" / "forget_train.jsonl")}
    for row in read_rows(folder / "hp_trivia" / "neighbor.jsonl"):
        domain = str(row["domain"])
        found.setdefault(DOMAINS.get(domain, domain), []).append(row["question"])
    found["Natural Questions"] = _questions(folder / "nq_open" / "dev_sample800.jsonl")
    found["world facts"] = _questions(folder / "tofu" / "world_facts.jsonl")
    found["real authors"] = _questions(folder / "tofu" / "real_authors.jsonl")
    unseen = {n: [q for q in each if normalized(q) not in seen] for n, each in found.items()}
    return {name: evenly_spaced(questions, MOST) for name, questions in unseen.items()}


def reach(
    path: str, sets: Mapping[str, Sequence[str]], device: torch.device | None = None
) -> dict[str, Any]:
    """Of each set the share refused, and how well it can be told from the topic."""
    config = ModelConfig(path=path)
    tokenizer, model = load_tokenizer(path, config), load_model(path, config, device=device)
    refused: dict[str, Score] = {}
    likely: dict[str, list[float]] = {}
    for name, questions in sets.items():
        asked = [Record(id=q, goal="general", question=q) for q in questions]
        answers = short_answers(model, tokenizer, asked, EvaluateConfig(batch_size=48))
        refused[name] = share([is_refusal(answer) for answer in answers])
        likely[name] = refusal_logps(model, tokenizer, asked, REFUSAL)
    others = {name: values for name, values in likely.items() if name != TOPIC}
    return {
        "refused": {name: asdict(score) for name, score in refused.items()},
        "auc": {name: asdict(auc(likely[TOPIC], values)) for name, values in others.items()},
        "auc_all": asdict(auc(likely[TOPIC], [v for each in others.values() for v in each])),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each model, refused share and AUC for each set."""
    names = list(rows[0]["refused"])
    cell = "{value:.1f} [{low:.1f}–{high:.1f}]".format_map
    heads = [f"{n} (N {rows[0]['refused'][n]['n']}) {'↑' if n == TOPIC else '↓'}" for n in names]
    lines = [f"| refused, % | {' | '.join(heads)} | AUC ↑ |"]
    lines.append("| --- |" + " ---: |" * (len(names) + 1))
    for row in rows:
        cells = [cell(row["refused"][name]) for name in names]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {cell(row['auc_all'])} |")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A line for each model: how much of each set it refuses, the topic furthest right at best."""
    rows = list({row["name"]: row for row in rows}.values())
    names = [name for name in rows[0]["refused"] if name != TOPIC]
    figure = Figure(figsize=(9, 1.8 + 0.42 * len(rows)), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    places = range(len(rows), 0, -1)
    for name, marker in zip([*names, TOPIC], "s^vDPX<>"[: len(names)] + "o", strict=True):
        values = [row["refused"][name]["value"] for row in rows]
        topic = name == TOPIC
        style: dict[str, Any] = {"color": "#0072B2"} if topic else {"facecolor": "none"}
        if not topic:
            style["edgecolor"] = "#D55E00" if name == "Natural Questions" else "#555555"
        axes.scatter(
            values,
            places,
            marker=marker,
            s=70 if topic else 40,
            label=f"{name} {'↑' if topic else '↓'}",
            **style,
        )
    labels = [f"{row['name']}   AUC {row['auc_all']['value']:.1f}" for row in rows]
    axes.set_yticks(list(places), labels)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("refused, % (the topic should be, the others should not)")
    # of the figure, so that long names beside the axes push no part of it out
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _questions(path: Path) -> list[str]:
    return [row["question"] for row in read_rows(path)]


def main() -> None:
    """Ask every model every question; print the table, append the rows and draw them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds hp_trivia/, nq_open/ and tofu/")
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of an exported model")
    parser.add_argument(
        "--seen", type=Path, nargs="+", default=[], help="records whose questions are left out"
    )
    parser.add_argument("--rows", type=Path, default=RESULTS / "outside.jsonl", help="added to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    models = dict(model.partition("=")[::2] for model in options.models)
    for name, path in models.items():
        if not (Path(path) / "config.json").is_file():
            parser.error(f"{name}={path}: give NAME=FOLDER, the folder of an exported model.")
    sets = public_questions(
        options.folder,
        {normalized(r.question) for file in options.seen for r in read_records(file)},
    )
    for name, questions in sets.items():
        if not questions:
            parser.error(f"{options.folder} has no questions of {name}.")
    rows = []
    for name, path in models.items():
        rows.append({"name": name, **reach(path, sets, device)})
        append_rows(options.rows.stem, rows[-1:], device, options.rows.parent)
    print(table(rows))
    image = options.rows.with_suffix(".png")
    FigureCanvasAgg(picture(read_rows(options.rows))).print_png(image, metadata={"Software": None})
    print(f"rows: {options.rows}, picture: {image}")


if __name__ == "__main__":
    main()
