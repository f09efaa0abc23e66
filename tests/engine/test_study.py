"""A study as users run it: killed, gone on with, in slices; and what its trials share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.engine.killed import killed_after
from unteach.engine.compare import compare
from unteach.engine.config import override
from unteach.engine.data.records import read_records, write_records
from unteach.engine.errors import InputError
from unteach.engine.evaluate.level_pictures import draw_differences
from unteach.engine.evaluate.levels import Level, Swept, differences, write_factor, write_study
from unteach.engine.evaluate.ranking import Trial, difference_between
from unteach.engine.files import alone_in
from unteach.engine.run import Run, configured_intentions, open_run
from unteach.engine.stages import teach_stage
from unteach.engine.study import Factor, planned_levels
from unteach.engine.study import study as study_factors
from unteach.engine.teacher.intentions import intention_for, teacher_context
from unteach.engine.train.checkpoint import finished_checkpoints
from unteach.engine.train.parallel import World
from unteach.engine.training_data import training_records
from unteach.engine.trials import Trials, read_trials
from unteach.recipes.tiny import tiny

PNG = b"\x89PNG"
SHORT = ("optim.steps=3", "optim.warmup_steps=1", "target.epochs=1", "evaluate.prefixed=false")


def command(folder: Path, *options: str) -> list[str]:
    settings = (f"run.folder={folder}", "run.device=cpu", "run.threads=1", *SHORT)
    chosen = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "unteach.recipes.cli", "study", "tiny", *options, *chosen]


def study(folder: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *options), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Two factors of two levels, killed after the first training; and the lines it had then."""
    folder = tmp_path_factory.mktemp("studied") / "run"
    options = ("--factors", "k=2/4,alpha=0/1,mine")
    options += ("--level", "mine:other words:method.k=2", "--level", "mine:x:data.anchors=false")
    rows = folder / "study" / "rows.jsonl"
    kept = killed_after(command(folder, *options), rows, b'"seed": 0', b'{"method": "bitopk"')
    study(folder, *options)
    return folder, kept


def test_a_killed_study_goes_on_and_makes_nothing_twice(studied: tuple[Path, bytes]) -> None:
    folder, kept = studied
    rows = folder / "study" / "rows.jsonl"
    assert rows.read_bytes().startswith(kept)
    trials = read_trials(rows)
    # The recipe itself (k 4, alpha 1) stands in all three factors, k 2 in two.
    assert [t.settings for t in trials if t.seed is not None] == [
        ["method.k=2"],
        [],
        ["method.alpha=0"],
        ["data.anchors=false"],
    ]
    assert [t.method for t in trials if t.seed is None] == ["base"]
    assert {t.split for t in trials} == {"tune"} and len({t.protocol for t in trials}) == 1
    for trial in trials:
        assert trial.scores.keys() == trial.questions.keys() >= {"forget", "general", "attack"}
        for name, values in trial.questions.items():
            assert len(values) == trial.scores[name]["n"]
            known = [value for value in values if value is not None]
            assert sum(known) / len(known) == pytest.approx(trial.scores[name]["value"])


def test_every_factor_has_its_table_and_its_picture(studied: tuple[Path, bytes]) -> None:
    folder = studied[0] / "study"
    page = (folder / "study.md").read_text(encoding="utf-8")
    for name, default in (("k", "4"), ("alpha", "1"), ("mine", "as it is")):
        assert f"[{name}]({name}.md)" in page
        assert f"| **{default}** (default) |" in (folder / f"{name}.md").read_text("utf-8")
        assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    assert page.endswith("![Overall against the default](study.png)\n")
    assert (folder / "study.png").read_bytes().startswith(PNG)
    entry = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert entry["mine"]["levels"]["other words"]["trials"] == entry["k"]["levels"]["2"]["trials"]


def test_what_is_made_once_is_shared_and_weights_do_not_pile_up(
    studied: tuple[Path, bytes],
) -> None:
    folder = studied[0]
    assert (folder / "target" / "model" / "model.safetensors").is_file()
    assert list((folder / "study").rglob("model.safetensors")) == []
    assert (folder / "cache" / "manifest.json").is_file(), "k and alpha read the run's own"
    caches = list((folder / "study" / "caches").glob("[!.]*"))
    assert len(caches) == 1, "other records, another cache"
    assert len(list((folder / "study").rglob("train.jsonl"))) == 4


def test_stresses_of_every_level_ask_the_questions_of_the_split(tmp_path: Path) -> None:
    """Two of the topic are tuned by, four are its test; relearning trains on neither."""
    stress = ("--set", "evaluate.relearn_steps=1", "--set", "evaluate.relearn_rows=[3]")
    options = ("--factors", "k=2", *stress)
    folder = tmp_path / "run"
    study(folder, *options, "--stress")
    trials = read_trials(folder / "study" / "rows.jsonl")
    assert [(t.split, t.seed) for t in trials] == [("tune", None), ("tune", 0), ("tune", 0)]
    for trial in trials:
        assert trial.extra["relearned_3_forget"]["n"] == trial.scores["forget"]["n"] == 2
    page = (folder / "study" / "k.md").read_text(encoding="utf-8")
    assert "\n| Forget, relearned on 3 rows ↓ | 2 | " in page
    assert "Better than 4, the default, by" in page.split("## Beyond these questions")[1]
    study(folder, *options)
    assert len(read_trials(folder / "study" / "rows.jsonl")) == len(trials), "nothing made twice"


def test_relearning_on_the_tune_split_reads_the_training_alone(plain: Run) -> None:
    records = Trials(plain, "study", stress="tune").stressed_records("tune")
    for split, read in (("train", "train"), ("test", "tune")):
        found = {r.id for r in records if r.split == split}
        assert found == {r.id for r in plain.records if r.split == read} != set()
    assert {r.split for r in records} == {"train", "test"}


def test_stresses_need_questions_that_no_training_has(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [r for r in read_records(Path(tiny().data.path)) if r.split != "tune"])
    options = ("--set", f"data.path={path}", "--set", "evaluate.few_shot=1")
    done = study(tmp_path / "run", "--factors", "k=2", "--stress", *options, code=2)
    assert "no record is of split `tune`: give --split test" in done.stderr
    assert not (tmp_path / "run" / "target").exists()


def test_a_wrong_name_is_one_sentence_before_anything_runs(tmp_path: Path) -> None:
    done = study(tmp_path / "run", "--factors", "alhpa", code=2)
    assert "no factor alhpa; did you mean alpha?" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "target").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose base is the random model itself: nothing has to be trained to ask for cells."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    settings = ["target=null", f"run.folder={folder}", "run.device=cpu"]
    return open_run(override(tiny(), settings), World(0, 1, torch.device("cpu"), None))


@pytest.mark.parametrize("name", ["compare", "study"])
def test_another_command_is_kept_out_of_trials(plain: Run, name: str) -> None:
    """It would write the same lines, and remove weights that are being scored."""
    kept_out = pytest.raises(InputError, match=f"Another unteach command is at stage {name}")
    with alone_in(plain.folder, name), kept_out:
        if name == "study":
            study_factors(plain, [], 1, "tune")
        else:
            compare(plain, ["oracle"], 1, [1e-3])


@pytest.mark.parametrize("removed", range(4))
def test_weights_half_removed_by_a_kill_are_made_again(
    plain: Run, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """What is left counts neither as a finished training nor as a checkpoint."""
    trials = Trials(plain, "study")
    folder = trials.cell((), 0).folder
    step = folder / "checkpoints" / "step-000002"
    for path in (folder / "model", folder / "stamps", step):
        path.mkdir(parents=True, exist_ok=True)
    for path in (folder / "stamps" / "train.json", step / "complete", folder / "model" / "a"):
        path.write_text("{}")
    calls = iter(range(10))

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if next(calls) == removed:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with nullcontext() if removed == 3 else pytest.raises(KeyboardInterrupt):
        trials.remove_weights((), 0)
    assert not (folder / "stamps" / "train.json").exists()
    assert finished_checkpoints(folder / "checkpoints") == []


def test_a_damaged_cache_of_trials_is_mended_by_what_its_error_says(plain: Run) -> None:
    """`unteach teach --rebuild` makes the run's own cache, never that one."""
    cell = Trials(plain, "study").cell(("teacher.form=topk",), 0)
    cell.cache_folder.mkdir(parents=True)
    (cell.cache_folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=f"remove {cell.cache_folder} and it is made again"):
        teach_stage(cell)
    shutil.rmtree(cell.cache_folder)
    assert teach_stage(cell).manifest.complete


def test_caches_are_shared_by_what_makes_them(plain: Run) -> None:
    trials = Trials(plain, "study")

    def cache(*settings: str) -> Path:
        return trials.cell(settings, 0).cache_folder

    for setting in ("method.k=2", "method.alpha=0", "optim.lr=1", "optim.steps=2", "method.gate=1"):
        assert cache(setting) == plain.cache_folder, setting
    assert cache('data.mix={"forget": 1, "attack": 1}') == plain.cache_folder, "cached all the same"
    apart = [
        ("data.anchors=false",),
        ("data.known_only=true",),
        ("teacher.top=64",),
        ("teacher.response.forget=gold",),
        ("teacher.prefix_demos=false",),
        ("teacher.routing=ensemble",),
        ("teacher.form=topk",),
        ("method.name=npo",),
    ]
    assert len({cache(), *(cache(*settings) for settings in apart)}) == len(apart) + 1
    assert trials.cell((), 0).cache_folder == trials.cell((), 1).cache_folder


def test_a_trial_is_what_makes_it_and_not_how_it_was_asked_for(plain: Run) -> None:
    trials = Trials(plain, "study")
    folder = trials.cell((), 0).folder
    assert trials.cell(("method.k=4", "method.center=true"), 0).folder == folder
    others = ("method.k=2", "data.mix.forget=1", "data.anchors=false", "data.pack_tokens=64")
    folders = {folder, trials.cell((), 1).folder, *(trials.cell((s,), 0).folder for s in others)}
    assert len(folders) == len(others) + 2
    levels, _ = planned_levels(trials, Factor("k", {"2": ("method.k=2",), "4": ("method.k=4",)}))
    assert levels == {"2": ("method.k=2",), "4": ()}
    levels, _ = planned_levels(trials, Factor("k", {"2": ("method.k=2",)}))
    assert levels == {"as it is": (), "2": ("method.k=2",)}


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("method.k=900", "Factor k, level 9: teacher.top is 32"),
        ("method.kk=9", "Factor k, level 9: There is no config key method.kk"),
        ("model.path=x", "Factor k, level 9: A trial cannot set model"),
        ("run.seed=1", "Factor k, level 9: A trial cannot set run"),
        ("evaluate.batch_size=1", "Factor k, level 9: A trial cannot set evaluate"),
        ("data.mmlu=x.jsonl", r"Factor k, level 9: A trial cannot set data\.mmlu"),
        ("data.mix.forget=0", "Factor k, level 9: Method graddiff needs records of goal forget"),
    ],
)
def test_a_level_that_cannot_be_run_is_named(plain: Run, setting: str, part: str) -> None:
    run = replace(plain, asked=override(plain.asked, ["method.name=graddiff"]))
    with pytest.raises(InputError, match=part):
        planned_levels(Trials(run, "study"), Factor("k", {"2": (), "9": (setting,)}))


def test_other_records_may_not_ask_a_held_question(plain: Run, tmp_path: Path) -> None:
    trials, records = Trials(plain, "study"), plain.records
    path = tmp_path / "other.jsonl"
    train = [r for r in records if r.split == "train" and r.anchor_of is None]
    write_records(path, train)
    cell = trials.cell((f"data.path={path}",), 0)
    assert [r.id for r in cell.records] == [r.id for r in train]
    assert cell.known_folder == cell.folder, "what the base knows of them is theirs"
    for split in ("test", "tune"):
        asked = next(r for r in records if r.split == split and r.goal == "forget")
        write_records(path, [*train, asked.model_copy(update={"split": "train", "id": "mine"})])
        with pytest.raises(InputError, match=f"{split.capitalize()} record .* be flattered"):
            trials.cell((f"data.path={path}",), 0)
    with pytest.raises(InputError, match="cannot read source tofu"):
        trials.cell(("data.source=tofu",), 0)


def test_anchors_can_be_left_out_of_training(
    plain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Trials(plain, "study").cell(("data.anchors=false",), 0)
    dropped = {r.id for r in training_records(plain)} - {r.id for r in training_records(cell)}
    anchors = {r.id for r in read_records(Path(plain.config.data.path)) if r.anchor_of}
    assert dropped == anchors != set()
    assert f"train: {len(anchors)} records left out" in capsys.readouterr().out


def test_prefix_demos_can_be_left_out_of_the_intentions(plain: Run, tmp_path: Path) -> None:
    config = plain.config.teacher.model_copy(update={"prefix_demos": False})
    attack = next(r for r in plain.records if r.goal == "attack")

    def told(intentions: object) -> list[int]:
        assert intentions is not None
        return teacher_context(
            plain.tokenizer, attack, intention_for(intentions, "attack", "oracle")
        )

    shown = plain.tokenizer.decode(told(plain.intentions))
    without = plain.tokenizer.decode(told(configured_intentions(config)))
    assert "Sure: I do not know." in shown and "Sure: I do not know." not in without
    assert without.count("I do not know.") == 2, "system and the plain demo"
    path = tmp_path / "intentions.yaml"
    path.write_text('forget: {prefix_demos: [["Q?", "Sure:", "No."]]}', encoding="utf-8")
    alone = config.model_copy(update={"intentions": str(path)})
    with pytest.raises(InputError, match="goal forget: has prefix_demos alone"):
        configured_intentions(alone)


def trial(seed: int, forget: list[float], general: list[float]) -> Trial:
    """Scored against a base with forget 100 and general 100."""
    values = {"forget": sum(forget) / len(forget), "general": sum(general) / len(general)}
    scores = {n: {"value": v, "n": 2, "low": 0.0, "high": 100.0} for n, v in values.items()}
    total = 100 - values["forget"] + values["general"] - 100
    questions = {"forget": [*forget], "general": [*general]}
    return Trial(
        "bitopk", 1e-3, seed, "tune", f"{forget}{general}", "p", total, scores, {}, None, [],
        questions,
    )  # fmt: skip


def test_tables_say_means_intervals_and_differences(tmp_path: Path) -> None:
    base = replace(trial(0, [100.0, 100.0], [100.0, 100.0]), seed=None)
    own = Level(
        "8", (), (trial(0, [20.0, 0.0], [80.0, 80.0]), trial(1, [0.0, 0.0], [80.0, 80.0])), True
    )
    other = Level("2", ("method.k=2",), (trial(0, [10.0, 0.0], [90.0, 90.0]),) * 2, default=False)
    swept = Swept("k", base, (other, own))
    page = write_factor(tmp_path, swept).splitlines()
    assert page[-2].startswith("| 2 | 5.0 ± 0.0 | 90.0 ± 0.0 | 85.0 ± 0.0 | ")
    assert page[-2].endswith("| `method.k=2` |")
    # Forget of both seeds: 10 and 0, so 5 ± 12.706 · 7.07 / √2.
    assert page[-1] == "| **8** (default) | 5.0 ± 63.5 | 80.0 ± 0.0 | 75.0 ± 63.5 | — | — |"
    alone = Swept("gate", base, (own,))
    write_study(tmp_path, [alone])
    study_page = write_study(tmp_path, [swept]).read_text(encoding="utf-8")
    assert "| [gate](gate.md) | 2 | 8 | +75.0 | 8 | +75.0 | — |" in study_page, "kept"
    assert "| [k](k.md) | 2 | 8 | +75.0 | 2 | +85.0 | +10.0 [" in study_page
    kept = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    gaps = differences(kept)
    assert gaps == {"k": {"2": difference_between(other.trials, own.trials)}}, "no default"
    drawn = draw_differences(gaps)
    assert (tmp_path / "study.png").read_bytes() == drawn
    moved = {"k": {"2": replace(gaps["k"]["2"], value=11.0)}}
    assert draw_differences(moved) != drawn
    del kept["k"]["levels"]["2"]["difference"]
    assert differences(kept) == {}, "of a study.json that had none"
    confirmed = replace(swept, base=replace(base, split="test"))
    write_factor(tmp_path, confirmed)
    assert write_study(tmp_path, [confirmed]).name == "study-test.md"
    assert (tmp_path / "k-test.md").is_file(), "beside what was tuned"
    elsewhere = replace(own, trials=other.trials)
    page_then = write_study(tmp_path, [Swept("beta", base, (elsewhere,))]).read_text("utf-8")
    assert "gate" not in page_then, "around another default"


def test_trials_are_cut_at_line_ends_alone(tmp_path: Path) -> None:
    trial = Trial(
        "base", None, None, "test", "i", "p", 0.0, {}, {}, None, ["run.folder=one\u2028line"]
    )
    path = tmp_path / "rows.jsonl"
    line = json.dumps(asdict(trial), ensure_ascii=False) + "\n"
    path.write_text(2 * line, encoding="utf-8")
    assert read_trials(path) == [trial, trial]
