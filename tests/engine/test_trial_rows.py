"""rows.jsonl of compare and study: lines that are damaged, a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.engine.test_log import full_at
from unteach.engine.errors import InputError
from unteach.engine.evaluate.ranking import Cost, Trial
from unteach.engine.trial_rows import append_trial, drop_torn_line, read_trials

SCORE = {"value": 50.0, "n": 4, "low": 20, "high": 80}
TRIAL = Trial(
    method="sft",
    lr=1e-3,
    seed=0,
    split="test",
    inputs="i",
    protocol="p",
    overall=1.5,
    scores={"forget": SCORE},
    extra={},
    cost=Cost(1.0, 20, None),
    settings=["method.k=2"],
    questions={"forget": [100.0, None]},
)


def line_of(**changed: object) -> bytes:
    return json.dumps({**asdict(TRIAL), **changed}).encode()


DAMAGED = {
    "no UTF-8": (line_of().replace(b"sft", b"s\xfft"), "no JSON"),
    "cut": (line_of()[:-9], "no JSON"),
    "empty": (b"", "no JSON"),
    "null": (b"null", "no JSON object"),
    "list": (b"[3]", "no JSON object"),
    "overall": (line_of(overall=None), "overall: Input should be a valid number"),
    "text": (line_of(overall="1.5"), "overall: Input should be a valid number"),
    "cost": (line_of(cost={"seconds": 1.0}), "cost.tokens: Field required"),
    "scores": (line_of(scores=[]), "scores: Input should be an object"),
    "score": (line_of(scores={"forget": {**SCORE, "value": None}}), "forget.value: Input"),
    "seed": (line_of(seed="0"), "seed: Input should be a valid integer"),
    "unknown": (line_of(judged=1), "judged is none of its fields"),
    "missing": (b'{"method": "sft"}', "lr: Field required"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, damage: str) -> None:
    content, reason = DAMAGED[damage]
    path = tmp_path / "rows.jsonl"
    append_trial(path, TRIAL)
    whole = path.read_bytes()
    path.write_bytes(whole + content + b"\n" + whole)
    drop_torn_line(path)
    with pytest.raises(InputError) as caught:
        read_trials(path)
    said = str(caught.value)
    assert f"{path}, line 2, is no row (" in said and reason in said and "\n" not in said
    assert said.endswith("): remove that line; its trial is made again.")


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_trials(path) == []
    trials = [TRIAL, replace(TRIAL, lr=None, seed=None, overall=0, cost=None)]
    for trial in trials:
        append_trial(path, trial)
    old = {n: v for n, v in asdict(TRIAL).items() if n not in ("settings", "questions")}
    path.write_bytes(path.read_bytes() + json.dumps(old).encode() + b"\n")
    assert read_trials(path) == [*trials, replace(TRIAL, settings=[], questions={})]


def test_half_a_last_line_is_dropped_be_it_text_or_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for torn in (b'{"method": "s', b"\xff", b"\0\0"):
        path.write_bytes(line_of() + b"\n" + torn)
        drop_torn_line(path)
        assert path.read_bytes() == line_of() + b"\n"


def test_a_full_disk_is_one_sentence_and_the_next_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_trial(path, TRIAL)
    before = path.read_bytes()
    message = r"rows\.jsonl cannot be written \(File too large\): free space"
    with full_at(len(before) + 9), pytest.raises(InputError, match=message):
        append_trial(path, TRIAL)
    drop_torn_line(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["no UTF-8", "overall"])
def test_a_command_tells_the_line_before_it_makes_anything(tmp_path: Path, damage: str) -> None:
    rows = tmp_path / "compare" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_bytes(DAMAGED[damage][0] + b"\n")
    settings = ("--set", f"run.folder={tmp_path}", "--set", "run.device=cpu")
    done = subprocess.run(
        [sys.executable, "-m", "unteach.recipes.cli", "compare", "tiny", *settings],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"Error: {rows}, line 1, is no row (" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "target").exists()
