"""How well a model's own features tell a topic from the rest: a linear probe on each layer.

A student refuses by what it can tell apart. What a line through the hidden states of the model
before unlearning reaches on questions that nobody trained on says how far a method, whatever its
loss, can be expected to come with this model and these questions.

    python -m unteach.benchmarks.probe base=runs/quickstart/target/model \
        --train recipes/data/quickstart.jsonl recipes/data/quickstart_open_questions.jsonl \
        --asked recipes/data/unseen_questions.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unteach.benchmarks.harness import RESULTS, append_rows
from unteach.engine.config import ModelConfig
from unteach.engine.data.records import Record, read_records
from unteach.engine.data.tokens import student_context
from unteach.engine.evaluate.reach import TOPIC, read_unseen
from unteach.engine.evaluate.scores import auc
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    load_model,
    load_tokenizer,
)

# Of the mean squared feature, which is 1. From 0.1 to 10 the best layer's AUC moves by 2 points.
RIDGE = 1.0


@torch.no_grad()
def last_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Tensor:
    """[L + 1, N, D] float64, of each question's last token, where the answer would begin.

    Layer 0 is the embedding, layer i the output of block i, the last one after the final norm.
    """
    rows = []
    for record in records:
        tokens = torch.tensor([student_context(tokenizer, record)], device=model.device)
        states = model(tokens, output_hidden_states=True, logits_to_keep=1).hidden_states
        rows.append(torch.stack([state_BTD[0, -1] for state_BTD in states]).double())
    return torch.stack(rows, dim=1)


def ridge_probe(train_ND: Tensor, topic_N: Tensor, asked_MD: Tensor) -> Tensor:
    """[M]: how much each asked row looks like the topic, by least squares on ±1.

    Both sides weigh alike however many rows they have, and every feature is standardised:
    w = (Zᵀ diag(c) Z + λ I)⁻¹ Zᵀ (c ⊙ y), c = 1 / (rows of the own side).

    Args:
        train_ND: float64 features of the training questions.
        topic_N: bool, whether a training question is of the topic; both sides must have some.
    """
    mean_D, spread_D = train_ND.mean(0), train_ND.std(0).clamp_min(1e-6)
    z_ND, y_N = (train_ND - mean_D) / spread_D, topic_N.double() * 2 - 1
    share_N = torch.where(topic_N, 1 / topic_N.sum(), 1 / (~topic_N).sum()).double()
    gram_DD = (z_ND * share_N[:, None]).T @ z_ND
    ridge_DD = RIDGE * torch.eye(len(gram_DD), dtype=torch.float64)
    w_D = torch.linalg.solve(gram_DD + ridge_DD, z_ND.T @ (share_N * y_N))
    looks_M: Tensor = (asked_MD - mean_D) / spread_D @ w_D
    return looks_M


def probe(
    path: str, train: Sequence[Record], asked: Sequence[Record], device: torch.device | None = None
) -> dict[str, Any]:
    """The layer that tells the asked questions best, and what each reaches.

    The best of many layers on the asked questions themselves is chosen in sight of them, so it errs
    upwards: an upper figure for a line through these features.
    """
    config = ModelConfig(path=path)
    tokenizer, model = load_tokenizer(path, config), load_model(path, config, device=device)
    topic_N = torch.tensor([record.goal in TOPIC for record in train])
    train_LND = last_states(model, tokenizer, train).cpu()
    asked_LMD = last_states(model, tokenizer, asked).cpu()
    layers = []
    for train_ND, asked_MD in zip(train_LND, asked_LMD, strict=True):
        looks = list(zip(asked, ridge_probe(train_ND, topic_N, asked_MD).tolist(), strict=True))
        topic = [value for record, value in looks if record.goal in TOPIC]
        sides = {"all": ("general", "neighbor"), "general": ("general",), "neighbor": ("neighbor",)}
        layers.append(
            {
                name: asdict(auc(topic, [value for record, value in looks if record.goal in goals]))
                for name, goals in sides.items()
                if any(record.goal in goals for record in asked)
            }
        )
    best = max(range(len(layers)), key=lambda index: layers[index]["all"]["value"])
    return {"questions": len(train), "layer": best, "auc": layers[best], "layers": layers}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each model, the best layer's AUC against every side."""
    sides = list(rows[0]["auc"])
    lines = [f"| AUC ↑ | questions | layer | {' | '.join(sides)} |"]
    lines.append("| --- |" + " ---: |" * (2 + len(sides)))
    for row in rows:
        cells = ["{value:.1f} [{low:.1f}–{high:.1f}]".format_map(row["auc"][s]) for s in sides]
        start = f"| {row['name']} | {row['questions']} | {row['layer']} |"
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Probe every model with the same questions; print the table, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of an exported model")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="records to fit on")
    parser.add_argument("--asked", required=True, help="questions that none of them asks")
    parser.add_argument("--rows", type=Path, default=RESULTS / "probe.jsonl", help="added to")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    train = [
        record
        for file in options.train
        for record in read_records(file)
        if record.split == "train" and record.form == "qa" and record.prefix is None
    ]
    asked = read_unseen(options.asked, train)
    rows = []
    for name, path in (model.partition("=")[::2] for model in options.models):
        if not (Path(path) / "config.json").is_file():
            parser.error(f"{name}={path}: give NAME=FOLDER, the folder of an exported model.")
        rows.append({"name": name, **probe(path, train, asked, device)})
        append_rows(options.rows.stem, rows[-1:], device, options.rows.parent)
    print(table(rows))


if __name__ == "__main__":
    main()
