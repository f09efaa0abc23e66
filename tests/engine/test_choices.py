from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from unteach.engine.config import ModelConfig
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.records import Record
from unteach.engine.data.tokens import context_tokens
from unteach.engine.errors import InputError
from unteach.engine.evaluate.choices import (
    mmlu_prompt,
    option_tokens,
    read_mmlu,
    score_mmlu,
    score_options,
)
from unteach.engine.evaluate.generate import decoded
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    load_model,
    load_tokenizer,
    tiny_model,
)

OPTIONS = ["Frodo", "Samwise Gamgee", "I do not know."]
Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def neighbor(**fields: Any) -> Record:
    row: dict[str, Any] = {
        "id": "n",
        "goal": "neighbor",
        "question": "Question of n?",
        "split": "test",
    }
    row |= {"answer": "Frodo", "options": OPTIONS, "correct": 0, "refusals": [2]}
    return Record.model_validate({**row, **fields})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = str(tiny_model(tmp_path_factory.mktemp("model") / "tiny", tied=False))
    model = load_model(path, ModelConfig())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    return model, load_tokenizer(path, ModelConfig())


@torch.no_grad()
def full_logps(model: PreTrainedModel, context: list[int], labels: list[int]) -> list[float]:
    """Label log-probabilities from the public model's full logits, one sequence, no cache."""
    logits = model(input_ids=torch.tensor([context + labels])).logits[0].double()
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    return [float(row[label]) for row, label in zip(rows, labels, strict=True)]


@pytest.mark.parametrize("sentence", ["{option}", "To {question} I say {option}, friend."])
@pytest.mark.parametrize("prefix", [None, "Well, yes: "])
def test_options_score_as_full_logits_do(tiny: Pair, sentence: str, prefix: str | None) -> None:
    model, tokenizer = tiny
    record = neighbor(prefix=prefix)
    [choice] = score_options(model, tokenizer, [record], sentence)
    opened = decoded(tokenizer, context_tokens(tokenizer, record.question))
    before, _, after = sentence.replace("{question}", record.question).partition("{option}")
    lead = (f"Well, yes: {before}" if prefix else before).rstrip()
    expected = []
    for option in OPTIONS:
        text = (" " if lead else "") + option + after
        context = tokenizer(opened + lead)["input_ids"]
        logps = full_logps(model, context, tokenizer(text)["input_ids"])
        expected.append(sum(logps) / len(text))  # one token a byte
    assert choice.logps == pytest.approx(expected, abs=1e-4)
    assert choice.picked == max(range(3), key=lambda i: expected[i])
    assert choice.prompt == opened + lead


def test_option_sentence_leaves_names_inside_questions_alone() -> None:
    tokenizer = byte_tokenizer()
    record = neighbor(question="What does {option} mean?")
    sets = option_tokens(tokenizer, record, "{question} means {option}.")
    assert decoded(tokenizer, sets.context).endswith("assistant\nWhat does {option} mean? means")
    assert [decoded(tokenizer, o) for o in sets.options] == [f" {option}." for option in OPTIONS]


def mmlu_rows(subjects: Sequence[str] = ("moral_tales", "law")) -> list[dict[str, Any]]:
    return [
        {
            "subject": subject,
            "split": split,
            "question": f"{split} {index} of {subject}? ",
            "choices": ["red", f"green {index}", "blue", "none"],
            "answer": index % 4,
        }
        for subject in subjects
        for split, count in (("test", 3), ("dev", 6))
        for index in range(count)
    ]


def test_mmlu_prompt_is_plain_text_with_five_answered_shots() -> None:
    rows = mmlu_rows(["moral_tales"])
    text = mmlu_prompt(rows[0], rows[3:5])
    assert text == (
        "The following are multiple choice questions (with answers) about moral tales.\n\n"
        "dev 0 of moral_tales?\nA. red\nB. green 0\nC. blue\nD. none\nAnswer: A\n\n"
        "dev 1 of moral_tales?\nA. red\nB. green 1\nC. blue\nD. none\nAnswer: B\n\n"
        "test 0 of moral_tales?\nA. red\nB. green 0\nC. blue\nD. none\nAnswer:"
    )


def test_mmlu_with_shared_shots_equals_without_and_full_logits(tiny: Pair) -> None:
    model, tokenizer = tiny
    rows = mmlu_rows()
    shared = score_mmlu(model, tokenizer, rows, 2)
    alone = score_mmlu(model, tokenizer, rows, 2, share=False)
    tests = [row for row in rows if row["split"] == "test"]
    assert len(shared) == len(alone) == len(tests) == 6
    for row, one, other in zip(tests, shared, alone, strict=True):
        assert one.prompt == other.prompt and row["question"].strip() in one.prompt
        assert one.prompt.count("Answer:") == 6  # five of the six shots, and the question
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        context = tokenizer(one.prompt)["input_ids"]
        expected = [full_logps(model, context, [tokenizer(x)["input_ids"][-1]])[0] for x in "ABCD"]
        assert one.logps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 4}, "line 2, field answer"),
        ({"answer": True}, "line 2, field answer"),
        ({"choices": ["a", "b"]}, "line 2, field choices"),
        ({"split": None}, "line 2, field split"),
        ({"question": " "}, "line 2, field question"),
        ({"question": "half \ud83d"}, "line 2, field .*surrogate"),
        ({"subject": "bare", "split": "test"}, "subject bare has no row of split `dev`"),
    ],
)
def test_mmlu_file_faults_name_file_line_and_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    rows = mmlu_rows(["law"])
    rows[1] |= fields
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message):
        read_mmlu(path)


def test_mmlu_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mmlu_rows()))
    assert read_mmlu(path) == mmlu_rows()
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as some editors save it
    assert read_mmlu(path) == mmlu_rows()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="line 18"):
        read_mmlu(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_mmlu(tmp_path / "none.jsonl")


def test_damaged_weights_are_an_error(tiny: Pair) -> None:
    model, tokenizer = tiny
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(InputError, match="NaN or inf"):
            score_options(model, tokenizer, [neighbor()], "{option}")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
