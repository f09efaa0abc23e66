"""The benchmark recipes on rows of each benchmark's shape, with a model made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_sources import BENCHMARKS, folder_of
from unteach.engine.config import Config, override
from unteach.engine.data.records import counts, normalized, read_records
from unteach.engine.run import open_run
from unteach.engine.stages import run_all
from unteach.engine.teacher.intentions import load_intentions
from unteach.engine.train.parallel import joined
from unteach.recipes.benchmarks import PAPER_MODEL
from unteach.recipes.catalog import RECIPES, find_recipe

NAMES = ("muse-books", "wmdp-cyber", "rwku", "tofu")
SMALL = (
    "model.path=tiny",
    "model.dtype=float32",
    "data.known_only=false",
    "data.mmlu=null",
    "teacher.dtype=float32",
    "teacher.min_refusal=null",
    "teacher.min_agreement=null",
    "teacher.max_new_tokens=4",
    "method.k=4",
    "optim.steps=2",
    "optim.warmup_steps=0",
    'data.mix={"forget": 1, "attack": 1, "neighbor": 1, "general": 1}',
    "parallel.dtype=float32",
    "parallel.checkpointing=off",
    "evaluate.max_new_tokens=4",
    "evaluate.prefixed=false",
)


def local(name: str, root: Path) -> Config:
    folder = folder_of(name, root)
    settings = [*SMALL, f"data.path={folder}", f"run.folder={root / 'run'}"]
    if name == "tofu":
        short = ("epochs=0.1", "prefix_epochs=0", "intention_epochs=0", "batch_size=8")
        settings += [f"target.{each}" for each in short]
    return override(find_recipe(name), settings)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_name_the_hub_data_and_the_papers_model(name: str) -> None:
    config = RECIPES[name]()
    assert config.model.path == PAPER_MODEL and config.data.source == name
    assert config.data.path == "" and (config.target is not None) is (name == "tofu")
    assert config.teacher.intentions is not None
    load_intentions(Path(config.teacher.intentions))


@pytest.mark.parametrize("name", NAMES)
def test_every_goal_has_rows_to_train_and_to_test(name: str, tmp_path: Path) -> None:
    config = local(name, tmp_path)
    with joined("cpu", 1) as world:
        run = open_run(config, world)
    tally = counts(run.records)
    for goal in ("forget", "general", "neighbor", "attack"):
        assert tally.get(f"{goal}/train") and tally.get(f"{goal}/test"), (goal, tally)
    assert (tmp_path / "run/data/records.md").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_walk_on_local_rows(name: str, tmp_path: Path) -> None:
    config = local(name, tmp_path)
    with joined("cpu", 1) as world:
        run_all(open_run(config, world))
    summary: dict[str, Any] = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
    assert {"forget", "general", "neighbor", "attack"} <= set(summary["model"])
    assert (tmp_path / "run/report.md").stat().st_size


def test_a_file_of_records_stands_in_for_the_benchmark(tmp_path: Path) -> None:
    shipped = find_recipe("quickstart").data.path
    settings = [*SMALL, f"data.path={shipped}", f"run.folder={tmp_path / 'run'}"]
    with joined("cpu", 1) as world:
        run = open_run(override(find_recipe("muse-books"), settings), world)
    assert run.records == read_records(Path(shipped))


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_ask_nothing_that_stands_beside_the_benchmark(name: str) -> None:
    config = find_recipe(name)
    asked = {
        normalized(r.question) for path in config.data.beside for r in read_records(Path(path))
    }
    intentions = load_intentions(Path(config.teacher.intentions or ""))
    for goal in ("forget", "general", "neighbor", "attack"):
        intention = intentions.get(goal)  # type: ignore[arg-type]
        assert intention is not None
        for demo in (*intention.demos, *intention.prefix_demos):
            assert normalized(demo[0]) not in asked


def test_the_shapes_are_those_of_the_loaders() -> None:
    assert set(NAMES) <= set(BENCHMARKS)
