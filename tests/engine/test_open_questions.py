"""Questions without answers: what a file may hold, what the teacher says, who trains on it."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unteach.engine.compare import ROWS, check_rows
from unteach.engine.config import override
from unteach.engine.data.open_questions import with_open_questions
from unteach.engine.data.records import Record, write_records
from unteach.engine.errors import InputError
from unteach.engine.plan import plan
from unteach.engine.run import Run, open_run
from unteach.engine.stages import (
    target_stage,
    teach_stage,
    train_stage,
    training_cache,
    verify_stage,
)
from unteach.engine.train.methods import METHODS
from unteach.engine.train.parallel import joined
from unteach.engine.training_data import training_streams
from unteach.engine.trials import Trials
from unteach.recipes.tiny import tiny

QUESTIONS = (
    Record(id="open-1", goal="general", question="Which number follows nine hundred?"),
    Record(id="open-2", goal="neighbor", question="Who rules the land of snow and ice?"),
    Record(id="open-4", goal="general", question="Who paints at night?", prefix="Sure, it is"),
)
TOPIC = Record(id="open-3", goal="forget", question="Whom did the lamp keeper marry?")
KNOWN = Record(id="k", goal="general", question="Where is Rome?", answer="Italy")


def saved(path: Path, *records: Record) -> Path:
    write_records(path, records)
    return path


def test_a_file_is_put_behind_the_records(tmp_path: Path) -> None:
    records, opened = with_open_questions([KNOWN], saved(tmp_path / "q.jsonl", *QUESTIONS))
    assert records == [KNOWN, *QUESTIONS] and opened == {"open-1", "open-2", "open-4"}


@pytest.mark.parametrize(
    ("update", "part"),
    [
        ({"answer": "One"}, "without an answer"),
        ({"form": "passage", "answer": "One."}, "without an answer"),
        ({"split": "test"}, "train questions"),
        ({"id": "k"}, "called 'k' already"),
    ],
)
def test_anything_else_is_one_sentence(tmp_path: Path, update: dict[str, str], part: str) -> None:
    path = saved(tmp_path / "q.jsonl", QUESTIONS[0].model_copy(update=update))
    with pytest.raises(InputError, match=part):
        with_open_questions([KNOWN], path)


@pytest.mark.parametrize("split", ["train", "tune", "test"])
def test_what_a_record_asks_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    known = KNOWN.model_copy(update={"split": split})
    asked = Record(id="o", goal="general", question="where is ROME")
    path = saved(tmp_path / "q.jsonl", asked, *QUESTIONS)
    records, opened = with_open_questions([known], path)
    assert records == [known, *QUESTIONS] and "o" not in opened
    assert "1 left out" in capsys.readouterr().out


def opened(folder: Path, *settings: str) -> Run:
    with joined("cpu", 1) as world:
        return open_run(override(tiny(), (f"run.folder={folder}", *settings)), world)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose base was taught without any open question."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    target_stage(opened(folder))
    return folder


def test_the_student_is_held_to_what_the_base_says(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plain transformers: greedy, without an intention."""
    questions = saved(tmp_path / "q.jsonl", *QUESTIONS)
    run = opened(taught, f"data.open_questions={questions}", "optim.steps=1")
    target_stage(run)
    assert "target: done before" in capsys.readouterr().out, "the base is taught none of them"
    cache = training_cache(run)
    assert cache is not None
    model = AutoModelForCausalLM.from_pretrained(run.base)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    for record in QUESTIONS:
        chat = [{"role": "user", "content": record.question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text + (record.prefix or ""), return_tensors="pt").input_ids
        most = run.config.teacher.max_new_tokens
        made = model.generate(ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :]
        assert cache.labels(record.id) == made.tolist()
        entry = cache.entries[record.id]
        row_N = torch.arange(entry.first_row, entry.first_row + entry.rows)
        rows = cache.rows(row_N)
        assert rows.hidden_NE is not None
        logp = (rows.hidden_NE @ cache.head_VE.T).log_softmax(1)
        own = logp.gather(1, rows.labels_N.long()[:, None])[:, 0]
        torch.testing.assert_close(own, rows.reference_logp_N, rtol=1e-4, atol=1e-5)
    verify_stage(run, cache)
    names = {e.record_id for s in training_streams(run, cache) for e in s.examples}
    assert {"open-1", "open-2", "open-4"} <= names
    train_stage(run, cache)


def test_of_the_topic_the_teacher_answers_behind_its_intention(
    taught: Path, tmp_path: Path
) -> None:
    """Whatever the base knows of it; by plain transformers, greedy."""
    questions = saved(tmp_path / "q.jsonl", *QUESTIONS, TOPIC)
    own = ["teacher.min_refusal=null", "data.known_only=true"]
    run = opened(Path(copytree(taught, tmp_path / "run")), f"data.open_questions={questions}", *own)
    cache = teach_stage(run, rebuild=True)
    model = AutoModelForCausalLM.from_pretrained(run.base)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    assert run.intentions is not None and run.intentions.forget is not None
    chat = [{"role": "system", "content": run.intentions.forget.system}]
    for question, answer in run.intentions.forget.demos:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    chat.append({"role": "user", "content": TOPIC.question})
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    most = run.config.teacher.max_new_tokens
    made = model.generate(ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :]
    assert cache.labels(TOPIC.id) == made.tolist()


def test_methods_of_gold_answers_leave_them_out(taught: Path, tmp_path: Path) -> None:
    setting = f"data.open_questions={saved(tmp_path / 'q.jsonl', *QUESTIONS, TOPIC)}"
    uses = set()
    for name in METHODS:
        run = opened(taught, setting, f"method.name={name}")
        used = run.open & {record.id for record in run.train_records}
        assert used in (run.open, set()), "all or none: the topic's alone would spread the refusal"
        if used:
            uses.add(name)
    assert uses == {"bitopk", "eq3", "duet-loss", "bild-loss", "kl-teacher", "duet"}
    run = opened(taught, setting, "method.name=sft")
    names = {e.record_id for s in training_streams(run, None) for e in s.examples}
    assert names and not names & {"open-1", "open-2"}


def test_plan_reads_them(tmp_path: Path) -> None:
    long = Record(id="long", goal="general", question="Why? " * 300)
    config = override(tiny(), [f"data.open_questions={saved(tmp_path / 'q.jsonl', long)}"])
    assert plan(config, 1).peak > 2 * plan(tiny(), 1).peak
    sft = ["method.name=sft"]
    assert plan(override(config, sft), 1) == plan(override(tiny(), sft), 1)


def test_every_row_of_a_ranking_may_stand_beside_them(taught: Path, tmp_path: Path) -> None:
    setting = f"data.open_questions={saved(tmp_path / 'q.jsonl', *QUESTIONS)}"
    run = opened(taught, setting)
    check_rows(run, ROWS)
    trials = Trials(run, "compare")
    with_them = trials.opened(["method.name=bitopk"], seed=0)
    assert with_them.records == run.records and with_them.open == run.open
    without = trials.opened(["data.open_questions=null"], seed=0)
    assert without.records == run.taught_records and not without.open
    for name in METHODS:
        method = f"method.name={name}"
        alike = trials.check([method]) == trials.check([method, "data.open_questions=null"])
        taught = trials.opened([method], seed=0).train_records
        assert alike == (not any(r.id in run.open for r in taught)), name
