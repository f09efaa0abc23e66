"""The shipped records are what the quickstart promises; the run itself is measured, not tested."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from unteach.engine.config import Config
from unteach.engine.data.assemble import near_duplicates
from unteach.engine.data.open_questions import with_open_questions
from unteach.engine.data.records import GOALS, Record, check_disjoint, normalized, read_records
from unteach.engine.evaluate.suites import check_tests
from unteach.engine.teacher.intentions import Intention, load_intentions
from unteach.recipes.catalog import RECIPES, find_recipe, summary
from unteach.recipes.quickstart import quickstart
from unteach.recipes.wizards import wizards

CONFIG = quickstart()


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read_records(Path(CONFIG.data.path))


def chosen(records: list[Record], goal: str, split: str) -> list[Record]:
    return [r for r in records if r.goal == goal and r.split == split]


@pytest.mark.parametrize("goal", GOALS)
def test_each_goal_has_enough_records_and_untrained_facts(records: list[Record], goal: str) -> None:
    train, test = chosen(records, goal, "train"), chosen(records, goal, "test")
    plain = [r for r in train if not r.anchor_of]
    assert len(plain) >= 60 and len(test) >= 60
    trained = {r.meta["fact"] for r in records if r.split == "train"}
    held_out = {normalized(r.question) for r in test if r.meta["fact"] not in trained}
    assert len(held_out) >= 20
    assert all(r.answer for r in records)


def test_splits_share_no_question_and_no_attack_prefix(records: list[Record]) -> None:
    check_disjoint(records)
    check_tests(CONFIG.evaluate, [r for r in records if r.split == "test"], records)


def test_anchors_contrast_each_objective(records: list[Record]) -> None:
    by_id = {r.id: r for r in records}
    anchors = [r for r in records if r.anchor_of]
    assert len(anchors) >= 30
    assert {r.goal for r in anchors} == {"general", "neighbor"}
    assert all(by_id[r.anchor_of or ""].goal in ("forget", "attack") for r in anchors)
    assert sum(bool(r.prefix) for r in anchors) >= 10


def test_open_questions_are_like_none_that_is_scored(records: list[Record]) -> None:
    unseen = wizards().evaluate.open_questions
    assert CONFIG.data.open_questions is not None and unseen is not None
    together, ids = with_open_questions(records, Path(CONFIG.data.open_questions))
    assert Counter(r.goal for r in together if r.id in ids) == {
        "forget": 120,
        "neighbor": 332,
        "general": 294,
    }
    assert not near_duplicates([*together, *read_records(Path(unseen))])


@pytest.mark.parametrize("config", [quickstart(), wizards()], ids=["quickstart", "wizards"])
def test_demos_ask_no_question_of_the_records(config: Config) -> None:
    assert config.teacher.intentions is not None
    intentions = load_intentions(Path(config.teacher.intentions))
    asked = {normalized(r.question) for r in read_records(Path(config.data.path))}
    for goal in GOALS:
        intention = intentions.get(goal)
        assert isinstance(intention, Intention) and intention.system
        shown = [demo[0] for demo in (*intention.demos, *intention.prefix_demos)]
        assert shown and not asked & {normalized(question) for question in shown}


def test_shipped_mmlu_has_sixty_questions_with_shots() -> None:
    assert CONFIG.data.mmlu is not None
    text = Path(CONFIG.data.mmlu).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    tests = [row for row in rows if row["split"] == "test"]
    assert len(tests) == 60
    for subject in {row["subject"] for row in tests}:
        shots = [r for r in rows if r["subject"] == subject and r["split"] == "dev"]
        assert len(shots) == 5


def test_every_shipped_file_has_its_licence_named() -> None:
    folder = Path(CONFIG.data.path).parent
    text = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for file in folder.iterdir():
        assert file.name in text or file.name == "LICENSES.md", file.name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_and_say_what_they_do(name: str) -> None:
    assert find_recipe(name).run.folder == f"runs/{name}"
    assert summary(name)
