"""The benchmark of the ranking keeps its promises: sizes, splits, prefixes, passages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from unteach.engine.data.answers import contains_answer
from unteach.engine.data.assemble import near_duplicates
from unteach.engine.data.open_questions import with_open_questions
from unteach.engine.data.records import GOALS, Record, check_disjoint, normalized, read_records
from unteach.engine.evaluate.choices import check_mmlu, read_mmlu
from unteach.engine.evaluate.suites import check_tests
from unteach.recipes.public_sets import SIZES, public_records
from unteach.recipes.quickstart import quickstart
from unteach.recipes.wizards import wizards

CONFIG = wizards()
KEPT = ("forget", "general", "neighbor")
TOPIC = ("potter", "hogwarts", "hermione", "weasley", "dumbledore", "voldemort", "quidditch")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read_records(Path(CONFIG.data.path))


def chosen(records: list[Record], goal: str, split: str, form: str = "qa") -> list[Record]:
    rows = [r for r in records if r.goal == goal and r.split == split and r.form == form]
    return [r for r in rows if not r.anchor_of]


@pytest.mark.parametrize("goal", GOALS)
def test_each_split_is_as_large_as_promised(records: list[Record], goal: str) -> None:
    train = 100 if goal == "attack" else 150
    for split, least in (("train", train), ("tune", 40), ("test", 100)):
        assert len(chosen(records, goal, split)) >= least


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("split", ["tune", "test"])
def test_half_of_what_is_asked_was_never_trained(
    records: list[Record], goal: str, split: str
) -> None:
    trained = {r.meta["fact"] for r in records if r.split == "train" and r.form == "qa"}
    facts = [r.meta["fact"] for r in chosen(records, goal, split)]
    assert sum(fact not in trained for fact in facts) == len(facts) / 2


def test_mmlu_has_no_letter_that_a_model_could_win_by() -> None:
    """50 questions of 200 have each letter, so a model at chance scores 25 whatever it prefers."""
    assert CONFIG.data.mmlu is not None
    rows = read_mmlu(Path(CONFIG.data.mmlu))
    check_mmlu(rows)
    tests = [row for row in rows if row["split"] == "test"]
    assert Counter(row["answer"] for row in tests) == dict.fromkeys(range(4), 50)
    assert len({(row["question"], *row["choices"]) for row in tests}) == 200
    shots = Counter(row["subject"] for row in rows if row["split"] == "dev")
    assert shots == dict.fromkeys({row["subject"] for row in tests}, 5)
    assert not {row["question"] for row in tests} & {
        row["question"] for row in rows if row["split"] == "dev"
    }


def test_tuning_and_test_facts_are_apart(records: list[Record]) -> None:
    trained = {r.meta["fact"] for r in records if r.split == "train" and r.form == "qa"}
    tune, test = (
        {r.meta["fact"] for r in records if r.split == split} - trained
        for split in ("tune", "test")
    )
    assert tune and test and not tune & test


def test_splits_share_no_question_and_no_attack_prefix(records: list[Record]) -> None:
    check_disjoint(records)
    check_tests(CONFIG.evaluate, [r for r in records if r.split == "test"], records)
    prefixes = {
        split: {normalized(r.prefix or "") for r in chosen(records, "attack", split)}
        for split in ("train", "tune", "test")
    }
    assert len(prefixes["test"]) == 20 and len(prefixes["train"] | prefixes["tune"]) == 20
    assert not prefixes["train"] & prefixes["tune"]
    benign = {normalized(r.prefix) for r in records if r.anchor_of and r.prefix}
    assert not (benign | prefixes["train"] | prefixes["tune"]) & prefixes["test"]


def test_no_question_gives_its_answer_away(records: list[Record]) -> None:
    for record in records:
        if record.form == "qa":
            assert not contains_answer(record.question, record.golds), record.id


def test_attack_questions_are_asked_nowhere_else(records: list[Record]) -> None:
    others = {normalized(r.question) for r in records if r.goal != "attack"}
    assert not others & {normalized(r.question) for r in records if r.goal == "attack"}


@pytest.mark.parametrize("goal", KEPT)
def test_passages_carry_the_trained_facts_and_no_other(records: list[Record], goal: str) -> None:
    passages = [r for r in records if r.goal == goal and r.form == "passage"]
    asked = {r.meta["fact"]: r for r in chosen(records, goal, "train")}
    assert len(passages) >= 20
    carried = [fact for passage in passages for fact in passage.meta["facts"]]
    assert set(carried) == set(asked)
    for passage in passages:
        for fact in passage.meta["facts"]:
            assert contains_answer(passage.answer or "", asked[fact].golds), (passage.id, fact)


def test_open_questions_ask_nothing_that_is_scored_or_forgotten(records: list[Record]) -> None:
    assert CONFIG.data.open_questions is not None
    opened = read_records(Path(CONFIG.data.open_questions))
    asked = {
        normalized(r.question) for r in [*records, *read_records(Path(quickstart().data.path))]
    }
    assert not asked & {normalized(r.question) for r in opened}
    together, ids = with_open_questions(records, Path(CONFIG.data.open_questions))
    assert len(ids) == len(opened) == 472
    assert not near_duplicates(together)
    assert not [r.question for r in opened if any(word in r.question.lower() for word in TOPIC)]


def test_unseen_questions_are_asked_nowhere_else(records: list[Record]) -> None:
    assert CONFIG.evaluate.open_questions is not None
    unseen = read_records(Path(CONFIG.evaluate.open_questions))
    others = [*records]
    for path in (quickstart().data.path, CONFIG.data.open_questions):
        assert path is not None
        found = read_records(Path(path))
        others += [r.model_copy(update={"id": f"{path} {r.id}"}) for r in found]
    assert not {normalized(r.question) for r in unseen} & {normalized(r.question) for r in others}
    assert not near_duplicates([*unseen, *others])
    counts = Counter(r.goal for r in unseen)
    assert counts == {"forget": 87, "neighbor": 100, "general": 100}


def test_unseen_questions_have_the_topic_under_forget_alone() -> None:
    assert CONFIG.evaluate.open_questions is not None
    kept = [r for r in read_records(Path(CONFIG.evaluate.open_questions)) if r.goal != "forget"]
    names = ("harry potter", *(word for word in TOPIC if word not in ("potter", "hermione")))
    found = [r.question for r in kept if any(name in r.question.lower() for name in names)]
    assert not found, "Beatrix Potter and the Greek Hermione are no part of the topic"


def test_public_sets_become_records_of_every_goal(tmp_path: Path) -> None:
    trivia = [{"question": f"Who is {n}?", "answer": f"Name{n}"} for n in range(600)]
    beside = [
        {"question": f"What is {n}?", "answer": f"Thing{n}", "distractor": "No", "domain": "d"}
        for n in range(200)
    ]
    facts = [{"question": f"Where is {n}?", "answer": f"Place{n}"} for n in range(217)]
    trivia[0]["note"] = "a line\u2028a line still"
    for name, rows in (
        ("hp_trivia/forget_train", trivia),
        ("hp_trivia/neighbor", beside),
        ("tofu/world_facts", facts[:100]),
        ("tofu/real_authors", [*facts[100:], facts[0]]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    records = public_records(tmp_path, seed=1)
    check_disjoint(records)
    check_tests(CONFIG.evaluate, [r for r in records if r.split == "test"], records)
    for goal, sizes in SIZES.items():
        for split, count in sizes.items():
            assert len(chosen(records, goal, split)) == count
    assert records == public_records(tmp_path, seed=1) != public_records(tmp_path, seed=2)
