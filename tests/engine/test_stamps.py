"""A finished stage whose output somebody touched since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.test_run import opened
from unteach.engine import stages
from unteach.engine.errors import InputError
from unteach.engine.files import model_fingerprint

EXPORTED = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose first stage is done."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    stages.target_stage(opened(folder, "target.epochs=1"))
    assert tuple(sorted(p.name for p in (folder / "target" / "model").iterdir())) == EXPORTED
    return folder


@pytest.mark.parametrize("fault", ["cut", "lost", "changed"])
@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_file_has_to_be_what_its_stage_left(
    taught: Path, tmp_path: Path, name: str, fault: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    model = folder / "target" / "model"
    (model / "README.md").write_text("written by the report", encoding="utf-8")
    (model / "model.gguf").write_bytes(b"made of it")
    run = opened(folder, "target.epochs=1")
    stages.target_stage(run)
    content = (model / name).read_bytes()
    if fault == "lost":
        (model / name).unlink()
    else:
        (model / name).write_bytes(content[:-1] + (b"" if fault == "cut" else b" "))
    with pytest.raises(InputError, match=rf"not what stage target made, {name} was cut.*: remove"):
        stages.target_stage(run)


def test_a_stamp_of_the_weights_alone_still_counts(taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    stamp, weights = folder / "stamps" / "target.json", folder / "target/model/model.safetensors"
    made = model_fingerprint(str(weights.parent))
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "output": made}))
    run = opened(folder, "target.epochs=1")
    stages.target_stage(run)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="a file was cut, changed or lost since"):
        stages.target_stage(run)
