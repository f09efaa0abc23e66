"""The whole walk of recipe tiny, and what stands in the run folder afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.test_run import opened
from unteach.engine.config import load_config
from unteach.engine.errors import InputError
from unteach.engine.stages import report_stage, run_all

TARGET = ("--set", "target.epochs=1")


def unteach(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        command(*arguments, folder=folder), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(*arguments: str, folder: Path) -> list[str]:
    settings = (f"run.folder={folder}", "run.device=cpu", "run.threads=1")
    chosen = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "unteach.recipes.cli", *arguments, *chosen]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "run"
    unteach("run", "tiny", folder=folder)
    return folder


def test_the_run_folder_holds_all_that_it_promises(walked: Path) -> None:
    files = ["config.yaml", "environment.json", "train.jsonl", "report.md", "report.html"]
    files += ["radar.png", "loss.png", "evaluation/summary.json", "evaluation/samples.jsonl"]
    files += ["model/config.json", "model/model.safetensors", "model/README.md"]
    files += ["cache/manifest.json", "cache/head.safetensors", "cache/rows-00000.safetensors"]
    assert [name for name in files if not (walked / name).is_file()] == []
    summary = json.loads((walked / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    for side in (summary["base"], summary["model"]):
        assert side.keys() == {"forget", "general", "neighbor", "attack"}
        assert all(score.keys() == {"value", "n", "low", "high"} for score in side.values())
    assert not list(walked.rglob("*.partial"))


def test_a_second_run_changes_nothing(walked: Path) -> None:
    names = ("cache", "model/model.safetensors", "target", "evaluation", "config.yaml")
    before = {name: value for name, value in digests(walked).items() if name.startswith(names)}
    output = unteach("run", "--config", str(walked / "config.yaml"), folder=walked)
    assert output.count("done before, skipped") == 5
    after = {name: value for name, value in digests(walked).items() if name.startswith(names)}
    assert after == before


def test_transformers_alone_answers_as_the_samples_say(walked: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(walked / "model")
    tokenizer = AutoTokenizer.from_pretrained(walked / "model")
    lines = (walked / "evaluation" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    asked = [s for s in samples if s["model"] == "model" and s["suite"] in ("forget", "attack")]
    assert len(asked) == 7
    for sample in asked:
        chat = [{"role": "user", "content": sample["question"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        text += (sample["prefix"] or "").rstrip()
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        answer = model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == sample["generation"]


def test_cache_is_the_teachers_own_forward(walked: Path) -> None:
    assert "100.00% have the model's own argmax" in unteach(
        "teach", "tiny", "--verify", folder=walked
    )


def test_teach_killed_goes_on_to_the_same_bytes(walked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("teach", "tiny", folder=folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    until = time.monotonic() + 120
    while not (folder / "cache" / "rows-00001.safetensors").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    unteach("teach", "tiny", folder=folder)
    assert digests(folder / "cache") == digests(walked / "cache")


def test_a_config_that_is_gone_or_cut_is_written_again_by_the_command_that_made_it(
    walked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = walked / "config.yaml"
    whole, before = path.read_bytes(), digests(walked)
    optim = whole.index(b"optim:")
    faults = [None, b"", b"\xff" + whole, whole[:optim], whole[: optim + 3], whole[:-2]]
    for content in faults:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        run = opened(walked, "run.device=cpu", "run.threads=1")
        with pytest.raises(InputError, match=r"config\.yaml .*: give `unteach run` with the"):
            report_stage(run)
        run_all(run)
        assert path.read_bytes() == whole and digests(walked) == before
        assert "written again from this command's settings" in capsys.readouterr().out
    run_all(opened(walked, "run.device=cpu", "run.threads=1", "run.log_every=7"))
    assert path.read_bytes() == whole, "of a whole one, what it says stays"


@pytest.mark.parametrize("damage", ['{"schema', '{"schema_version": 2}'])
def test_a_damaged_manifest_is_mended_by_the_command_that_its_error_names(
    walked: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(walked, folder)
    (folder / "cache" / "manifest.json").write_text(damage)
    with pytest.raises(AssertionError, match=r"`unteach teach --rebuild` makes it again"):
        unteach("teach", "tiny", folder=folder)
    unteach("teach", "tiny", "--rebuild", folder=folder)
    assert digests(folder / "cache") == digests(walked / "cache")


def test_scoring_and_reporting_say_what_the_model_was_made_with(
    walked: Path, tmp_path: Path
) -> None:
    """Settings of a later command made nothing, and scores are of the weights beside them."""
    folder = tmp_path / "run"
    shutil.copytree(walked, folder)
    made = load_config(folder / "config.yaml")
    other = ("--set", "method.name=sft", "--set", "optim.lr=0.5", "--set", "evaluate.few_shot=1")
    unteach("evaluate", "tiny", *other, folder=folder)
    after = load_config(folder / "config.yaml")
    assert after.evaluate.few_shot == 1
    assert (after.method, after.optim) == (made.method, made.optim)
    unteach("report", "tiny", "--set", "method.name=ga", folder=folder)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"`{made.method.name}`" in card and "`ga`" not in card
    weights = folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = subprocess.run(
        command("report", "tiny", folder=folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "is not the model that was scored" in done.stderr
    assert (folder / "model" / "README.md").read_text(encoding="utf-8") == card


@pytest.mark.parametrize("stage", ["evaluate", "prefixes"])
def test_models_of_other_records_are_not_asked_as_if_these_had_made_them(
    walked: Path, tmp_path: Path, stage: str
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other.jsonl"
    shutil.copytree(walked, folder)
    made = Path(load_config(folder / "config.yaml").data.path).read_text(encoding="utf-8")
    other.write_text(made.replace("?", "??", 1), encoding="utf-8")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    asked = command(stage, "tiny", "--set", f"data.path={other}", folder=folder)
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "were made with another records: give the settings of that run" in done.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("place", ["model", "target/model", "tiny"])
def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path, place: str) -> None:
    mine = tmp_path / "run" / place / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    folder = tmp_path / "run"
    done = subprocess.run(
        command("run", "tiny", *TARGET, "--set", "optim.steps=1", folder=folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and f"{place} " in done.stderr and done.stderr.count("\n") == 1
    assert mine.read_text() == "mine"
    if place == "model":  # what was taught before stays of use
        mine.unlink()
        mine.parent.rmdir()
        unteach("train", "tiny", *TARGET, "--set", "optim.steps=1", folder=folder)


@pytest.mark.parametrize(
    ("stage", "setting", "why"),
    [
        ("train", "optim.lr=0.5", "was made with another optim"),
        ("teach", "teacher.max_new_tokens=4", "was made with other teacher.max_new_tokens"),
        ("train", "optim.lr=0.25", "Another unteach command is at stage train"),
    ],
)
def test_a_command_that_is_refused_leaves_the_settings_of_what_is_there(
    walked: Path, tmp_path: Path, stage: str, setting: str, why: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(walked, folder)
    (folder / "stamps" / "train.json").unlink()
    manifest = folder / "cache" / "manifest.json"
    if stage == "teach":
        manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    before = (folder / "config.yaml").read_bytes()
    with (folder / ".train.lock").open("a") as lock:
        if "Another" in why:
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            command(stage, "tiny", "--set", setting, folder=folder),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and why in done.stderr
    assert (folder / "config.yaml").read_bytes() == before
