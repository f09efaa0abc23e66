from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from unteach.engine.config import ModelConfig, override
from unteach.engine.data.domain_gap import Gap, draw_gap, measure_gap, proxy_distance, record_states
from unteach.engine.data.records import Record, read_records, write_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.sheet import write_sheet
from unteach.engine.data.tokens import passage_tokens, response_tokens, student_context
from unteach.engine.model import load_model, load_tokenizer, tiny_model
from unteach.engine.run import open_run
from unteach.engine.train.parallel import joined
from unteach.engine.training_data import training_records
from unteach.recipes.catalog import find_recipe


def make(name: str, goal: str, question: str = "Who is it?", **fields: object) -> Record:
    row = {"id": name, "goal": goal, "question": question, "answer": "Hedwig", **fields}
    return Record.model_validate(row)


def test_proxy_distance_of_two_gaussians_is_that_of_their_best_line() -> None:
    """Unit Gaussians d apart: the best line errs Φ(-d/2) of the time."""
    for apart in (0.0, 1.0, 2.0, 6.0):
        x = torch.randn(4000, 3, dtype=torch.float64)
        y = torch.randn(4000, 3, dtype=torch.float64) + torch.tensor([apart, 0, 0])
        error = 0.5 * math.erfc(apart / 2 / math.sqrt(2))
        assert proxy_distance(x, y) == pytest.approx(2 * (1 - 2 * error), abs=0.08)


def test_proxy_distance_holds_out_what_it_tests() -> None:
    """More columns than rows: a classifier tested on its training rows would say 2."""
    x, y = torch.randn(40, 500), torch.randn(40, 500)
    assert proxy_distance(x, y) < 0.9
    assert proxy_distance(x, y + 1) > 1.8
    with pytest.raises(ValueError, match="at least 5 rows"):
        proxy_distance(x[:4], y)


def test_states_are_the_models_own_means(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    model, tokenizer = load_model(path, ModelConfig()), load_tokenizer(path, ModelConfig())
    records = [make(f"r{i}", "forget", "Who " + "very " * i + "much?") for i in range(5)]
    records.append(make("p", "forget", "", form="passage"))
    states = record_states(model, tokenizer, records)
    for record, state in zip(records, states, strict=True):
        passage = record.form == "passage"  # which has no turn, and so no end of one
        response = (passage_tokens if passage else response_tokens)(tokenizer, "Hedwig")
        tokens = student_context(tokenizer, record) + response
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        wanted = output.hidden_states[-1][0].double().mean(0)
        torch.testing.assert_close(state, wanted, atol=1e-5, rtol=1e-4)


def test_one_shape_lies_closer_than_two(tmp_path: Path) -> None:
    """Passages against questions differ more than questions against questions."""
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    model, tokenizer = load_model(path, ModelConfig()), load_tokenizer(path, ModelConfig())
    asked = {
        goal: [
            make(f"{goal}{i}", goal, f"Which bird is number {i}?") for i in range(start, start + 20)
        ]
        for goal, start in (("forget", 0), ("general", 20))
    }
    text = [
        make(f"p{i}", "forget", "", form="passage", answer=f"Birds of number {i} flew far away.")
        for i in range(20)
    ]
    gap = measure_gap(model, tokenizer, {**asked, "forget": text}, asked, name="tiny")
    pair = ("forget", "general")
    assert gap.before[pair] == 2.0 and gap.after[pair] < gap.before[pair]
    assert draw_gap(gap).startswith(b"\x89PNG")


def test_the_sheet_counts_and_shows_and_lets_no_markup_through(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejected.jsonl")
    rejects.add("question that leaks the answer", {"question": "a|b"})
    rejects.close()
    records = [
        make("a", "forget", "<script>alert(1)</script> | who?", source="book.txt"),
        make("b", "forget", "Who is that there?", split="test", source="book.txt"),
        make("c", "general", anchor_of="a"),
    ]
    gap = Gap("tiny", 20, {("forget", "general"): 2.0}, {("forget", "general"): 0.5})
    write_sheet(tmp_path / "records.md", records, rejects=rejects, near=[("b", "a", 0.9)], gap=gap)
    sheet = (tmp_path / "records.md").read_text()
    assert "3 records" in sheet and "Anchors: general 1." in sheet
    assert "| forget | train | book.txt | qa | 1 |" in sheet
    assert "| forget and general | 2.00 | 0.50 |" in sheet
    assert "| question that leaks the answer | 1 |" in sheet
    assert "| b | a | 0.9 |" in sheet
    assert "<script>" not in sheet and "\\<script\\>" in sheet
    assert (tmp_path / "domain_gap.png").is_file()
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["what"] == '{"question": "a|b"}'


def test_what_the_base_does_not_know_is_dropped_scored_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = find_recipe("tiny")
    shipped = read_records(Path(recipe.data.path))
    path = tmp_path / "r.jsonl"
    write_records(path, shipped)
    settings = [
        "target=null",
        "data.known_only=true",
        f"data.path={path}",
        f"run.folder={tmp_path / 'run'}",
    ]
    with joined("cpu", 1) as world:
        run = open_run(override(recipe, settings), world)
        kept = training_records(run)
        run.remember()
    scores = json.loads((tmp_path / "run/known_scores.json").read_text())
    forget = [r for r in shipped if r.goal in ("forget", "attack")]
    assert set(scores) == {r.id for r in forget}
    assert all(row["logp"] < 0 for row in scores.values())
    dropped = {r.id for r in run.split("train")} - {r.id for r in kept}
    assert dropped == {r.id for r in forget if r.split == "train" and not scores[r.id]["answered"]}
    said = capsys.readouterr().out
    assert "does not answer" in said and "nats a token" in said
    assert "records in `r.jsonl`" in (tmp_path / "run/records.md").read_text()


def test_nothing_is_known_where_no_question_has_a_gold_answer(tmp_path: Path) -> None:
    recipe, blank = find_recipe("tiny"), {"answer": None, "aliases": []}
    trained = [r for r in read_records(Path(recipe.data.path)) if r.split == "train"]
    bare = [r.model_copy(update=blank) if r.goal in ("forget", "attack") else r for r in trained]
    write_records(tmp_path / "r.jsonl", bare)
    settings = ["target=null", "data.known_only=true", f"data.path={tmp_path / 'r.jsonl'}"]
    with joined("cpu", 1) as world:
        run = open_run(override(recipe, [*settings, f"run.folder={tmp_path / 'run'}"]), world)
        assert {r.goal for r in training_records(run)} == {"neighbor", "general"}
