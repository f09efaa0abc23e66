"""A finished study reaches the text: the default once, every other level with what it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unteach.benchmarks.study import block, main

HALF = 12.7  # Student's quantile of one degree of freedom · the deviation √2 of 4 and 6 / √2


def row(inputs: str, forget: float, split: str = "tune") -> dict[str, Any]:
    scores = {"forget": {"value": forget, "n": 40}, "general": {"value": 100.0, "n": 40}}
    return {"inputs": inputs, "scores": scores, "overall": 100 - forget, "split": split}


ROWS = {r["inputs"]: r for r in (row("a", 4.0), row("b", 6.0), row("c", 8.0), row("d", 8.0))}
OWN = {"settings": [], "overall": 95.0, "difference": None, "trials": ["a", "b"]}
OTHER = {
    "settings": ["method.k=1"],
    "overall": 92.0,
    "difference": {"value": -3.0, "low": -5.5, "high": -1.0},
    "trials": ["c", "d"],
}
STUDY = {
    "k": {"default": "8", "levels": {"1": OTHER, "8": OWN}},
    "beta": {"default": "4", "levels": {"4": OWN, "1": {**OTHER, "difference": None}}},
}


def test_the_default_stands_once_and_each_level_with_its_difference() -> None:
    lines = block(STUDY, ROWS).splitlines()
    assert lines[0].startswith("| factor | level | seeds | Forget ↓ | General ↑ | Overall ↑ |")
    own = f"5.0 ± {HALF} | 100.0 ± 0.0 | 95.0 ± {HALF}"
    assert lines[2:5] == [
        f"|  | the recipe as it is | 2 | {own} |  |",
        "| k | 1 | 2 | 8.0 ± 0.0 | 100.0 ± 0.0 | 92.0 ± 0.0 | -3.0 [-5.5, -1.0] |",
        "| beta | 1 | 2 | 8.0 ± 0.0 | 100.0 ± 0.0 | 92.0 ± 0.0 | not known |",
    ]
    assert lines[-1].startswith("Split `tune`; N: Forget ↓ 40, General ↑ 40.")


def test_stresses_stand_with_what_each_level_is_better_by() -> None:
    """More of the topic comes back from the level: all four questions against one of four."""

    def stressed(inputs: str, seed: int, came_back: list[float]) -> dict[str, Any]:
        name, value = "relearned_5_forget", sum(came_back) / len(came_back)
        extra = {name: {"value": value, "n": 4}, f"{name}_held_out": {"value": 0.0, "n": 2}}
        return {**row(inputs, 4.0), "seed": seed, "extra": extra, "questions": {name: came_back}}

    own = [stressed("a", 0, [100.0, 0.0, 0.0, 0.0]), stressed("b", 1, [0.0, 100.0, 0.0, 0.0])]
    other = [stressed("c", 0, [100.0] * 4), stressed("d", 1, [100.0] * 4)]
    rows = {r["inputs"]: r for r in (*own, *other)}
    lines = block(STUDY, rows).splitlines()
    assert "| factor | level | Forget, relearned on 5 rows ↓ |" in lines
    assert "|  | the recipe as it is | 25.0 ± 0.0 |" in lines
    (found,) = (line for line in lines if line.startswith("| k | 1 | 100.0"))
    assert found.startswith("| k | 1 | 100.0 ± 0.0 (-75.0 [-100.0, ")
    assert lines[-1].startswith("N: Forget, relearned on 5 rows ↓ 4.")
    unmeasured = {**rows, **{i: {**rows[i], "extra": {}, "questions": {}} for i in ("c", "d")}}
    assert "| k | 1 | — |" in block(STUDY, unmeasured).splitlines()


@pytest.mark.parametrize("split", ["tune", "test"])
def test_rows_picture_and_table_reach_the_docs(tmp_path: Path, split: str) -> None:
    stem = "study" if split == "tune" else "study-test"
    run, docs = tmp_path / "run" / "study", tmp_path / "docs"
    run.mkdir(parents=True)
    docs.mkdir()
    (run / f"{stem}.json").write_text(json.dumps(STUDY))
    rows = [*ROWS.values(), row("of another study", 0.0)]
    (run / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (run / f"{stem}.png").write_bytes(b"png")
    (docs / "results.md").write_text(f"before\n<!-- {stem}:w -->\nold\n<!-- /{stem}:w -->\nafter\n")
    main([str(run.parent), "--name", "w", "--split", split, "--docs", str(docs)])
    page = (docs / "results.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert block(STUDY, ROWS) in page
    kept = (docs / "results" / f"w-{stem}.jsonl").read_text().splitlines()
    assert [json.loads(line)["inputs"] for line in kept] == ["c", "d", "a", "b"]
    assert (docs / "results" / f"w-{stem}.png").read_bytes() == b"png"
