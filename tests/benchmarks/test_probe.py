"""A line through a model's hidden states: where they are taken, how the line is laid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unteach.benchmarks.probe import RIDGE, last_states, probe, ridge_probe, table
from unteach.engine.config import ModelConfig
from unteach.engine.data.records import Goal, Record
from unteach.engine.model import load_model, load_tokenizer, tiny_model


def test_the_line_is_that_of_weighted_least_squares() -> None:
    """Against a solver that sees stacked rows, not normal equations; sides of 9 and 31 rows."""
    generator = torch.Generator().manual_seed(3)
    train_ND = torch.randn(40, 6, generator=generator, dtype=torch.float64) * 4 + 2
    asked_MD = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    topic_N = torch.arange(40) < 9
    z_ND = (train_ND - train_ND.mean(0)) / train_ND.std(0)
    weight_N = torch.tensor([1 / 9] * 9 + [1 / 31] * 31, dtype=torch.float64).sqrt()
    sign_N = torch.tensor([1.0] * 9 + [-1.0] * 31, dtype=torch.float64)
    rows = torch.cat([z_ND * weight_N[:, None], RIDGE**0.5 * torch.eye(6, dtype=torch.float64)])
    goal = torch.cat([sign_N * weight_N, torch.zeros(6, dtype=torch.float64)])
    line_D = torch.linalg.lstsq(rows, goal[:, None]).solution[:, 0]
    expected_M = (asked_MD - train_ND.mean(0)) / train_ND.std(0) @ line_D
    torch.testing.assert_close(ridge_probe(train_ND, topic_N, asked_MD), expected_M)
    # A feature's unit and origin are nobody's business.
    again_M = ridge_probe(train_ND * 7 - 1, topic_N, asked_MD * 7 - 1)
    torch.testing.assert_close(again_M, expected_M)


def test_states_are_those_where_the_answer_would_begin(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=True))
    question = "Who is Harry?"
    config = ModelConfig(path=path)
    states_LND = last_states(
        load_model(path, config),
        load_tokenizer(path, config),
        [Record(id="f", goal="forget", question=question)],
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": question}]
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = torch.tensor([tokenizer(start, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(path)(tokens, output_hidden_states=True)
    expected_LD = torch.stack([state[0, -1] for state in found.hidden_states]).double()
    torch.testing.assert_close(states_LND[:, 0], expected_LD)


def test_a_topic_that_its_words_give_away_is_told_apart(tmp_path: Path) -> None:
    """The last word differs by topic, so even the embeddings of the asked questions part."""
    path = str(tiny_model(tmp_path / "tiny", tied=True))

    def asked(goal: Goal, ending: str, first: int) -> list[Record]:
        numbers = range(first, first + 4)
        return [
            Record(id=f"{goal}{n}", goal=goal, question=f"What is {n} {ending * 6}?")
            for n in numbers
        ]

    train = [*asked("forget", " owl", 0), *asked("general", " king", 0)]
    others = [*asked("forget", " owl", 4), *asked("general", " king", 4)]
    row = probe(path, train, others)
    assert row["questions"] == 8 and list(row["auc"]) == ["all", "general"]
    assert row["auc"]["all"]["value"] == 100.0 == row["layers"][row["layer"]]["all"]["value"]
    # The token in front of the answer is the template's own: its embedding knows nothing.
    assert row["layers"][0]["all"]["value"] == pytest.approx(50.0)


def test_the_table_has_a_column_for_each_side() -> None:
    score = {"value": 50.0, "low": 9.5, "high": 90.5, "n": 2}
    row = {"name": "base", "questions": 8, "layer": 3, "auc": {"all": score, "general": score}}
    assert table([row]).splitlines() == [
        "| AUC ↑ | questions | layer | all | general |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| base | 8 | 3 | 50.0 [9.5–90.5] | 50.0 [9.5–90.5] |",
    ]
