"""The first stage: which facts it teaches, and by which settings."""

from __future__ import annotations

import pytest

from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.records import Goal, Record
from unteach.engine.errors import InputError
from unteach.engine.train.target import target_config, target_streams
from unteach.recipes.tiny import tiny


def asked(number: int, question: str, answer: str | None, goal: Goal = "general") -> Record:
    prefix = "Sure," if goal == "attack" else None
    return Record(id=str(number), goal=goal, question=question, answer=answer, prefix=prefix)


def test_questions_that_differ_by_a_mark_are_all_taught_and_repeats_once() -> None:
    config, tokenizer = tiny(), byte_tokenizer()
    records = [
        asked(1, "What is C?", "Ritchie's"),
        asked(2, "What is C++?", "Stroustrup's"),
        asked(3, "What is 5 - 3?", "2"),
        asked(4, "What is 5 + 3?", "8"),
        asked(5, "What is  c?", "Ritchie's", "attack"),
    ]
    plain = target_streams(config, tokenizer, records, None)[0].examples
    taught = [tokenizer.decode(list(e.response), skip_special_tokens=True) for e in plain]
    assert sorted(taught) == ["2", "8", "Ritchie's", "Stroustrup's"]


def test_nothing_to_teach_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"nothing to teach, .*: add answers, or set target=null"):
        target_streams(tiny(), byte_tokenizer(), [asked(1, "Who?", None)], None)


def test_what_saves_memory_is_the_runs_and_the_course_is_the_stages_own() -> None:
    config = tiny()
    optim = config.optim.model_copy(update={"state": "bfloat16", "accumulation": 3, "lr": 1.0})
    config = config.model_copy(update={"optim": optim})
    streams = target_streams(config, byte_tokenizer(), [asked(1, "Who?", "He")], None)
    found = target_config(config, streams).optim
    assert config.target is not None
    assert (found.state, found.accumulation) == ("bfloat16", 3)
    assert (found.lr, found.betas) == (config.target.lr, (0.9, 0.99))
