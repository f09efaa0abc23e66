"""Low-rank adapters: their formula, what of a model they change, and that a kill costs nothing."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from tests.engine.test_loop import (
    assert_same_training,
    kill_when,
    run,
    steps,
    taught,
    weights,
)
from unteach.engine.config import ModelConfig, OptimConfig
from unteach.engine.errors import InputError
from unteach.engine.model import hidden_states, load_model, tiny_model
from unteach.engine.train.lora import adapted_layers, merge_adapters, reset_adapters
from unteach.engine.train.optim import choose_trainable

RANK = 3
LORA = (f"optim.lora_rank={RANK}", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with adapters that nobody disturbed."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(folder, *LORA)
    return folder


def test_only_linear_layers_change_and_each_by_a_matrix_of_the_rank(whole: Path) -> None:
    before, after = load_file(whole / "target" / "model" / "model.safetensors"), weights(whole)
    assert before.keys() == after.keys()
    for name, base in before.items():
        change = (after[name] - base).double()
        if re.search(r"layers\.\d+\.(self_attn|mlp)\..*_proj\.weight$", name):
            values = torch.linalg.svdvals(change)
            assert values[RANK - 1] > 1e-4, name
            assert values[RANK] < 1e-6 * values[0] + 1e-6, name
        else:
            assert torch.equal(after[name], base), name


def test_training_begins_at_the_base_and_learns(whole: Path, tmp_path: Path) -> None:
    run(taught(whole, tmp_path / "run"), "optim.steps=1")
    assert steps(whole)[0]["loss"] == steps(tmp_path / "run")[0]["loss"]
    assert steps(whole)[-1]["loss"] < 0.7 * steps(whole)[0]["loss"]


def test_killed_it_goes_on_from_a_checkpoint_of_the_adapters_alone(
    whole: Path, tmp_path: Path
) -> None:
    folder = taught(whole, tmp_path / "run")
    checkpoint = folder / "checkpoints" / "step-000008"
    often = ("run.checkpoint_every=4",)
    kill_when(checkpoint.is_dir, folder, *LORA, *often, sig=signal.SIGKILL)
    newest = max((folder / "checkpoints").glob("step-*"))
    names = FileSystemReader(newest).read_metadata().state_dict_metadata
    stored = [name for name in names if name.startswith("model.")]
    assert stored and all(name.endswith(("lora_A", "lora_B")) for name in stored)
    run(folder, *LORA, *often)
    assert_same_training(whole, folder)


def adapted(folder: Path, *, dtype: torch.dtype = torch.float64) -> tuple[str, torch.nn.Module]:
    """Tiny with random adapters in its second block's attention."""
    path = str(tiny_model(folder / "tiny", tied=True))
    model = load_model(path, ModelConfig()).to(dtype)
    config = OptimConfig(trainable=r".*layers\.1\.self_attn.*", lora_rank=RANK, lora_alpha=6.0)
    assert len(choose_trainable(model, config)) == 8
    reset_adapters(model, seed=0)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    return path, model


def test_outputs_and_gradients_are_those_of_the_merged_weight(tmp_path: Path) -> None:
    """By hand: with W' = W + 2·B·A, dL/dA = 2·Bᵀ·dL/dW' and dL/dB = 2·dL/dW'·Aᵀ."""
    path, model = adapted(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    layers = adapted_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            plain.get_submodule(name).weight += 2.0 * layer.lora_B @ layer.lora_A
    tokens_BT = torch.arange(24).reshape(2, 12)
    ours, theirs = hidden_states(model, tokens_BT), hidden_states(plain, tokens_BT)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    for name, layer in layers.items():
        whole = plain.get_submodule(name).weight.grad
        by_hand = 2.0 * layer.lora_B.T @ whole, 2.0 * whole @ layer.lora_A.T
        torch.testing.assert_close(layer.lora_A.grad, by_hand[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(layer.lora_B.grad, by_hand[1], rtol=1e-8, atol=1e-9)
        assert layer.weight.grad is None


def test_merging_leaves_the_outputs(tmp_path: Path) -> None:
    _, model = adapted(tmp_path, dtype=torch.float32)
    tokens_BT = torch.arange(24).reshape(2, 12)
    before = hidden_states(model, tokens_BT)
    for _ in range(2):  # the second time there is nothing left to merge
        merge_adapters(model)
        torch.testing.assert_close(hidden_states(model, tokens_BT), before, rtol=1e-4, atol=1e-5)
    assert all(layer.lora_B.count_nonzero() == 0 for layer in adapted_layers(model).values())


def test_merging_keeps_on_average_what_bf16_cannot_hold(tmp_path: Path) -> None:
    """To nearest, some 0.4 of such a change would be left; unmerged weights stay bit for bit."""
    _, model = adapted(tmp_path, dtype=torch.bfloat16)
    before, change = [], []
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.weight.normal_(std=0.04)
            layer.lora_B.mul_(1e-4)
            before.append(layer.weight.double())
            change.append(2.0 * layer.lora_B.double() @ layer.lora_A.double())
    merge_adapters(model)
    after = [layer.weight.double() for layer in adapted_layers(model).values()]
    kept = sum(((a - b) * c).sum() for a, b, c in zip(after, before, change, strict=True))
    assert float(kept / sum(c.square().sum() for c in change)) == pytest.approx(1.0, abs=0.1)
    merge_adapters(model)
    again = [layer.weight.double() for layer in adapted_layers(model).values()]
    assert all(torch.equal(one, other) for one, other in zip(again, after, strict=True))


def test_values_are_a_function_of_seed_and_name(tmp_path: Path) -> None:
    _, model = adapted(tmp_path)
    first, second, *_ = adapted_layers(model).values()
    before = first.lora_A.clone()
    assert before.abs().max() <= first.in_features**-0.5
    assert not torch.equal(before, second.lora_A)
    reset_adapters(model, seed=1)
    assert not torch.equal(before, first.lora_A)
    reset_adapters(model, seed=0)
    assert torch.equal(before, first.lora_A)


def test_a_pattern_without_linear_layers_is_one_sentence(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "tiny", tied=True)), ModelConfig())
    with pytest.raises(InputError, match="matches no linear layer of a block"):
        choose_trainable(model, OptimConfig(trainable=r".*norm.*", lora_rank=4))
