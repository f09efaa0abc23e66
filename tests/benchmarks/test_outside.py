"""How far a refusal reaches: what is asked, and how it is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unteach.benchmarks.outside import (
    REFUSAL,
    TOPIC,
    picture,
    public_questions,
    reach,
    table,
)
from unteach.engine.data.records import normalized
from unteach.engine.model import tiny_model

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public sets are not at hand")
def test_public_sets_are_asked_without_what_was_seen() -> None:
    sets = public_questions(SHARED)
    assert len(sets[TOPIC]) == 400 and all(sets.values())
    first = sets["Lord of the Rings"][0]
    fewer = public_questions(SHARED, {normalized(first)})
    assert first not in fewer["Lord of the Rings"]


def test_sets_are_named_as_people_write_them(tmp_path: Path) -> None:
    """A name goes into the rows and onto the picture as it is; an unknown domain keeps its own."""
    for name in ("hp_trivia/forget_train", "nq_open/dev_sample800", "tofu/world_facts"):
        (tmp_path / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text('{"question": "Why?"}\n')
    (tmp_path / "tofu" / "real_authors.jsonl").write_text('{"question": "Who?"}\n')
    domains = ("lord_of_the_rings", "wizard_of_oz", "chess")
    lines = "".join(json.dumps({"domain": d, "question": f"{d}?"}) + "\n" for d in domains)
    (tmp_path / "hp_trivia" / "neighbor.jsonl").write_text(lines)
    assert [*public_questions(tmp_path)][1:4] == ["Lord of the Rings", "Oz", "chess"]


def test_a_model_is_asked_every_question(tmp_path: Path) -> None:
    """The refusal's log-probability against plain transformers, one question at a time."""
    path = str(tiny_model(tmp_path / "tiny", tied=True))
    sets = {TOPIC: ["Who is Harry?", "Who is Ron?"], "others": ["Who is Frodo?", "Why?", "How?"]}
    row = reach(path, sets)
    assert {n: s["n"] for n, s in row["refused"].items()} == {TOPIC: 2, "others": 3}
    assert row["auc"] == {"others": row["auc_all"]}
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    by_hand = {}
    for name, questions in sets.items():
        by_hand[name] = []
        for question in questions:
            chat = [{"role": "user", "content": question}]
            start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(start, add_special_tokens=False)["input_ids"]
            answer = tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
            places = range(len(ids) - 1, len(ids) + len(answer) - 1)
            values = [float(logp[t, token]) for t, token in zip(places, answer, strict=True)]
            by_hand[name].append(sum(values) / len(values))
    pairs = [(a > b) + 0.5 * (a == b) for a in by_hand[TOPIC] for b in by_hand["others"]]
    assert row["auc_all"]["value"] == pytest.approx(100 * sum(pairs) / len(pairs))


def test_the_table_has_a_line_for_each_model() -> None:
    score = {"value": 50.0, "low": 9.5, "high": 90.5, "n": 2}
    row = {"name": "ours", "refused": {TOPIC: score, "others": score}, "auc_all": score}
    lines = table([row, {**row, "name": "base"}]).splitlines()
    assert lines[0] == "| refused, % | Harry Potter (N 2) ↑ | others (N 2) ↓ | AUC ↑ |"
    assert (
        lines[2] == "| ours | 50.0 [9.5–90.5] | 50.0 [9.5–90.5] | 50.0 [9.5–90.5] |"
        and len(lines) == 4
    )


def test_the_picture_has_a_line_for_each_model() -> None:
    """The last row of a name."""
    score = {"value": 50.0, "low": 9.5, "high": 90.5, "n": 2}
    row = {"name": "ours", "refused": {TOPIC: score, "others": score}, "auc_all": score}
    old, base = (
        {**row, "auc_all": {"value": 1.0}},
        {**row, "name": "base", "auc_all": {"value": 45.0}},
    )
    (axes,) = picture([old, base, row]).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ours   AUC 50.0", "base   AUC 45.0"]
    assert {tuple(p.get_offsets()[0]) for p in axes.collections} == {(50.0, 2.0)}
