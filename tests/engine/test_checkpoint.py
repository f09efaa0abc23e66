"""Checkpoints that are damaged, of real files of a real model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.tiny_start import fresh
from tests.engine.tiny_start import start as start
from unteach.engine.errors import InputError
from unteach.engine.train.checkpoint import COMPLETE, Saver, finished_checkpoints, resume
from unteach.engine.train.parallel import World

ALONE = World(0, 1, torch.device("cpu"), None)


class Training:
    """A model whose weights are the number of steps it has done."""

    def __init__(self, path: str, folder: Path) -> None:
        self.folder, self.model = folder, fresh(path)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.names = [name for name, _ in self.model.named_parameters()]

    def save(self, *steps: int, keep: int = 2, background: bool = False) -> None:
        saver = Saver(self.folder, {"data": 1}, ALONE, keep=keep, background=background)
        for step in steps:
            self.fill(float(step))
            saver.save(step, self.model, self.optimizer, self.names)
        saver.finish()

    def fill(self, number: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(number)

    def resume(self) -> int:
        self.fill(-1.0)
        return resume(self.folder, self.model, self.optimizer, self.names, {"data": 1}, ALONE)


def flip(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 0x40]))


def cut(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def lose(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def blot(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).write_bytes(b"\0" * 40)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("damage", [flip, cut, lose, blot])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    start: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    background: bool,
) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(5, 10, background=background)
    damage(tmp_path / "checkpoints" / "step-000010")
    assert training.resume() == 5
    assert all(bool((p == 5.0).all()) for p in training.model.parameters())
    told = capsys.readouterr().out
    assert "step-000010 is damaged" in told and told.count("\n") == 1


def test_without_a_whole_checkpoint_the_start_is_refused(start: str, tmp_path: Path) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(5, 10)
    for path in finished_checkpoints(training.folder):
        flip(path)
    with pytest.raises(InputError, match=r"Every checkpoint is damaged: remove .*checkpoints to"):
        training.resume()


def test_what_was_written_but_cannot_be_loaded_is_one_sentence(start: str, tmp_path: Path) -> None:
    """A checkpoint of another torch, say: every file is as it was written, and DCP refuses it."""
    training = Training(start, tmp_path / "checkpoints")
    training.save(5)
    checkpoint = training.folder / "step-000005"
    cut(checkpoint)
    mark = checkpoint / COMPLETE
    note = json.loads(mark.read_text(encoding="utf-8"))
    for name, written in note["files"].items():
        content = (checkpoint / name).read_bytes()
        written |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    mark.write_text(json.dumps(note), encoding="utf-8")
    with pytest.raises(InputError, match=r"step-000005 cannot be loaded \(.*\): remove it"):
        training.resume()


def test_a_mark_without_its_list_of_files_vouches_for_nothing(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(5, 10)
    mark = training.folder / "step-000010" / COMPLETE
    note = json.loads(mark.read_text(encoding="utf-8"))
    del note["files"]
    mark.write_text(json.dumps(note), encoding="utf-8")
    assert training.resume() == 5
    assert "step-000010 is damaged" in capsys.readouterr().out


def test_a_course_given_up_is_removed_and_never_the_checkpoint_just_written(
    start: str, tmp_path: Path
) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(5, 10, 17)
    flip(training.folder / "step-000017")
    assert training.resume() == 10
    training.save(15, keep=1)
    assert [path.name for path in finished_checkpoints(training.folder)] == ["step-000015"]
    assert training.resume() == 15


def test_steps_are_ordered_as_numbers(start: str, tmp_path: Path) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(999_998, 999_999, 1_000_000, keep=2)
    assert [p.name for p in finished_checkpoints(training.folder)] == [
        "step-999999",
        "step-1000000",
    ]
    assert training.resume() == 1_000_000


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_that_counts(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(start, tmp_path / "checkpoints")
    training.save(5, 10)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.glob("*.distcp")).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        training.save(15)
    monkeypatch.undo()
    assert [p.name for p in finished_checkpoints(training.folder)] == ["step-000010", "step-000015"]
