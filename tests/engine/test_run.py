"""Opening a run folder: what it must not overwrite, and what tells two models apart."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unteach.engine import stages
from unteach.engine.compare import compare
from unteach.engine.config import override
from unteach.engine.data.records import Record, read_records, write_records
from unteach.engine.errors import InputError
from unteach.engine.evaluate.card import write_model_card
from unteach.engine.files import alone_in, model_fingerprint, renamed_into_place
from unteach.engine.model import load_model, tiny_model
from unteach.engine.plan import plan
from unteach.engine.run import Run, environment, leave_stamp, open_run, stamp_matches
from unteach.engine.study import Factor, study
from unteach.engine.train.loop import prepare_model
from unteach.engine.train.methods import find_method
from unteach.engine.train.parallel import World, forward_dtype, joined
from unteach.recipes.tiny import tiny


def opened(folder: Path, *settings: str) -> Run:
    with joined("cpu", 1) as world:
        return open_run(override(tiny(), (f"run.folder={folder}", *settings)), world)


@pytest.mark.parametrize("place", ["model", "target/model", "model/../model/kept"])
def test_a_model_where_the_run_writes_its_own_is_refused_untouched(
    tmp_path: Path, place: str
) -> None:
    path = tiny_model(tmp_path / "run" / place, tied=False)
    before = model_fingerprint(str(path))
    with pytest.raises(InputError, match=r"a model of its own: choose another run\.folder"):
        opened(tmp_path / "run", f"model.path={path}")
    assert model_fingerprint(str(path)) == before
    beside = tiny_model(tmp_path / "run" / "model-of-mine", tied=False)
    assert opened(tmp_path / "run", f"model.path={beside}").origin == str(beside)


@pytest.mark.parametrize("path", ["nowhere.gguf", "./nowhere"])
def test_no_model_there_is_one_sentence(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match=r"no \.gguf file: give one of these"):
        opened(tmp_path, f"model.path={path}")


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("data.mmlu=nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("evaluate.option_sentence=It is", "option_sentence"),
        ("evaluate.attack_judge=llm", "evaluate.judge_url"),
        ("evaluate.searched_prefixes=nowhere.txt", "nowhere.txt cannot be read"),
        ("evaluate.open_questions=nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ('evaluate.extra_records={"x": "nowhere.jsonl"}', "nowhere.jsonl cannot be read"),
        ("evaluate.few_shot=9", "asks for 9 examples"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_taught(
    tmp_path: Path, setting: str, part: str
) -> None:
    with pytest.raises(InputError, match=part):
        stages.run_all(opened(tmp_path, setting))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (("target.trainable=(",), r"target\.trainable '\(' is no pattern"),
        (("target.trainable=nothing",), r"target\.trainable 'nothing' matches no parameter"),
        (("optim.trainable=nothing",), r"optim\.trainable 'nothing' matches no parameter"),
        (("optim.trainable=.*norm.*", "optim.lora_rank=2"), "no linear layer"),
        (("optim.trainable=nothing", "target=null"), r"optim\.trainable 'nothing' matches no"),
    ],
)
def test_a_pattern_that_trains_nothing_is_refused_before_anything_is_made(
    tmp_path: Path, settings: tuple[str, ...], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        stages.run_all(opened(tmp_path, *settings))
    assert not (tmp_path / "target").exists() and not (tmp_path / "cache").exists()


def test_a_report_is_written_where_the_model_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "write_report", lambda folder: {})
    stages.report_stage(opened(tmp_path))
    said = capsys.readouterr().out
    assert "model is gone, so no model card" in said and "report.html" in said


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bitopk", "to refuse one topic, to answer beside it and to do the same behind attack"),
        ("sft", "to refuse one topic, to answer beside it and to do the same behind attack"),
        ("ga", "away from its answers on one topic"),
        ("npo", "away from its answers on one topic and to answer beside it"),
        ("flat", "away from its answers on one topic and to refuse one topic"),
        ("mollm", "away from its answers on one topic, to answer beside it and to do the same"),
    ],
)
def test_the_model_card_says_what_its_method_does(tmp_path: Path, method: str, words: str) -> None:
    config = override(tiny(), [f"method.name={method}"])
    score = {"value": 1.0, "low": 0.0, "high": 2.0, "n": 3}
    sides = {"base": {"forget": score}, "model": {"forget": score}}
    write_model_card(tmp_path, config, {**sides, "overall": 0.0, "protocol": "p"})
    card = " ".join((tmp_path / "README.md").read_text(encoding="utf-8").split())
    assert f"it was trained {words}" in card and find_method(method).summary in card
    assert ("refuse" in card) is (method in ("bitopk", "sft", "flat"))


def test_trials_are_refused_before_anything_is_taught(tmp_path: Path) -> None:
    run = opened(tmp_path, "evaluate.attack_judge=llm")
    with pytest.raises(InputError, match=r"evaluate\.judge_url"):
        compare(run, ["sft"], 1, [1e-3])
    with pytest.raises(InputError, match=r"evaluate\.judge_url"):
        study(run, [Factor("k", {"2": ("method.k=2",)})], 1, "test")
    assert not (tmp_path / "target").exists()


def test_a_hub_model_of_another_revision_is_another_model() -> None:
    named = {model_fingerprint("some/model", revision) for revision in (None, "aaaa", "bbbb")}
    assert len(named) == 3


def test_two_revisions_of_a_run_differ(tmp_path: Path) -> None:
    run = opened(tmp_path, "target=null")
    settings = override(run.config, ("model.revision=aaaa",))
    hub = replace(run, origin="some/model")
    assert hub.base_fingerprint != replace(hub, config=settings).base_fingerprint


def test_what_a_killed_writer_left_is_swept_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".model.4711.partial"
    left.mkdir()
    other = tmp_path / ".model-b.4711.partial"
    other.mkdir()
    with renamed_into_place(tmp_path / "model") as partial:
        (partial / "a").write_text("1")
    assert not left.exists() and other.exists() and (tmp_path / "model" / "a").exists()


def test_a_folder_is_whole_whenever_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is replaced is never seen half removed, and nothing of it stays."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("old")
    seen, remove = [], shutil.rmtree

    def removing(path: Path, **options: Any) -> None:
        seen.append(sorted(p.read_text() for p in folder.iterdir()))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    with renamed_into_place(folder) as partial:
        (partial / "a").write_text("new")
    assert seen and all(texts == ["new"] for texts in seen)
    assert list(tmp_path.iterdir()) == [folder]


def test_files_that_killed_processes_left_half_written_are_swept(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    dead = process.pid
    for name in (f".config.yaml.{dead}.partial", f"compare/sft/stamps/.train.json.{dead}.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    kept = [tmp_path / f".report.md.{os.getpid()}.partial", tmp_path / "mine.partial"]
    for path in kept:
        path.write_text("written this moment, or not ours")
    opened(tmp_path)
    assert sorted(tmp_path.rglob("*.partial")) == sorted(kept)


@pytest.mark.parametrize("killed", [False, True])
def test_what_nothing_took_the_place_of_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """The second of the two renames fails, or never came."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    if killed:
        folder.rename(tmp_path / ".model.4711.old.partial")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old.partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="cannot be written"), renamed_into_place(folder) as made:
        (made / "a").write_text("new")
    assert list(tmp_path.iterdir()) == [folder] and (folder / "a").read_text() == "old"


def test_a_stage_is_free_again_when_it_ended(tmp_path: Path) -> None:
    with alone_in(tmp_path, "train"):
        with alone_in(tmp_path, "teach"):
            pass
        kept_out = pytest.raises(InputError, match="Another unteach command is at stage train")
        with kept_out, alone_in(tmp_path, "train"):
            raise AssertionError("two processes at one stage")
    with alone_in(tmp_path, "train"):
        pass


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (errno.ENOLCK, nullcontext()),  # it knows no locks: nobody can be kept out
        (errno.EIO, pytest.raises(InputError, match=r"cannot be written.*Input/output error")),
    ],
)
def test_a_lock_that_fails_is_told_unless_there_are_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: int,
    told: AbstractContextManager[object],
) -> None:
    def flock(stream: IO[str], how: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", flock)
    with told, alone_in(tmp_path, "train"):
        pass


def test_prefixes_are_searched_against_a_base_that_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = opened(tmp_path, "target=null")
    run = replace(own, origin="some/model")
    run.tokenizer = own.tokenizer  # a hub is out of reach
    loaded: list[str] = []
    monkeypatch.setattr(Run, "load", lambda self, path, dtype: loaded.append(path))
    monkeypatch.setattr(stages, "attack_with_search", lambda *given, **options: None)
    stages.prefix_stage(run, "base", rounds=1, children=1, per_question=False)
    assert loaded == ["some/model"]
    with pytest.raises(InputError, match="no target model"):
        stages.prefix_stage(run, "model", rounds=1, children=1, per_question=False)


def test_a_damaged_stamp_is_one_sentence(tmp_path: Path) -> None:
    leave_stamp(tmp_path, "train", {"seed": 1}, tmp_path)
    assert stamp_matches(tmp_path, "train", {"seed": 1}, tmp_path)
    stamp = tmp_path / "stamps" / "train.json"
    for damaged in (stamp.read_text()[:-4], "null", "[]"):
        stamp.write_text(damaged)
        with pytest.raises(InputError, match=r"train\.json is damaged .* remove it"):
            stamp_matches(tmp_path, "train", {"seed": 1}, tmp_path)


@pytest.mark.parametrize("fault", ["cut", "lost", "flipped"])
def test_weights_that_a_stage_did_not_leave_are_no_finished_stage(
    tmp_path: Path, fault: str
) -> None:
    run = opened(tmp_path, "target.epochs=1")
    stages.target_stage(run)
    stages.target_stage(opened(tmp_path, "target.epochs=1"))  # done before
    path = tmp_path / "target" / "model" / "model.safetensors"
    content = path.read_bytes()
    if fault == "lost":
        path.unlink()
    else:
        flipped = bytes([content[-1] ^ 1])
        path.write_bytes(content[:-1] + (flipped if fault == "flipped" else b""))
    with pytest.raises(InputError, match=r"target/model is not what stage target made.*: remove"):
        stages.target_stage(opened(tmp_path, "target.epochs=1"))
    shutil.rmtree(path.parent)
    stages.target_stage(opened(tmp_path, "target.epochs=1"))
    assert path.read_bytes() == content


def test_another_chat_template_is_another_taught_model(tmp_path: Path) -> None:
    stages.target_stage(opened(tmp_path, "target.epochs=1"))
    run = opened(tmp_path, "target.epochs=1")
    run.tokenizer.chat_template += " "
    with pytest.raises(InputError, match="target/model was made with another tokenizer"):
        stages.target_stage(run)


def test_nothing_asks_for_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(World(0, 1, torch.device("cpu"), None))["commit"] is None


def test_a_model_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    for tied in (True, False):
        path = tiny_model(tmp_path / f"tied-{tied}", tied=tied)
        load_model(str(path), tiny().model)
        file = path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({n: v for n, v in tensors.items() if n != name}, file, {"format": "pt"})
        with pytest.raises(InputError, match=f"its files hold no {name}"):
            load_model(str(path), tiny().model)
        save_file({**tensors, name: tensors[name][:-1].clone()}, file, {"format": "pt"})
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(str(path), tiny().model)


@pytest.mark.parametrize("field", ["question", "prefix"])
def test_a_changed_record_is_another_training(tmp_path: Path, field: str) -> None:
    records = read_records(Path(tiny().data.path))
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    settings = ("target=null", "method.name=sft", f"data.path={path}", "optim.steps=1")
    run = opened(tmp_path / "run", *settings)
    stages.train_stage(run, None)
    stages.train_stage(run, None)  # done before
    index = next(i for i, r in enumerate(records) if r.prefix and r.split == "train")
    changed: Record = records[index].model_copy(update={field: "Which other one?"})
    write_records(path, [*records[:index], changed, *records[index + 1 :]])
    with pytest.raises(InputError, match="made with another examples"):
        stages.train_stage(opened(tmp_path / "run", *settings), None)


@pytest.mark.parametrize("settings", [(), ("target=null",)], ids=["train", "teach"])
def test_a_record_that_the_model_cannot_read_whole_is_named(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    records = read_records(Path(tiny().data.path))
    place = next(i for i, r in enumerate(records) if r.split == "train" and r.goal == "general")
    records[place] = records[place].model_copy(update={"question": 1100 * "x"})
    write_records(tmp_path / "long.jsonl", records)
    run = opened(tmp_path / "run", f"data.path={tmp_path / 'long.jsonl'}", *settings)
    long = f"Record '{records[place].id}' has 1[1-9]\\d\\d tokens .* reads at most 1024: shorten"
    with pytest.raises(InputError, match=long):
        stages.run_all(run)


def test_other_packing_is_another_training(tmp_path: Path) -> None:
    settings = ("target=null", "method.name=sft", "optim.steps=1")
    stages.train_stage(opened(tmp_path, *settings), None)
    with pytest.raises(InputError, match="made with another pack_tokens"):
        stages.train_stage(opened(tmp_path, *settings, "data.pack_tokens=77"), None)


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    """With it a resumed training would draw other masks than one that was never stopped."""
    path = tiny_model(tmp_path / "tiny", tied=False)
    config = path / "config.json"
    config.write_text(
        config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5')
    )
    assert '"attention_dropout": 0.5' in config.read_text()
    tokens = torch.arange(3, 23)[None]
    with joined("cpu", 1) as world:
        settings = (f"run.folder={tmp_path / 'run'}", f"model.path={path}", "target=null")
        run = open_run(override(tiny(), settings), world)
        job = stages.Job("train", run.config, run.base, run.tokenizer, (), None, tmp_path)
        model = prepare_model(job, world)[0]
    twice = [model(input_ids=tokens).logits for _ in range(2)]
    torch.testing.assert_close(*twice, rtol=0, atol=0)


def test_the_compute_dtype_hangs_on_weights_and_setting_alone() -> None:
    parallel = tiny().parallel
    lean = parallel.model_copy(update={"dtype": "bfloat16"})
    assert forward_dtype(torch.float32, parallel) == torch.float32
    assert forward_dtype(torch.float32, lean) == torch.bfloat16
    assert forward_dtype(torch.bfloat16, parallel) == torch.bfloat16


def test_a_plan_reads_the_records_that_the_data_stage_made(tmp_path: Path) -> None:
    source = ("data.source=local", f"data.path={tmp_path / 'mine'}", f"run.folder={tmp_path / 'r'}")
    config = override(tiny(), source)
    with pytest.raises(InputError, match=r"records\.jsonl is not there yet: `unteach teach`"):
        plan(config, 1)
    (tmp_path / "r" / "data").mkdir(parents=True)
    write_records(tmp_path / "r" / "data" / "records.jsonl", read_records(Path(tiny().data.path)))
    assert plan(config, 1).items == plan(tiny(), 1).items
