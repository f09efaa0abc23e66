"""rows.jsonl: one finished trial a line, as `unteach compare` and `unteach study` keep them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from unteach.engine.errors import InputError
from unteach.engine.evaluate.ranking import Trial
from unteach.engine.evaluate.scores import Score
from unteach.engine.files import unwritable, write_atomic

_ROW = TypeAdapter(Trial)
_SCORES = TypeAdapter(dict[str, Score])
_NAMES = {field.name for field in fields(Trial)}


def read_trials(path: Path) -> list[Trial]:
    """Lines in the order in which they were finished.

    Raises:
        InputError: a line that is none of ours.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    if lines and not lines[-1]:
        lines.pop()
    trials = []
    for place, line in enumerate(lines, start=1):
        try:
            trials.append(_trial(line))
        except ValueError as error:
            raise InputError(
                f"{path}, line {place}, is no row ({_fault(error)}): remove that line; its trial "
                "is made again."
            ) from error
    return trials


def append_trial(path: Path, trial: Trial) -> None:
    """Add the line of a trial, on the disk before anything hangs on it.

    Raises:
        InputError: the disk is full or the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(trial)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise InputError(unwritable(path, error)) from error


def drop_torn_line(path: Path) -> None:
    """A run that was killed while it wrote leaves half a line."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(path, whole)


def _trial(line: bytes) -> Trial:
    trial = _ROW.validate_json(line, strict=True)
    if unknown := sorted(json.loads(line).keys() - _NAMES):
        raise ValueError(f"{unknown[0]} is none of its fields")
    for scores in (trial.scores, trial.extra):
        _SCORES.validate_python(scores)
    return trial


def _fault(error: ValueError) -> str:
    """The first fault of a line, with the field that has it."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "no JSON"
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else "no JSON object"
