"""Finished runs become rows, once each, and a table that holds their very figures."""

from __future__ import annotations

import json
from pathlib import Path

from unteach.benchmarks import quality
from unteach.engine.config import Config, dump_config, override


def finished(folder: Path, method: str, seed: int, forget: float) -> Path:
    """A run folder with what evaluation leaves in one."""
    (folder / "evaluation").mkdir(parents=True)
    config = override(Config(), [f"method.name={method}", f"run.seed={seed}"])
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    base = {n: {"value": 90.0, "n": 60, "low": 80.0, "high": 95.0} for n in quality.HEADINGS}
    model = {**base, "forget": {"value": forget, "n": 60, "low": 1.0, "high": 9.0}}
    summary = {"protocol": "p", "base": base, "model": model, "overall": 90 - forget}
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    made = {"commit": "abcdef012345", "device": "cpu", "threads": 2, "versions": {"torch": "2"}}
    (folder / "environment.json").write_text(json.dumps(made), encoding="utf-8")
    return folder


def test_newest_runs_fill_the_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{quality.BEGIN}\nstale\n{quality.END}\nafter\n", encoding="utf-8")
    where = ["--results", str(tmp_path), "--readme", str(readme)]
    first = [finished(tmp_path / "a", "bitopk", 1, 44.4), finished(tmp_path / "b", "sft", 0, 7.0)]
    quality.main([*map(str, first), *where])
    second = [finished(tmp_path / "c", "bitopk", 1, 3.2), finished(tmp_path / "d", "sft", 2, 8.5)]
    quality.main([*map(str, second), *where])
    rows = [json.loads(line) for line in (tmp_path / "quickstart.jsonl").open(encoding="utf-8")]
    assert [(row["method"], row["seed"]) for row in rows] == [("bitopk", 1), ("sft", 0), ("sft", 2)]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| **ours, seed 1** | 3.2 [1.0–9.0] |" in text and "| +86.8 |" in text
    assert "seeds 0, 2 | 7.0 / 8.5 |" in text
    assert "44.4" not in text and "Forget ↓ (N 60)" in text and "`abcdef0`" in text


def test_rows_of_several_protocols_are_named(tmp_path: Path) -> None:
    runs = [("bitopk", 0), ("bitopk", 1), ("sft", 0), ("sft", 1)]
    rows = [quality.read_run(finished(tmp_path / f"{m}{s}", m, s, 4.0)) for m, s in runs]
    assert "protocol" not in quality.block(rows).replace(quality.DISCLOSURE, "")
    for row, protocol in zip(
        rows, ("aaaaaaaaa", "bbbbbbbbb", "bbbbbbbbb", "bbbbbbbbb"), strict=True
    ):
        row["protocol"] = protocol
    told = "2 protocols, so only rows of one may be set against each other without reserve: "
    groups = "`aaaaaaa` ours of seed 0; `bbbbbbb` ours of seed 1 and `sft` of seed 0, 1."
    assert f"{told}{groups}" in quality.block(rows)
