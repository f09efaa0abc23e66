"""The loop as users run it: real processes, real torchrun, real kills."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = ("run.device=cpu", "run.threads=1")
WATCHED = "run.report_to=tensorboard"
HSDP = "parallel.replicate=2"
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_cpu.jsonl"


def command(folder: Path, *settings: str, ranks: int = 1, stage: str = "train") -> list[str]:
    """The command line of a stage of recipe tiny; more than one rank goes through torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    target = [*(launcher if ranks > 1 else []), "-m", "unteach.recipes.cli", stage, "tiny"]
    chosen = (*SETTINGS, f"run.folder={folder}", *settings)
    return [sys.executable, *target, *(part for s in chosen for part in ("--set", s))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(
    folder: Path, *settings: str, ranks: int = 1, stage: str = "train", code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *settings, ranks=ranks, stage=stage),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kill_when(ready: Callable[[], bool], folder: Path, *settings: str, sig: int) -> int:
    """Start training, send a signal as soon as `ready`, return the exit code."""
    process = subprocess.Popen(
        command(folder, *settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    until = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.0005)
    assert process.poll() is None, "training ended before it could be killed"
    process.send_signal(sig)
    return process.wait(timeout=120)


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def taught(source: Path, folder: Path) -> Path:
    """A run folder with the teaching stage and the cache done, nothing trained."""
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("model", "checkpoints", "seeds.bin")
    )
    shutil.copytree(source / "target" / "model", folder / "target" / "model")
    (folder / "train.jsonl").unlink()
    (folder / "stamps" / "train.json").unlink()
    return folder


def assert_same_training(
    one: Path, other: Path, tolerance: float = 1e-5, weights_tolerance: float | None = None
) -> None:
    first, second = steps(one), steps(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * tolerance)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        apart = (tensor - theirs[name]).norm()
        assert apart <= (weights_tolerance or tolerance) * tensor.norm(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


def test_every_step_is_logged_and_training_learns(whole: Path) -> None:
    lines = steps(whole)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    keys = {"loss", "lr", "grad_norm", "tokens_per_second", "peak_mib", "coverage"}
    assert all(keys <= line.keys() for line in lines)
    assert all(f"loss_{goal}" in lines[0] for goal in ("forget", "general", "neighbor", "attack"))


def test_losses_are_the_golden_ones(whole: Path) -> None:
    """A change of these is a change of the numerics: `step` and `loss` of the first 20 lines."""
    golden = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    for line, expected in zip(steps(whole)[:20], golden, strict=True):
        assert line["step"] == expected["step"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.path=tiny-tied",),
        # One record a step: the second rank has nothing to supervise.
        ('data.mix={"forget": 1}',),
        ("method.name=sft", "method.reduction=record"),
        ("method.name=ngdiff", "method.own_rate_every=5", "optim.steps=12"),
        ("method.name=mollm", "optim.steps=8"),
        ("optim.lora_rank=3", "optim.lr=1e-2", "parallel.checkpointing=selective"),
    ],
    ids=["tied", "idle-rank", "sft", "ngdiff", "mollm", "lora"],
)
def test_two_ranks_are_one_rank(whole: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    if "model.path=tiny-tied" in settings:
        run(tmp_path / "start", *settings, stage="teach")
        (tmp_path / "start" / "train.jsonl").touch()
        (tmp_path / "start" / "stamps" / "train.json").touch()
        start = tmp_path / "start"
    else:
        start = whole
    one, two = taught(start, tmp_path / "one"), taught(start, tmp_path / "two")
    if "method.name=mollm" in settings:  # its teacher is the model without an intention
        shutil.rmtree(one / "cache")
        run(one, *settings, stage="teach")
        shutil.rmtree(two / "cache")
        shutil.copytree(one / "cache", two / "cache")
    run(one, *settings)
    said = run(two, *settings, ranks=2).stderr
    assert "returned a view" not in said
    assert_same_training(one, two)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ()),
        (2, ("parallel.checkpointing=full", "data.pack_tokens=300")),
        (4, ("parallel.checkpointing=selective", HSDP)),  # two replicas of two shards
    ],
    ids=["plain", "recomputing-packed", "hsdp"],
)
def test_no_way_to_spread_the_work_changes_it(
    whole: Path, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    folder = taught(whole, tmp_path / "run")
    run(folder, *settings, ranks=ranks)
    assert_same_training(whole, folder)


def test_accumulation_is_one_batch(whole: Path, tmp_path: Path) -> None:
    run(taught(whole, tmp_path / "run"), "optim.accumulation=3")
    assert_same_training(whole, tmp_path / "run")


@pytest.mark.gpu
def test_a_gpu_trains_as_the_cpu_does(whole: Path, tmp_path: Path) -> None:
    run(taught(whole, tmp_path / "run"), "run.device=cuda")
    assert_same_training(whole, tmp_path / "run", tolerance=1e-3, weights_tolerance=1e-2)


@pytest.mark.distributed
def test_two_gpus_train_as_one_does(whole: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        run(taught(whole, tmp_path / f"{ranks}"), "run.device=cuda", ranks=ranks)
    assert_same_training(tmp_path / "1", tmp_path / "2", tolerance=1e-4, weights_tolerance=1e-3)


def test_whole_walk_on_two_ranks_is_that_on_one(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", ranks=2)
    # Two trainings in a row: the base that the second starts from differs by 7e-6 already, and
    # AdamW enlarges in the weights what is rounded otherwise (3.3e-5 of them on one processor).
    assert_same_training(whole, tmp_path / "run", tolerance=3e-5, weights_tolerance=6e-5)


def test_killed_three_times_is_never_killed(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    log, rng = folder / "train.jsonl", random.Random(time.time_ns())
    for low in (1, 8, 15):
        goal = low + rng.randrange(6)

        def reached(goal: int = goal) -> bool:
            return log.exists() and len(log.read_text(encoding="utf-8").splitlines()) >= goal

        assert kill_when(reached, folder, WATCHED, sig=signal.SIGKILL) == -signal.SIGKILL
    run(folder, WATCHED)
    assert [line["step"] for line in steps(folder)] == list(range(1, 25))
    shown = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in shown] == list(range(1, 25))
    assert [e.value for e in shown] == pytest.approx([line["loss"] for line in steps(folder)])
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


def test_a_second_command_in_a_run_folder_is_kept_out(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    log = folder / "train.jsonl"
    first = subprocess.Popen(
        command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while not log.exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it trains on when the second has been told
    try:
        said = run(folder, code=2).stderr
    finally:
        first.send_signal(signal.SIGCONT)
    assert "Another unteach command is at stage train" in said and "Traceback" not in said
    assert first.wait(timeout=120) == 0
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


IN_BACKGROUND = "run.background_checkpoints=true"


@pytest.mark.parametrize("settings", [(), (IN_BACKGROUND,)], ids=["before", "background"])
def test_killed_during_a_save_goes_on_from_the_save_before(
    whole: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    folder = taught(whole, tmp_path / "run")
    partial = folder / "checkpoints" / ".step-000010.partial"
    assert kill_when(partial.exists, folder, *settings, sig=signal.SIGKILL) == -signal.SIGKILL
    run(folder, *settings)
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_saves_and_exits(whole: Path, tmp_path: Path, sig: int) -> None:
    folder = taught(whole, tmp_path / "run")
    log = folder / "train.jsonl"
    assert kill_when(lambda: log.exists() and log.stat().st_size > 0, folder, sig=sig) == 130
    assert list((folder / "checkpoints").glob("step-*"))
    run(folder)
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


def test_two_rank_checkpoint_resumes_on_one_rank(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    run(folder, IN_BACKGROUND, ranks=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000015",
        "step-000020",
    ]
    shutil.rmtree(folder / "model")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    run(folder)
    assert_same_training(whole, folder)


def test_a_rate_that_finds_itself_is_resumed_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    settings = ("method.name=ngdiff", "method.own_rate_every=3", "optim.schedule=constant")
    folder = taught(whole, tmp_path / "run")
    run(folder, *settings)
    rates = [line["lr"] for line in steps(folder)]
    assert len({rates[4], rates[10], rates[-1]}) == 3
    before = weights(folder)
    shutil.rmtree(folder / "model")
    run(folder, *settings)
    assert [line["lr"] for line in steps(folder)] == rates
    assert all(torch.equal(w, weights(folder)[name]) for name, w in before.items())


@pytest.mark.parametrize(
    ("limit", "settings", "part"),
    [
        (600_000, (), "step-000005 cannot be written"),
        (600_000, (IN_BACKGROUND,), "step-000005 cannot be written"),
        (200_000, ("run.checkpoint_every=null",), "model cannot be written"),
    ],
    ids=["checkpoint", "background", "export"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    whole: Path, tmp_path: Path, limit: int, settings: tuple[str, ...], part: str
) -> None:
    folder = taught(whole, tmp_path / "run")
    done = subprocess.run(
        command(folder, *settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert part in done.stderr and "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("*.partial*")) and not (folder / "model").exists()
    run(folder)
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


def test_a_finished_run_is_skipped_and_a_changed_one_refused(whole: Path) -> None:
    before = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    assert "skipped" in run(whole).stdout
    assert (whole / "model" / "model.safetensors").stat().st_mtime_ns == before
    config = (whole / "config.yaml").read_bytes()
    error = run(whole, "method.k=3", code=2).stderr
    assert (whole / "config.yaml").read_bytes() == config
    assert "was made with another method" in error and "Traceback" not in error


def test_checkpoint_of_other_settings_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    shutil.copytree(whole / "checkpoints", folder / "checkpoints")
    error = run(folder, "optim.lr=0.5", code=2).stderr
    assert "was made with another optim" in error


def test_a_loss_that_is_not_finite_stops_and_names_the_records(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    error = run(folder, "optim.lr=1e38", "optim.warmup_steps=0", "optim.clip_norm=null", code=2)
    assert "Step 2: the loss is not finite" in error.stderr
    assert "(forget)" in error.stderr
    assert [line["step"] for line in steps(folder)] == [1]


def test_a_bad_step_between_two_logs_reaches_neither_weights_nor_checkpoints(
    whole: Path, tmp_path: Path
) -> None:
    """Two ranks: the optimiser leaves it out on the device, the host learns of it three later."""
    folder = taught(whole, tmp_path / "run")
    settings = ("optim.warmup_steps=0", "optim.clip_norm=null", "run.log_every=4")
    error = run(
        folder, "optim.lr=1e38", *settings, "run.checkpoint_every=3", ranks=2, code=1
    ).stderr
    assert "Step 2: the loss is not finite, because of records" in error
    assert not list((folder / "checkpoints").glob("step-*")) and not steps(folder)


def test_logging_seldom_changes_no_bit(whole: Path, tmp_path: Path) -> None:
    folder = taught(whole, tmp_path / "run")
    run(folder, "run.log_every=24")
    assert [line["step"] for line in steps(folder)] == [24]
    assert all(torch.equal(w, weights(folder)[name]) for name, w in weights(whole).items())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (("method.name=bitopq",), "did you mean bitopk?"),
        (("optim.trainable=nothing",), "matches no parameter"),
        (("method.k=999", "teacher.top=999"), "method.k is 999"),
        (("data.path=nowhere.jsonl",), "nowhere.jsonl cannot be read"),
        (("run.device=cuda",), "no CUDA device"),
        (("parallel.replicate=2",), "does not divide 1 processes"),
    ],
)
def test_bad_input_is_one_sentence(
    whole: Path, tmp_path: Path, settings: tuple[str, ...], part: str
) -> None:
    done = run(tmp_path / "run", *settings, code=2)
    assert part in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_bf16_weights_and_moments_resume_to_the_bit(whole: Path, tmp_path: Path) -> None:
    """The rounding noise belongs to seed, step and element, and moments keep their dtype."""
    settings = ("model.dtype=bfloat16", "optim.state=bfloat16", 'data.mix={"forget": 2}')
    straight, stopped = taught(whole, tmp_path / "a"), taught(whole, tmp_path / "b")
    run(straight, *settings)
    run(stopped, *settings)
    for path in sorted((stopped / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    shutil.rmtree(stopped / "model")
    (stopped / "stamps" / "train.json").unlink()
    assert len(list((stopped / "checkpoints").glob("step-*"))) == 1
    run(stopped, *settings)
    assert all(torch.equal(w, weights(stopped)[name]) for name, w in weights(straight).items())
    assert {w.dtype for w in weights(straight).values()} == {torch.bfloat16}
