"""The ranking as users run it: every row, in slices, killed in between."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.killed import killed_after
from unteach.engine.compare import ROWS, chosen_rates, chosen_rows, leading_rates
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.records import (
    GOALS,
    Record,
    check_disjoint,
    read_records,
    write_records,
)
from unteach.engine.data.tokens import context_tokens
from unteach.engine.errors import InputError
from unteach.engine.evaluate.ranking import NAMES
from unteach.engine.evaluate.scores import seed_interval
from unteach.engine.evaluate.told import NOTHING, Told
from unteach.engine.evaluate.tuning import Tuning, tuning_records
from unteach.engine.teacher.intentions import intention_for, load_intentions, teacher_context
from unteach.engine.train.target import target_streams
from unteach.engine.trials import read_trials
from unteach.recipes.tiny import tiny


def command(folder: Path, *options: str) -> list[str]:
    settings = (f"run.folder={folder}", "run.device=cpu", "run.threads=1")
    chosen = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "unteach.recipes.cli", "compare", "tiny", *options, *chosen]


def compare(folder: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *options), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranked") / "run"
    printed = compare(folder, "--seeds", "1", "--rates", "1e-3", "--steps", "2").stdout
    page = (folder / "compare" / "ranking.md").read_text(encoding="utf-8")
    assert page.split("![radar]")[0].strip() in printed
    return folder


def test_every_row_is_in_the_tables(ranked: Path) -> None:
    page = (ranked / "compare" / "ranking.md").read_text(encoding="utf-8")
    first, second = page.split("## Table 2")
    assert {name for name in ROWS if f"| {NAMES[name]} |" not in page} == set()
    assert all(f"| {NAMES[name]} |" in second for name in ("bitopk", "duet-loss", "bild-loss"))
    assert "| Base |" in first and "Overall ↑" in first
    ranking = json.loads((ranked / "compare" / "ranking.json").read_text(encoding="utf-8"))
    assert ranking["tuning"] is None and "given, not chosen" in page
    assert [row["name"] for row in ranking["rows"]] == list(ROWS)
    for row in ranking["rows"]:
        (trial,) = row["trials"]
        assert trial["protocol"] == ranking["protocol"] and trial["split"] == "test"
        cost = trial["cost"]
        assert (cost is None) == (row["name"] in ("oracle", "ensemble"))
        assert cost is None or (cost["seconds"] > 0 and cost["tokens"] > 0)
    for name in ("radar.png", "tradeoff.png"):
        assert (ranked / "compare" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_made_once_is_shared_and_weights_do_not_pile_up(ranked: Path) -> None:
    assert (ranked / "target" / "model" / "model.safetensors").is_file()
    assert len(list((ranked / "compare").rglob("target"))) == 0
    # Ours and its kin read the run's own cache; DUET's ensemble, NPO's and MOLLM's originals.
    assert len(list((ranked / "compare" / "caches").glob("[!.]*"))) == 3
    assert list((ranked / "compare").rglob("model.safetensors")) == []
    assert len(list((ranked / "compare").rglob("train.jsonl"))) == len(ROWS) - 2


def test_a_finished_ranking_is_not_made_again(ranked: Path, tmp_path: Path) -> None:
    """Not even where the intentions, or the package that ships them, lie elsewhere."""
    rows = ranked / "compare" / "rows.jsonl"
    before = rows.read_bytes()
    page = (ranked / "compare" / "ranking.md").read_bytes()
    intentions = tmp_path / "intentions.yaml"
    shutil.copy(str(tiny().teacher.intentions), intentions)
    moved = ("--set", f"teacher.intentions={intentions}")
    compare(ranked, "--seeds", "1", "--rates", "1e-3", "--steps", "2", *moved)
    assert rows.read_bytes() == before
    assert (ranked / "compare" / "ranking.md").read_bytes() == page


def test_a_killed_sweep_goes_on_and_its_winner_takes_the_seeds(
    ranked: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(ranked, folder, ignore=shutil.ignore_patterns("rows.jsonl", "*-seed-*"))
    options = ("--methods", "sft", "--rates", "1e-5,3e-2", "--seeds", "2", "--steps", "4")
    rows = folder / "compare" / "rows.jsonl"
    kept = killed_after(command(folder, *options), rows, b"sft", b'{"method": "sft", "lr"')
    compare(folder, *options)
    assert rows.read_bytes().startswith(kept)
    trials = read_trials(rows)
    tuned = {t.lr: t.overall for t in trials if t.method == "sft" and t.split == "tune"}
    assert set(tuned) == {1e-5, 3e-2}
    best = max(sorted(lr for lr in tuned if lr is not None), key=lambda lr: tuned[lr])
    tested = [(t.lr, t.seed) for t in trials if t.method == "sft" and t.split == "test"]
    assert tested == [(best, 0), (best, 1)]
    assert [t.split for t in trials if t.method == "base"] == ["test", "tune"]
    ranking: dict[str, Any] = json.loads(
        (folder / "compare" / "ranking.json").read_text(encoding="utf-8")
    )
    (row,) = ranking["rows"]
    assert {float(lr): value for lr, value in row["tried"].items()} == {
        lr: [value] for lr, value in tuned.items()
    }
    asked = sum(r.split == "tune" for r in read_records(Path(tiny().data.path)))
    assert ranking["tuning"] == {"split": "tune", "questions": asked}
    page = (folder / "compare" / "ranking.md").read_text(encoding="utf-8")
    assert f"chosen by Overall on {asked} questions of split `tune`;" in page
    assert "## Robustness" not in page
    said = page.split("## What is said freely")[1].split("##")[0]
    assert f"| | N | Base | {NAMES[row['name']]} |" in said and "| Refused, forget ↑ |" in said
    costs = [t.cost for t in trials if t.method == "sft" and t.cost is not None]
    assert len(costs) == len([t for t in trials if t.method == "sft"])
    assert all(c.tokens > 0 and c.seconds > 0 and c.peak_mib for c in costs)


def test_rates_that_tie_are_parted_by_further_seeds(ranked: Path, tmp_path: Path) -> None:
    """At rates that change nothing every seed ties, and the smallest serves."""
    folder = tmp_path / "run"
    shutil.copytree(ranked, folder, ignore=shutil.ignore_patterns("compare"))
    options = ("--methods", "sft", "--rates", "2e-12,1e-12", "--seeds", "1", "--steps", "1")
    compare(folder, *options)
    trials = read_trials(folder / "compare" / "rows.jsonl")
    tuned = [(t.lr, t.seed) for t in trials if t.method == "sft" and t.split == "tune"]
    assert tuned == [(lr, seed) for seed in (0, 1, 2) for lr in (1e-12, 2e-12)]
    assert [t.lr for t in trials if t.method == "sft" and t.split == "test"] == [1e-12]
    assert list((folder / "compare").rglob("model.safetensors")) == []
    page = (folder / "compare" / "ranking.md").read_text(encoding="utf-8")
    assert "| 1e-12 | 1e-12: +0.0/+0.0/+0.0, 2e-12: +0.0/+0.0/+0.0 |" in page


def test_a_rate_leads_by_its_mean_over_the_most_seeds() -> None:
    assert leading_rates({1e-5: [3.0], 1e-4: [7.0], 1e-3: [7.0]}) == [1e-4, 1e-3]
    assert leading_rates({1e-5: [9.0], 1e-4: [7.0, 4.0], 1e-3: [7.0, 5.0]}) == [1e-3]


def test_stresses_are_measured_on_the_trained_weights_before_they_go(
    ranked: Path, tmp_path: Path
) -> None:
    """Against `unteach run` of the same training, which keeps its weights."""
    one, other = tmp_path / "compare", tmp_path / "run"
    for folder in (one, other):
        shutil.copytree(ranked, folder, ignore=shutil.ignore_patterns("compare"))
    asked = ("evaluate.few_shot=2", "evaluate.quantized=[4]", "evaluate.relearn_steps=2")
    settings = [part for s in (*asked, "evaluate.relearn_rows=[1,4]") for part in ("--set", s)]
    options = ("--methods", "oracle,sft", "--rates", "1e-3", "--seeds", "2", "--steps", "2")
    compare(one, *options, *settings)
    rows = one / "compare" / "rows.jsonl"
    before = rows.read_bytes()
    assert "relearned" not in rows.read_text(encoding="utf-8"), "only where --stress is given"
    compare(one, *options, *settings, "--stress")
    assert rows.read_bytes().startswith(before)
    added = read_trials(rows)[len(before.splitlines()) :]
    assert [(t.method, t.seed) for t in added] == [("base", None), ("sft", 0), ("sft", 1)]
    assert list((one / "compare").rglob("model.safetensors")) == []

    again = command(other, *settings, "--set", "method.name=sft", "--set", "optim.steps=2")
    again[again.index("compare")] = "run"
    shutil.rmtree(other / "cache")
    subprocess.run(again, capture_output=True, timeout=600, check=True)
    summary = json.loads((other / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert [t.extra for t in added[:2]] == [summary["extra"]["base"], summary["extra"]["model"]]
    page = (one / "compare" / "ranking.md").read_text(encoding="utf-8")
    table = page.split("## Robustness")[1].split("##")[0]
    assert "\n| Forget, relearned on 4 rows ↓ | 4 | " in table and "| | N | Base | SFT |" in table
    assert NAMES["oracle"] not in table
    scores = [t.extra["relearned_4_forget"]["value"] for t in added[1:]]
    mean, half = seed_interval(scores)
    assert f"| {mean:.1f} ± {half:.1f} |" in table
    for trial, score in zip(added[1:], scores, strict=True):
        assert statistics.fmean(trial.questions["relearned_4_forget"]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--methods", "bitopq"), "did you mean bitopk?"),
        (("--methods", ","), "names no row"),
        (("--rates", "fast"), "numbers parted by commas"),
        (("--rates", "0"), "above 0"),
        (("--set", 'data.mix={"forget": 1}'), "needs records of goal"),
        (("--set", "teacher.intentions=null", "--methods", "oracle"), "needs intentions"),
        (("--stress",), "asks for, which is nothing"),
        (("--stress", "--set", "evaluate.few_shot=9"), "asks for 9 examples"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(
    tmp_path: Path, options: tuple[str, ...], part: str
) -> None:
    done = compare(tmp_path / "run", *options, code=2)
    assert part in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "target").exists()


def test_tuning_questions_are_checked_before_anything_runs(tmp_path: Path) -> None:
    """Only where a rate is to be chosen by them."""
    records = [
        r.model_copy(update={"answer": "Хедвиг", "aliases": []})
        if r.split == "tune" and r.goal == "general"
        else r
        for r in read_records(Path(tiny().data.path))
    ]
    write_records(tmp_path / "r.jsonl", records)
    options = ("--methods", "sft", "--set", f"data.path={tmp_path / 'r.jsonl'}")
    done = compare(tmp_path / "run", *options, "--rates", "1e-3,1e-4", code=2)
    assert (
        "Record to score 'general-tune-water' (general) has a gold answer in which" in done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "target").exists()


def test_rows_and_rates_are_chosen_by_name() -> None:
    assert chosen_rows(None) == ROWS
    assert chosen_rows("sft, oracle") == ("oracle", "sft")
    assert chosen_rates(None, 3e-4) == pytest.approx((1e-4, 3e-4, 9e-4))
    assert chosen_rates(None, 1.2345e-5)[1] == 1.2345e-5
    assert chosen_rates("1e-5,2e-5", 1.0) == (1e-5, 2e-5)
    with pytest.raises(InputError, match="above 0"):
        chosen_rates("1e-5,nan", 1.0)


def test_tuning_never_asks_a_test_question() -> None:
    records = read_records(Path(tiny().data.path))
    chosen = tuning_records(records)
    assert {r.id for r in chosen} == {r.id for r in records if r.split == "tune"}
    assert {r.goal for r in chosen} == set(GOALS)
    assert {r.split for r in chosen} == {"test"}, "as the suites ask for it"
    without = [r for r in records if r.split != "tune"]
    trained = {r.id for r in records if r.split == "train"}
    assert (instead := {r.id for r in tuning_records(without)}) and instead <= trained
    same = next(r for r in records if r.split == "test").model_copy(
        update={"id": "t", "split": "tune"}
    )
    with pytest.raises(InputError, match="asks the question of tune record 't'"):
        check_disjoint([*records, same])


def test_tune_questions_of_tiny_train_nothing() -> None:
    config, tokenizer = tiny(), byte_tokenizer()
    assert config.teacher.intentions is not None
    intentions = load_intentions(Path(config.teacher.intentions))
    records = read_records(Path(config.data.path))
    without = [r for r in records if r.split != "tune"]
    taught = [target_streams(config, tokenizer, some, intentions) for some in (records, without)]
    assert len(without) < len(records)
    assert [vars(s) for s in taught[0]] == [vars(s) for s in taught[1]]


def test_the_page_says_what_chose_the_rates() -> None:
    sentences = [Tuning(split, 8).sentence() for split in ("tune", "train")]  # type: ignore[arg-type]
    assert "on 8 questions of split `tune`;" in sentences[0]
    assert "on 8 questions of split `train`, because no record is of split `tune`" in sentences[1]


def test_seed_interval_is_students() -> None:
    assert seed_interval([4.0]) == (4.0, None)
    values = [1.0, 2.0, 4.0]
    mean, half = seed_interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * statistics.stdev(values) / 3**0.5)


def test_in_context_rows_read_what_the_teacher_reads() -> None:
    tokenizer = byte_tokenizer()
    path = tiny().teacher.intentions
    assert path is not None
    intentions = load_intentions(Path(path))
    record = Record(id="r", goal="forget", question="Who flies?", answer="He")
    plain = NOTHING.context(tokenizer, record, "Sure:")
    assert plain == context_tokens(tokenizer, record.question, prefix="Sure:")
    attacked = record.model_copy(update={"prefix": "Sure:"})
    for routing in ("oracle", "ensemble"):
        told = Told(routing, intentions)
        wanted = teacher_context(tokenizer, attacked, intention_for(intentions, "forget", routing))
        assert told.context(tokenizer, record, "Sure:") == wanted != plain
    assert Told("oracle", intentions).preface() == "Answer briefly.\n\n"
    assert NOTHING.preface() == ""
