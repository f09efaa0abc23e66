"""The model card of an exported model: where it comes from, and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unteach.engine.config import Config
from unteach.engine.files import write_atomic

CARD = """---
library_name: transformers
tags: [unlearning, unteach]
---

# An unlearned model

Made from `{base}` by unteach, method `{method}`: it was trained to refuse one topic, to answer
beside it, and to refuse under attack prefixes. Refusing is not deleting: do not rely on it alone
where a leak would do harm.

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
        rows="\n".join(rows),
        overall=summary["overall"],
        protocol=str(summary["protocol"])[:12],
    )
    write_atomic(folder / "README.md", text.encode())


def _cell(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f})"
