"""Cosines between goals against gradients of whole logits, and raw passages beside questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unteach.engine.config import override
from unteach.engine.data.records import Record, read_records, write_records
from unteach.engine.data.tokens import response_tokens, student_context
from unteach.engine.gradients import measure_gradients
from unteach.engine.model import blocks
from unteach.engine.run import Run, open_run
from unteach.engine.train.parallel import World
from unteach.recipes.tiny import tiny


def opened(folder: Path, *settings: str) -> Run:
    chosen = [f"run.folder={folder}", "method.name=sft", "run.threads=1", *settings]
    config = override(tiny(), [*chosen, "target=null"])
    return open_run(config, World(0, 1, torch.device("cpu"), None))


def by_hand(run: Run, goal: str) -> Tensor:
    """Token-mean cross-entropy of a goal's train questions, whole logits, one record at a time."""
    model = run.load(run.base, "float32")
    losses = []
    for record in run.split("train"):
        if record.goal == goal and record.form == "qa":
            answer = "I do not know." if goal in ("forget", "attack") else record.answer
            assert answer is not None
            context = student_context(run.tokenizer, record)
            response = response_tokens(run.tokenizer, answer, prefix=record.prefix)
            logits = model(torch.tensor([context + response])).logits[0]
            logp = logits[len(context) - 1 : -1].log_softmax(1)
            losses.append(-logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    parameters = list(blocks(model)[-3:].parameters())
    grads = torch.autograd.grad(torch.cat(losses).mean(), parameters)
    return torch.cat([g.flatten() for g in grads])


def test_cosines_are_those_of_whole_gradients(tmp_path: Path) -> None:
    run = opened(tmp_path)
    measure_gradients(run)
    found = json.loads((tmp_path / "gradients.json").read_text(encoding="utf-8"))["forms"]
    assert set(found) == {"qa"}, "tiny has no passages"
    goals, cosines = found["qa"]["goals"], found["qa"]["cosines"]
    whole = torch.stack([by_hand(run, goal) for goal in goals])
    whole = whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(cosines, dtype=torch.float32), whole @ whole.T, atol=1e-4, rtol=1e-4
    )
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_raw_passages_are_measured_beside_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_records(Path(tiny().data.path))
    texts = {"forget": "The owl is called Hedwig.", "general": "Cows eat grass."}
    passages = [
        Record(id=f"raw-{goal}", goal=goal, answer=text, form="passage")
        for goal, text in texts.items()
    ]
    write_records(tmp_path / "records.jsonl", [*records, *passages])
    responses = 'teacher.response={"forget": "gold", "attack": "gold"}'
    settings = (f"data.path={tmp_path / 'records.jsonl'}", "method.name=kl-teacher", responses)
    measure_gradients(opened(tmp_path / "run", *settings))
    text = (tmp_path / "run" / "gradients.json").read_text(encoding="utf-8")
    forms = json.loads(text)["forms"]
    assert forms["passage"]["goals"] == ["forget", "general"]
    assert forms["passage"]["examples"] == [1, 1]
    assert "not measured" not in capsys.readouterr().out
