"""The random tiny model on disk, afresh as often as a test needs it, and its records."""

from __future__ import annotations

from pathlib import Path

import pytest

from unteach.engine.data.records import Record, read_records
from unteach.engine.model import PreTrainedModel, load_model, tiny_model
from unteach.recipes.tiny import tiny


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("start") / "tiny", tied=False))


def fresh(path: str) -> PreTrainedModel:
    return load_model(path, tiny().model)


def records() -> list[Record]:
    return read_records(Path(tiny().data.path))
