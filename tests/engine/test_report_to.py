"""What a tracker is sent: the lines of train.jsonl, and nothing that could end a training."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unteach.engine.config import Config
from unteach.engine.errors import InputError
from unteach.engine.train import report_to
from unteach.engine.train.report_to import check_tracker, reporting
from unteach.recipes.tiny import tiny


def asking(name: str | None, folder: Path) -> Config:
    start = tiny()
    asked = start.run.model_copy(update={"report_to": name, "folder": str(folder)})
    return start.model_copy(update={"run": asked})


class Service(types.ModuleType):
    """A stand-in for the network: what wandb and trackio are called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.began: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.down = False

    def init(self, **asked: Any) -> None:
        if self.down:
            raise RuntimeError("no API key")
        self.began.append(asked)

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.down:
            raise ConnectionError("the line is cut")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    yield made


def test_a_resumed_training_goes_on_in_the_same_run(service: Service, tmp_path: Path) -> None:
    config = asking(service.__name__, tmp_path)
    for start in (0, 2, 0):
        with reporting(config, tmp_path, start, rank=0) as report:
            report({"step": start + 1, "loss": 0.5, "lr": 0.1})
    first, resumed, anew = service.began
    assert first["name"] == resumed["name"] != anew["name"]
    assert first["name"].startswith(f"{tmp_path.name}-")
    assert first["config"]["optim"]["lr"] == config.optim.lr
    assert service.logged[1] == (3, {"loss": 0.5, "lr": 0.1})
    assert service.finished == 3


def test_the_taught_base_is_a_run_of_its_own(service: Service, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with reporting(asking(service.__name__, tmp_path), tmp_path / "target", 0, rank=0):
        pass
    assert service.began[0]["name"].startswith(f"{tmp_path.name}-target-")


def test_a_tracker_that_breaks_is_left_out(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporting(asking(service.__name__, tmp_path), tmp_path, 0, rank=0) as report:
        report({"step": 1, "loss": 0.5})
        service.down = True
        for step in (2, 3):
            report({"step": step, "loss": 0.5})
    said = capsys.readouterr().out
    assert said.count("is left out from here on: the line is cut") == 1
    assert [step for step, _ in service.logged] == [1]


def test_a_tracker_that_cannot_begin_is_one_sentence(service: Service, tmp_path: Path) -> None:
    service.down = True
    sentence = rf"run\.report_to {service.__name__} cannot begin: no API key; .*=null"
    with (
        pytest.raises(InputError, match=sentence),
        reporting(asking(service.__name__, tmp_path), tmp_path, 0, rank=0),
    ):
        pass


def test_an_error_of_the_training_passes_and_closes_the_run(
    service: Service, tmp_path: Path
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        reporting(asking(service.__name__, tmp_path), tmp_path, 0, rank=0),
    ):
        raise KeyboardInterrupt
    assert service.finished == 1


def test_other_ranks_and_null_report_nothing(service: Service, tmp_path: Path) -> None:
    for name, rank in ((service.__name__, 1), (None, 0)):
        with reporting(asking(name, tmp_path), tmp_path, 0, rank=rank) as report:
            report({"step": 1, "loss": 0.5})
    assert not service.began and not list(tmp_path.iterdir())


def test_points_behind_a_resumed_step_are_hidden(tmp_path: Path) -> None:
    for start, loss in ((0, 1.0), (2, 2.0)):
        with reporting(asking("tensorboard", tmp_path), tmp_path, start, rank=0) as report:
            for step in range(start + 1, 5):
                report({"step": step, "loss": loss * step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 6), (4, 8)]


def test_a_missing_tracker_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(report_to, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'unteach\[wandb\]'"):
        check_tracker("wandb")
    check_tracker(None)
