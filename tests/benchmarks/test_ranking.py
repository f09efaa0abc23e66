"""A finished ranking reaches the text: every cell beside the paper's own, pictures kept."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from unteach.benchmarks.ranking import PAPER, block, free_block, joined, main, robustness_block
from unteach.engine.errors import InputError
from unteach.engine.evaluate.ranking import HEADINGS, Ranked, Trial, stresses_against_ours
from unteach.engine.evaluate.scores import Score, overall


def trial(values: tuple[float, ...], seed: int | None, total: float) -> dict[str, Any]:
    scores = {n: {"value": v, "n": 40} for n, v in zip(HEADINGS, values, strict=True)}
    return {"scores": scores, "overall": total, "seed": seed, "extra": {}}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "n": 80, "low": value - 1, "high": value + 1}


RANKING = {
    "tuning": {"split": "tune", "questions": 160},
    "base": trial((99, 100, 100, 70, 30), None, 0.0),
    "rows": [
        {"name": "oracle", "trials": [trial((0, 98, 99, 0, 31), None, 166)], "against_ours": None},
        {
            "name": "sft",
            "trials": [trial((4, 100, 95, 1, 30), 0, 159), trial((6, 100, 93, 1, 30), 1, 155)],
            "against_ours": {"value": -2.0, "low": -5.5, "high": 1.25},
        },
        {"name": "bitopk", "trials": [trial((2, 99, 97, 0, 30), 0, 163)], "against_ours": None},
    ],
}


def test_each_cell_stands_beside_the_papers() -> None:
    lines = block(RANKING).splitlines()
    (base,) = (line for line in lines if "| Base |" in line)
    assert "| 99.0 (32.1) | 100.0 (84.3) | 100.0 (57.3) | 70.0 (70.5) | 30.0 (60.8) |" in base
    (sft,) = (line for line in lines if "| SFT |" in line)
    # Student's 97.5% quantile of one degree of freedom times the standard error: 12.706 · 1.
    assert "| 2 | 5.0 ± 12.7 (0.3) | 100.0 ± 0.0 (49.6) |" in sft
    assert "157.0 ± 25.4 (48.9) | -2.0 [-5.5, +1.2] |" in sft
    (ours,) = (line for line in lines if "| Ours |" in line)
    assert "| 2.0 | 99.0 | 97.0 | 0.0 | 30.0 | 163.0 |" in ours
    assert lines.index(sft) < lines.index(ours)
    assert "160 questions of split `tune`" in lines[-1]


def test_what_is_said_freely_stands_beside_what_overall_counts() -> None:
    """A model that talks nonsense picks like ours, and neither refuses nor answers."""
    said = copy.deepcopy(RANKING)
    assert free_block(said) == "", "nobody was asked"
    said["base"]["extra"] = {"neighbor_recall": interval(100), "unended": interval(1)}
    (sft,) = (row for row in said["rows"] if row["name"] == "sft")
    for trial, value in zip(sft["trials"], (50, 54), strict=True):
        trial["extra"] = {"neighbor_recall": interval(value), "forget_refused": interval(value)}
    assert free_block(said).splitlines() == [
        "| | N | Base | SFT |",
        "| --- | ---: | ---: | ---: |",
        "| Refused, forget ↑ | 80 | — | 52.0 ± 25.4 |",
        "| Neighbor, open answer ↑ | 80 | 100.0 [99.0–101.0] | 52.0 ± 25.4 |",
        "| Cut at the longest answer  | 80 | 1.0 [0.0–2.0] | — |",
    ]


def test_stresses_stand_in_a_line_each() -> None:
    stressed = copy.deepcopy(RANKING)
    stressed["base"]["extra"] = {"few_shot_forget": interval(92), "forget_refused": interval(0)}
    stressed["base"]["extra"]["min_k_auc"] = interval(60)
    stressed["rows"][1]["trials"][0]["extra"] = {"few_shot_forget": interval(7)}
    lines = robustness_block(stressed).splitlines()
    assert lines[0] == "| | N | Base | SFT |" and len(lines) == 4, "ours has none"
    assert lines[2].endswith("↓ | 80 | 92.0 [91.0–93.0] | 7.0 [6.0–8.0] |")
    assert lines[3].endswith(" | 80 | 60.0 [59.0–61.0] | — |"), "sft lacks one of them"


def test_seeds_and_differences_stand_in_the_table_of_stresses() -> None:
    """Student's interval over both seeds, and the same for the side of ours that came first."""
    stressed = copy.deepcopy(RANKING)
    stressed["base"]["extra"] = {"few_shot_forget": interval(92)}
    for one, value in zip(stressed["rows"][1]["trials"], (7, 11), strict=True):
        one["extra"] = {"few_shot_forget": interval(value)}
    apart = {"few_shot_forget": {"value": -3.0, "low": -8.0, "high": 2.0}}
    stressed["rows"][1]["stresses_against_ours"] = apart
    lines = robustness_block(stressed).splitlines()
    # 12.706 times the standard error of 7 and 11, which is 2.
    assert lines[2].endswith("| 80 | 92.0 [91.0–93.0] | 9.0 ± 25.4 |")
    assert lines[-3] == "| | SFT |" and lines[-1].endswith("| -3.0 [-8.0, +2.0] |")


def test_a_stress_is_compared_question_by_question() -> None:
    def row(name: str, *seeds: list[float]) -> Ranked:
        trials = [
            Trial(
                **dict.fromkeys(("inputs", "protocol", "split"), ""),
                **{"method": name, "lr": 1.0, "seed": seed, "overall": 0.0, "cost": None},
                **{"scores": {}, "extra": {}},
                questions={"relearned_5_forget": [*values], "forget": [0.0] * 4},
            )
            for seed, values in enumerate(seeds)
        ]
        return Ranked(name, tuple(trials))

    ours = row("bitopk", [0, 0, 100, 0], [0, 0, 0, 0])
    sft = row("sft", [100, 0, 100, 0], [100, 100, 0, 0])
    found = stresses_against_ours({"bitopk": ours, "sft": sft})
    assert found.keys() == {"sft"} and found["sft"].keys() == {"relearned_5_forget"}
    apart = found["sft"]["relearned_5_forget"]
    assert apart.value == 12.5 - 50, "more of the topic came back: worse"
    assert apart.low < apart.value < apart.high <= 0
    assert stresses_against_ours({"sft": sft}) == {}


@pytest.mark.parametrize("name", [name for name in PAPER if name != "base"])
def test_the_papers_figures_add_up(name: str) -> None:
    def scores(values: tuple[float, ...]) -> dict[str, Score]:
        return {n: Score(v, 1, v, v) for n, v in zip(HEADINGS, values, strict=False)}

    total = overall(scores(PAPER[name]), scores(PAPER["base"])).value
    assert total == pytest.approx(PAPER[name][-1], abs=0.011)


def made(name: str, *seeds: tuple[float, ...]) -> dict[str, Any]:
    """A row of ranking.json: scores in the order of the headings, a tuple a seed, one question."""
    return {
        "name": name,
        "tried": {"0.0001": [3.0]},
        "against_ours": None,
        "trials": [whole(name, seed, scores) for seed, scores in enumerate(seeds)],
    }


def whole(name: str, seed: int | None, values: tuple[float, ...]) -> dict[str, Any]:
    scores = dict(zip(HEADINGS, values, strict=False))
    row = Trial(
        **{"method": name, "lr": 1.0, "seed": seed, "split": "test", "inputs": name},
        **{"protocol": "p", "overall": sum(values), "extra": {}, "cost": None},
        scores={n: {"value": v, "n": 1} for n, v in scores.items()},
        questions={n: [v] for n, v in scores.items()},
    )
    return asdict(row)


def written(folder: Path, *rows: dict[str, Any]) -> str:
    """A run folder with a finished ranking of these rows."""
    ranking = {"tuning": None, "base": whole("base", None, (100, 100, 100, 60)), "rows": [*rows]}
    (folder / "compare").mkdir(parents=True)
    (folder / "compare" / "ranking.json").write_text(json.dumps(ranking))
    lines = [
        json.dumps(t) + "\n" for t in [ranking["base"], *(t for r in rows for t in r["trials"])]
    ]
    (folder / "compare" / "rows.jsonl").write_text("".join(lines))
    return str(folder)


def test_rows_and_table_reach_the_docs(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    text = "before\n<!-- ranking:w -->\nold\n<!-- /ranking:w -->\nafter\n"
    said = "<!-- free:w -->\nold\n<!-- /free:w -->\n"
    (docs / "results.md").write_text(text + said)
    readme = tmp_path / "README.md"
    readme.write_text(text.replace(":w", ":quickstart"))
    where = ["--docs", str(docs), "--readme", str(readme)]
    ours = made("bitopk", (0, 100, 100, 0))
    ours["trials"][0]["extra"] = {"unended": interval(40)}
    run = written(tmp_path / "run", ours)
    main([run, "--name", "w", *where])
    assert "old" in readme.read_text(), "no block of this name"
    readme.write_text(text)
    main([run, "--name", "w", *where])
    table = readme.read_text()
    assert "| | Base | | 100.0 | 100.0 | 100.0 | 60.0 | 0.0 | |" in table and "paper" not in table
    page = (docs / "results.md").read_text()
    assert page.startswith("before\n") and "after\n<!-- free:w -->" in page and "old" not in page
    assert "| Cut at the longest answer  | 80 | 40.0 [39.0–41.0] |" in page
    assert "| Ours | 1 | 0.0 | 100.0 | 100.0 | 0.0 |" in page
    kept = (docs / "results" / "w.jsonl").read_text()
    assert kept == (tmp_path / "run" / "compare" / "rows.jsonl").read_text()
    assert (docs / "results" / "w-tradeoff.png").is_file()
    assert not (docs / "results" / "w-relearning.png").exists(), "nothing was taught again"


def test_parts_of_a_ranking_are_one_table(tmp_path: Path) -> None:
    """Differences are taken against the one row of ours, lines of both folders stand once."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text("<!-- ranking:w -->\n<!-- /ranking:w -->\n")
    ours, sft = made("bitopk", (0, 100, 100, 0)), made("sft", (10, 100, 90, 0))
    gated = made("bitopk", (5, 100, 100, 0))
    runs = [written(tmp_path / "a", ours), written(tmp_path / "b", sft)]
    runs.append("Ours with a gate=" + written(tmp_path / "c", gated))
    main([*runs, "--name", "w", "--docs", str(docs)])
    page = (docs / "results.md").read_text()
    assert page.index("| SFT |") < page.index("| Ours |") < page.index("| Ours with a gate |")
    assert "| -20.0 [-20.0, -20.0] |" in page and "| -5.0 [-5.0, -5.0] |" in page
    lines = (docs / "results" / "w.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["base", "bitopk", "sft", "bitopk"]


def test_rankings_that_cannot_be_one_are_refused() -> None:
    base = whole("base", None, (100, 100, 100, 60))
    first = {"tuning": None, "base": base, "rows": [made("sft", (10, 100, 90, 0))]}
    again = {**first, "rows": [made("sft", (20, 100, 90, 0))]}
    two = {**first, "rows": [*first["rows"], made("bitopk", (0, 100, 100, 0))]}
    assert len(joined([("", first), ("", first)])["rows"]) == 1, "the very same row"
    with pytest.raises(InputError, match="Two rankings have a row sft"):
        joined([("", first), ("", again)])
    with pytest.raises(InputError, match="ranking tuned has several rows"):
        joined([("", first), ("tuned", two)])
    with pytest.raises(InputError, match="other questions or of another base"):
        joined([("", first), ("", {**again, "base": {**base, "protocol": "q"}})])
    stress = {name: {"few_shot_forget": interval(value)} for name, value in (("a", 5), ("b", 7))}
    one, other = ({**first, "base": {**base, "extra": stress[name]}} for name in "ab")
    with pytest.raises(InputError, match="bases of the rankings differ in few_shot_forget"):
        joined([("", one), ("", other)])


def test_stresses_and_rates_of_every_part_reach_the_table() -> None:
    base = whole("base", None, (100, 100, 100, 60))
    stressed = {**base, "extra": {"few_shot_forget": interval(92)}}
    stressed["questions"] = {**base["questions"], "few_shot_forget": [92.0]}
    tuned = {"split": "tune", "questions": 8}
    plain = {"tuning": tuned, "base": base, "rows": [made("sft", (10, 100, 90, 0))]}
    beside = {"tuning": None, "base": stressed, "rows": [made("bitopk", (0, 100, 100, 0))]}
    for parts in ((plain, beside), (beside, plain)):
        ranking = joined([("", copy.deepcopy(part)) for part in parts])
        assert ranking["base"] == stressed
        assert "rate but those of Ours, which were given, was chosen by" in block(ranking)
    assert "which were given" not in block(joined([("", plain)]))
    assert block(joined([("", beside)])).endswith("Learning rates were given, not chosen.")
