from __future__ import annotations

from pathlib import Path

import pytest

from unteach.engine.config import Config, dump_config, load_config, override
from unteach.engine.errors import InputError


def test_dumped_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = override(Config(), ["optim.lr=1e-5", "target.epochs=2", "method.gate=0.2"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert config.target is not None and config.target.epochs == 2


def test_override_reads_json_and_text() -> None:
    settings = [
        "data.mix.forget=7",
        "parallel.checkpointing=off",
        "method.gate=null",
        "run.folder=runs/a=b",
        "teacher.response.forget=refusal",
        'method.weights={"general": 2}',
    ]
    config = override(Config(), settings)
    assert config.data.mix["forget"] == 7
    assert config.data.mix["general"] == 3
    assert config.parallel.checkpointing == "off"
    assert config.method.gate is None
    assert config.run.folder == "runs/a=b"
    assert config.teacher.response["forget"] == "refusal"
    assert config.teacher.response["general"] == "gold"
    assert config.method.weights == {"forget": 1, "general": 2, "neighbor": 1, "attack": 1}


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("optim.learning=1", "no config key optim.learning"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("metod.k=1", "did you mean method.k?"),
        ("method.k.x=1", "no config key method.k.x"),
        ("optim.lr", "no '='"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=fast", "optim.lr"),
        ("method.k=0", "method.k"),
        ("parallel.checkpointing=0", "parallel.checkpointing"),
        ("data.mix.forget=-1", "data.mix.forget"),
        ("method.k=65", "teacher.top is 64 and method.k is 65"),
        ("target=5", "target is a section of config keys: write target.key=value, or target=null"),
        ("optim=5", "optim is a section of config keys"),
        (
            "evaluate.quantized=8",
            "quantized: Input should be a valid tuple, not 8: write [8]",
        ),
        (
            "optim.betas=0.9",
            "optim.betas: Input should be a valid tuple, not 0.9: write [0.9, 0.999].",
        ),
        ("optim.betas=[0.8]", "optim.betas: Field required, not [0.8]: write [0.8, 0.999]."),
        ("optim.betas=[0.8, 0.9, 0.7]", "not [0.8, 0.9, 0.7]: write [0.8, 0.9]."),
        (
            "parallel.checkpointing=often",
            "Config key parallel.checkpointing: Input should be 'off', 'elementwise', 'selective' "
            "or 'full', or a valid integer",
        ),
        ("parallel.checkpointing=true", "Config key parallel.checkpointing: Input should be 'off'"),
        ("optim.steps=true", "optim.steps: Input should be a valid integer"),
        ("optim.lr=true", "optim.lr: Input should be a valid number"),
        ("method.gate=true", "method.gate: Input should be a valid number"),
        ("data.mix.forget=true", "data.mix.forget: Input should be a valid integer"),
        ("method.weights.forget=true", "method.weights.forget: Input should be a valid number"),
        ("optim.betas=[false, 0.9]", "optim.betas.0: Input should be a valid number"),
        (
            "evaluate.relearn_rows=[true]",
            "evaluate.relearn_rows.0: Input should be a valid integer",
        ),
        ("data.mix.forgot=1", "data.mix.forgot: Input should be 'forget'"),
        ("method.weights.forgot=1", "method.weights.forgot: Input should be 'forget'"),
        ("run.folder=null", "run.folder: Input should be a valid string"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1: Input should be less than 1"),
        ("optim.betas=[-0.1, 0.9]", "optim.betas.0: Input should be greater than or equal to 0"),
        ("optim.betas=[NaN, 0.9]", "optim.betas.0: Input should be a finite number"),
        ("optim.lr=inf", "optim.lr: Input should be a finite number"),
        ("method.weights.forget=NaN", "method.weights.forget: Input should be a finite number"),
        ("method.weights.forget=Infinity", "method.weights.forget: Input should be a finite"),
        ("method.weights.forget=-1", "method.weights.forget: Input should be greater"),
        ('run.folder=["runs"]', "run.folder: Input should be a valid string"),
        (
            'method.weights={"forget": 0, "general": 0, "neighbor": 0, "attack": 0}',
            "method.weights: some goal must weigh more than 0",
        ),
    ],
)
def test_bad_settings_are_one_sentence(setting: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        override(Config(), [setting])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  lrr: 1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"did you mean optim\.lr\?"):
        load_config(path)


@pytest.mark.parametrize("text", ["run:\n  seed: [1, 2", "run:\n\t- x", "a: b: c", "a: \x00"])
def test_a_file_that_is_no_yaml_is_one_sentence_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as a config") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    line = {"run:": "line 2", "a: b": "line 1"}.get(text[:4], "")
    assert f"{path}" in str(caught.value) and line in str(caught.value)


def test_a_truth_value_is_no_number_in_a_file_and_stays_one_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  lr: 1e-5\n  steps: yes\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"optim\.steps: Input should be a valid integer"):
        load_config(path)
    path.write_text("optim:\n  lr: 1e-5\n  reuse_frozen: yes\n", encoding="utf-8")
    config = load_config(path)
    assert (config.optim.lr, config.optim.reuse_frozen) == (1e-5, True)


def test_a_text_may_read_as_a_number_or_a_list() -> None:
    chosen = ["run.folder=2024", "model.revision=1234567", 'evaluate.extra_records={"x": "y"}']
    chosen += ["evaluate.extra_records.x=1e5", "teacher.refusal=[refused]"]
    config = override(Config(), chosen)
    assert (config.run.folder, config.model.revision) == ("2024", "1234567")
    assert config.teacher.refusal == "[refused]"
    shell = override(Config(), ["evaluate.goals=[forget, attack]"])  # bash took the quotes
    assert shell.evaluate.goals == ("forget", "attack")
    assert config.evaluate.extra_records == {"x": "1e5"}
