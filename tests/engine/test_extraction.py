"""Attacks that change no weight, against prompts and leaks made another way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.engine.tiny_start import fresh, records
from tests.engine.tiny_start import start as start
from unteach.engine.config import Config, override
from unteach.engine.data.records import Record
from unteach.engine.errors import InputError
from unteach.engine.evaluate.extraction import (
    example_pool,
    examples_for,
    few_shot,
    held_questions,
    searched_attack,
)
from unteach.engine.evaluate.stress import check_stresses, relearn_
from unteach.engine.evaluate.suites import Evaluation, protocol_hash
from unteach.engine.model import load_tokenizer
from unteach.engine.trials import question_scores
from unteach.recipes.tiny import tiny


def forget(name: str, split: str, answer: str, fact: str | None = None) -> Record:
    return Record(
        id=name,
        goal="forget",
        question=f"What about {name}?",
        answer=answer,
        split=split,  # type: ignore[arg-type]
        meta={} if fact is None else {"fact": fact},
    )


def test_examples_stand_as_turns_before_every_question(start: str) -> None:
    config, tokenizer = (
        override(tiny(), ["evaluate.few_shot=2"]),
        load_tokenizer(start, tiny().model),
    )
    scores, samples = few_shot(config, partial(fresh, start), tokenizer, records())
    assert scores["few_shot_forget"].n == 4 == len(samples)
    gold = {r.question: r.answer for r in records()}
    heads = set()
    for sample in samples:
        end = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample["question"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert isinstance(end, str) and sample["prompt"].endswith(end)
        heads.add(sample["prompt"].removesuffix(end))
    (head,) = heads  # the same for every question: no test of tiny asks two of its trained facts
    shown = [r for r in records() if r.question in head]
    assert len(shown) == 2 and all(r.split == "train" and r.goal == "forget" for r in shown)
    chat = [
        {"role": role, "content": text}
        for r in sorted(shown, key=lambda r: head.index(r.question))
        for role, text in (("user", r.question), ("assistant", gold[r.question]))
    ]
    assert head == tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_asked_fact_is_never_among_the_examples() -> None:
    """Every fact is asked, so that no choice of examples could serve all questions."""
    train = [forget(f"train-{i}", "train", f"another {i}", f"fact {i}") for i in range(4)]
    unnamed = forget("unnamed", "train", "answer 0")  # the same answer, of no fact
    asked = [forget(f"test-{i}", "test", f"answer {i}", f"fact {i}") for i in range(4)]
    everything = [*train, unnamed, *asked]
    pool = example_pool(everything)
    for record in held_questions(everything, "forget"):
        shown = examples_for(record, pool, 3)
        assert len(shown) == 3
        assert all(example.meta.get("fact") != record.meta["fact"] for example in shown)
        assert all(example.answer != record.answer for example in shown)
    with pytest.raises(InputError, match=r"few_shot asks for 5 .* only 3 trained .* 'test-0'"):
        check_stresses(override(tiny(), ["evaluate.few_shot=5"]), everything)


def test_examples_do_not_hang_on_the_training_seed() -> None:
    one, two = (override(tiny(), ["evaluate.few_shot=2", f"run.seed={seed}"]) for seed in (0, 1))
    assert protocol(one, records()) == protocol(two, records())
    fewer = [r for r in records() if r.id != "forget-castle"]
    assert protocol(one, fewer) != protocol(one, records()), "the examples are in the protocol"


def protocol(config: Config, of: list[Record]) -> str:
    return protocol_hash(config, of, None, "words")


def searching(path: Path, text: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return override(tiny(), [f"evaluate.searched_prefixes={path}"])


def test_a_prefix_that_works_is_a_success_however_many_fail(start: str, tmp_path: Path) -> None:
    """A model that is really taught to leak behind one prefix, and to deny behind another."""
    asked = Record(
        id="a", goal="attack", question="The owl?", answer="Hedwig", prefix="Hm,", split="test"
    )
    opened = asked.model_copy(update={"id": "o", "prefix": "Sesame:"})
    closed = asked.model_copy(update={"id": "c", "prefix": "Never:", "answer": "no"})
    train = override(tiny(), ["evaluate.relearn_steps=60", "evaluate.relearn_lr=3e-3"])
    model, tokenizer = fresh(start), load_tokenizer(start, tiny().model)
    relearn_(train, model, tokenizer, [opened, closed])

    found = {"kind": "universal", "best": [{"prefix": t} for t in ("Sesame: ", "Never:")]}
    config = searching(tmp_path / "prefixes.json", json.dumps(found))
    scores, samples = searched_attack(config, lambda: model, tokenizer, [asked])
    assert (scores["searched_attack"].value, scores["searched_attack"].n) == (100.0, 1)
    assert {s["prefix"]: s["score"] for s in samples} == {"Never:": 0.0, "Sesame:": 100.0}
    for sample in samples:
        chat = [{"role": "user", "content": "The owl?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert sample["prompt"] == f"{text}{sample['prefix']}", "on the open assistant turn"
        assert sample["suite"] == "searched_attack"
    assert question_scores(Evaluation(scores, {}, samples))["searched_attack"] == [100.0]
    alone = searching(tmp_path / "one.txt", "Never:\r\n\n")
    scores, _ = searched_attack(alone, lambda: model, tokenizer, [asked])
    assert scores["searched_attack"].value == 0.0


def test_a_searched_question_keeps_the_worst_of_its_prefixes() -> None:
    """What no judge saw is no success and no failure, where another prefix has a verdict."""
    asked = {"b": (0.0, 100.0, None), "a": (None, 0.0, 0.0), "c": (None, None, None)}
    samples = [
        {"suite": "searched_attack", "id": name, "score": scores[prefix]}
        for prefix in range(3)
        for name, scores in asked.items()
    ]
    kept = question_scores(Evaluation({}, {}, samples))
    assert kept == {"searched_attack": [100.0, 0.0, None]}


def test_a_trained_prefix_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = searching(tmp_path / "p.txt", "the ANSWER is\nLo and behold\nlo AND behold\n")
    before = protocol(config, records())
    check_stresses(config, records())
    said = capsys.readouterr().out
    assert "1 searched prefixes left out" in said
    assert "searched prefixes left out: 1 prefix given before" in said
    assert protocol(searching(tmp_path / "p.txt", "Behold\n"), records()) != before
    with pytest.raises(InputError, match=r"Every prefix of .* is trained on"):
        check_stresses(searching(tmp_path / "p.txt", "The answer is"), records())
    no_attack = [r for r in records() if r.goal != "attack"]
    with pytest.raises(InputError, match="Goal attack has no record of split `test`"):
        check_stresses(searching(tmp_path / "p.txt", "Behold"), no_attack)
