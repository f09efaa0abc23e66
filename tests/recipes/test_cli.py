from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unteach.engine.config import keys, override
from unteach.recipes import cli
from unteach.recipes.catalog import RECIPES, described_settings, find_recipe
from unteach.recipes.cli import KERNELS, app
from unteach.recipes.opening import resolve


def unteach(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unteach.recipes.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_recipes_are_listed_one_a_line() -> None:
    lines = unteach("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_settings_of_a_recipe_are_listed_as_set_takes_them(name: str) -> None:
    settings = [line.partition("  # ")[0] for line in described_settings(name)]
    assert override(find_recipe("tiny"), settings) == find_recipe(name)
    listed = {setting.partition("=")[0] for setting in settings}
    assert {key for key in keys() if key.split(".")[0] not in listed} == listed & keys().keys()


def test_a_key_that_is_not_there_leads_to_the_list_of_those_that_are() -> None:
    done = unteach("run", "tiny", "--set", "nothing.like=1")
    assert done.returncode == 2 and "`unteach recipes RECIPE` lists every key" in done.stderr
    assert (
        "method.alpha=1.0  # weight of the student's top-K set" in unteach("recipes", "tiny").stdout
    )


def test_a_file_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "runs/tiny/seeds.bin")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told == "Error: runs/tiny/seeds.bin cannot be used (Permission denied).\n"
    monkeypatch.setattr(sys, "argv", ["unteach", "--debug"])
    with pytest.raises(PermissionError):
        cli.main()


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "teach",
        "train",
        "evaluate",
        "report",
        "recipes",
        "bench",
        "compare",
        "study",
        "gradients",
        "standardize",
        "prefixes",
        "plan",
    ],
)
def test_help_shows_an_example(command: str) -> None:
    done = unteach(command, "--help")
    assert done.returncode == 0
    assert "Example:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run", "quikstart"), "did you mean quickstart?"),
        (("run",), "Name a recipe"),
        (("run", "tiny", "--config", "x.yaml"), "one of the two"),
        (("run", "--config", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        (("run", "tiny", "--set", "optim.lrr=1"), "did you mean optim.lr?"),
        (("report", "tiny"), "`unteach evaluate`"),
        (("plan", "tiny", "--memory", "inf"), "give a number of GiB"),
        (("bench", "bitopq"), "choose bitopk, linear_topk, gather_linear"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...], part: str
) -> None:
    plain = "--set" in arguments or "bench" in arguments
    here = () if plain else ("--set", f"run.folder={tmp_path}")
    done = unteach(*arguments, *here)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = unteach("run", "quikstart", "--debug", "--set", f"run.folder={tmp_path}")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_bench_hands_its_options_on(tmp_path: Path) -> None:
    case = ("--preset", "tiny", "--tokens", "8", "--k", "3", "--rounds", "1")
    done = unteach("bench", "bitopk", *case, "--providers", "eager", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = (tmp_path / "bench_bitopk.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["provider"] == "eager"


def test_bench_takes_options_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in KERNELS:
        monkeypatch.setattr(f"unteach.benchmarks.bench_{name}.main", seen.append)
    done = CliRunner().invoke(app, ["bench", "--preset", "tiny"])
    assert done.exit_code == 0, done.output
    assert seen == [["--preset", "tiny"]] * len(KERNELS)


def test_other_records_stand_without_the_recipes_open_questions() -> None:
    own = find_recipe("wizards")
    assert own.data.open_questions and own.evaluate.open_questions
    same = resolve("wizards", None, ["optim.steps=1"])
    assert same.data.open_questions == own.data.open_questions
    other = resolve("wizards", None, ["data.path=mine.jsonl"])
    assert (other.data.open_questions, other.evaluate.open_questions) == (None, None)
    asked = [
        "data.open_questions=q.jsonl",
        "data.path=mine.jsonl",
        "evaluate.open_questions=u.jsonl",
    ]
    both = resolve("wizards", None, asked)
    assert (both.data.open_questions, both.evaluate.open_questions) == ("q.jsonl", "u.jsonl")
