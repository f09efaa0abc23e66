"""Public benchmark figures by lm-eval, of the exported model: an extra, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from unteach.engine.errors import InputError
from unteach.engine.evaluate.scores import Z_95, Score

METRIC, ERROR = "acc,none", "acc_stderr,none"


def check_harness(tasks: str) -> None:
    """Refuse before anything is scored.

    Raises:
        InputError: lm-eval is not installed, or no task is named.
    """
    if not [task for task in tasks.split(",") if task.strip()]:
        raise InputError("--lm-eval names no task: write their names parted by commas.")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--lm-eval needs lm-eval: pip install 'unteach[lm-eval]'.")


def harness_scores(
    model: Path, tasks: str, *, batch_size: int, device: str, include: Path | None = None
) -> dict[str, Score]:
    """Accuracy of every task and group of tasks, in points; lm-eval's own standard error times z.

    Args:
        model: folder of an exported model; evaluated in float32, no chat template.
        tasks: names, parted by commas.
        include: folder with task files of one's own.
    Raises:
        InputError: lm-eval fails; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
        command += ["--model_args", f"pretrained={model},dtype=float32"]
        command += ["--tasks", tasks, "--batch_size", str(batch_size), "--device", device]
        command += ["--output_path", folder]
        command += ["--include_path", str(include)] if include else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = sorted(Path(folder).rglob("results_*.json"))
        if done.returncode or not files:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise InputError(f"lm-eval could not score {tasks} ({lines[-1].strip()}).")
        results = json.loads(files[-1].read_text(encoding="utf-8"))
    return scores_of(results)


def scores_of(results: dict[str, Any]) -> dict[str, Score]:
    """The accuracies of an lm-eval result file; tasks that report none are left out."""
    counts = {name: n["effective"] for name, n in results.get("n-samples", {}).items()}
    groups = results.get("group_subtasks", {})

    def rows(name: str) -> int:
        return counts.get(name) or sum(rows(part) for part in groups.get(name, ()) if part != name)

    scores = {}
    for name, values in results["results"].items():
        if not isinstance(values.get(METRIC), int | float):
            continue
        error = values.get(ERROR)
        half = Z_95 * error if isinstance(error, int | float) else 0.0
        value = values[METRIC]
        low, high = max(value - half, 0.0), min(value + half, 1.0)
        scores[name] = Score(100 * value, rows(name), 100 * low, 100 * high)
    return scores
