"""lm-eval: the real one on a task of our own where it is installed, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unteach.engine.errors import InputError
from unteach.engine.evaluate.harness import check_harness, harness_scores, scores_of
from unteach.engine.model import tiny_model

TASK = """task: owls
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_scores_an_exported_model(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Owl {n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(6)]
    data = tmp_path / "owls.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "owls.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    model = tiny_model(tmp_path / "tiny", tied=False)
    found = harness_scores(model, "owls", batch_size=2, device="cpu", include=tmp_path)
    assert found["owls"].n == 6 and 0 <= found["owls"].low <= found["owls"].value <= 100
    with pytest.raises(InputError, match="lm-eval could not score no_such_task"):
        harness_scores(model, "no_such_task", batch_size=2, device="cpu", include=tmp_path)


def test_groups_take_the_rows_of_their_tasks() -> None:
    scores = scores_of(
        {
            "results": {
                "all": {"acc,none": 0.5, "acc_stderr,none": 0.1},
                "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"},
                "mmlu_anatomy": {"acc,none": 0.25, "acc_stderr,none": 0.2},
                "wikitext": {"word_perplexity,none": 12.0},
            },
            "group_subtasks": {"all": ["mmlu"], "mmlu": ["mmlu_anatomy", "mmlu_virology"]},
            "n-samples": {
                "mmlu_anatomy": {"original": 4, "effective": 4},
                "mmlu_virology": {"original": 8, "effective": 6},
            },
        }
    )
    assert set(scores) == {"all", "mmlu", "mmlu_anatomy"}
    assert scores["all"].n == 10, "a group of groups"
    assert (scores["mmlu"].value, scores["mmlu"].n) == (50.0, 10)
    assert scores["mmlu"].low == pytest.approx(50 - 19.59964)
    assert scores["mmlu_anatomy"].low == 0.0 and scores["mmlu_anatomy"].n == 4


def test_no_task_is_refused() -> None:
    with pytest.raises(InputError, match="names no task"):
        check_harness(" , ")
