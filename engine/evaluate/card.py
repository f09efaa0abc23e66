"""The model card of an exported model: where it comes from, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unteach.engine.config import Config
from unteach.engine.files import write_atomic
from unteach.engine.train.methods import find_method

CARD = """---
library_name: transformers
tags: [unlearning, unteach]
---

# An unlearned model

Made from `{base}` by unteach, method `{method}` ({summary}): it was trained {trained}.
What a model no longer says is not deleted: do not rely on it alone where a leak would do harm.

| score | base | this model | n |
| --- | --- | --- | --- |
{rows}

Overall (sum of signed changes, percentage points): {overall:.1f}. Protocol `{protocol}`.
"""


def write_model_card(folder: Path, config: Config, summary: Mapping[str, Any]) -> None:
    """Write README.md into a model folder.

    Args:
        summary: as in evaluation/summary.json.
    """
    rows = [
        f"| {name} | {_cell(summary['base'][name])} | {_cell(score)} | {score['n']} |"
        for name, score in summary["model"].items()
        if name in summary["base"]
    ]
    text = CARD.format(
        base=config.model.path,
        method=config.method.name,
        summary=find_method(config.method.name).summary,
        trained=what_was_trained(config),
        rows="\n".join(rows),
        overall=summary["overall"],
        protocol=str(summary["protocol"])[:12],
    )
    write_atomic(folder / "README.md", text.encode())


def what_was_trained(config: Config) -> str:
    """What the method did with each goal that it was given records of."""
    method = find_method(config.method.name)
    goals = [goal for goal in method.goals if config.data.mix.get(goal, 0)]
    # Nobody asks for gold answers to forget but a method that pushes them away.
    pushed = method.fixes("forget") and "gold" in method.sources("forget", config.teacher)
    refused = "refusal" in method.sources("forget", config.teacher) or not pushed
    done = ["away from its answers on one topic"] if pushed else []
    done += ["to refuse one topic"] if refused else []
    done += ["to answer beside it"] if {"general", "neighbor"} & set(goals) else []
    done += ["to do the same behind attack prefixes"] if "attack" in goals else []
    return ", ".join(done[:-1]) + " and " + done[-1] if len(done) > 1 else done[0]


def _cell(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f})"
