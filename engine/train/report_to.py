"""A training's lines sent on, as they are written, to a tracker that people watch: `run.report_to`.

train.jsonl stays the record. A tracker is a window: rank 0 alone feeds it, and one that breaks
while the training runs is told and left out.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unteach.engine.config import Config, Tracker
from unteach.engine.errors import InputError
from unteach.engine.files import read_json, write_json
from unteach.engine.progress import say

PROJECT = "unteach"
Line = Mapping[str, Any]
Send = Callable[[Line], None]


def check_tracker(name: Tracker | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        InputError: says how to get it.
    """
    if name is None:
        return
    try:
        version(name)  # not its module: any folder of that name would look like one
    except PackageNotFoundError as error:
        raise InputError(
            f"run.report_to {name} is not installed: pip install 'unteach[{name}]', or set "
            "run.report_to=null."
        ) from error


@contextmanager
def reporting(config: Config, folder: Path, start: int, rank: int) -> Iterator[Send]:
    """What takes each line of train.jsonl for as long as the training runs.

    Args:
        folder: the training's; a tracker that writes files writes them to a folder of its own here.
        start: steps that a resumed training has behind it: it goes on in the tracker's same run.
    Raises:
        InputError: the tracker cannot begin.
    """
    name = config.run.report_to
    if name is None or rank != 0:
        yield lambda line: None
        return
    begin = _tensorboard if name == "tensorboard" else _service
    try:
        send, close = begin(name, config, folder, start)
    except Exception as error:  # whatever a foreign service raises
        raise InputError(
            f"run.report_to {name} cannot begin: {error}; mend that, or set run.report_to=null."
        ) from error
    window = Window(name, send)
    try:
        yield window
    finally:
        window.attempt(close)


class Window:
    """Lines on their way to a tracker; one that breaks is told once, and no training ends of it."""

    def __init__(self, name: str, send: Send) -> None:
        self.name, self.send, self.broken = name, send, False

    def __call__(self, line: Line) -> None:
        self.attempt(lambda: self.send(line))

    def attempt(self, action: Callable[[], None]) -> None:
        """Do it, unless the tracker broke before."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:  # whatever a foreign service raises
            self.broken = True
            say(f"run.report_to: {self.name} failed and is left out from here on: {error}")


def _tensorboard(
    name: str, config: Config, folder: Path, start: int
) -> tuple[Send, Callable[[], None]]:
    """Event files in `tensorboard/`; points behind a resumed step are hidden."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(
        str(folder / name), purge_step=start + 1
    )

    def send(line: Line) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])
        writer.flush()  # a kill loses no line that train.jsonl has

    return send, writer.close


def _service(
    name: str, config: Config, folder: Path, start: int
) -> tuple[Send, Callable[[], None]]:
    """wandb or trackio, which share their calls; the run's id outlives a kill."""
    service: Any = import_module(name)
    run_id = _run_id(folder / f"{name}.json", start)
    within = folder.resolve().relative_to(Path(config.run.folder).resolve().parent)
    asked = {
        "project": PROJECT,
        "name": "-".join((*within.parts, run_id)),  # quickstart-3f…, quickstart-target-9b…
        "config": config.model_dump(mode="json"),
        "resume": "allow",
    }
    if name == "wandb":
        asked |= {"id": run_id, "dir": str(folder)}
    service.init(**asked)

    def send(line: Line) -> None:
        values = {key: value for key, value in line.items() if key != "step"}
        service.log(values, step=line["step"])

    return send, service.finish


def _run_id(path: Path, start: int) -> str:
    """The id of the run that goes on, or a new one where a training begins anew."""
    if start and path.is_file():
        return str(read_json(path)["id"])
    run_id = uuid.uuid4().hex[:8]
    write_json(path, {"id": run_id})
    return run_id
