from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from unteach.engine.config import ModelConfig, OptimConfig
from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedModel, head_weight, load_model, tiny_model
from unteach.engine.train.log import FiniteGuard, StepSums
from unteach.engine.train.optim import (
    adamw,
    choose_trainable,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from unteach.engine.train.parallel import World


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return load_model(str(tiny_model(tmp_path / "tiny", tied=True)), ModelConfig())


def test_pattern_chooses_parameters(model: PreTrainedModel) -> None:
    names = choose_trainable(model, OptimConfig(trainable=r"model\.layers\.1\..*"))
    assert names and all(name.startswith("model.layers.1.") for name in names)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names


def test_frozen_head_freezes_the_tied_embedding(model: PreTrainedModel) -> None:
    names = choose_trainable(model, OptimConfig(head="frozen"))
    assert "model.embed_tokens.weight" not in names
    assert not head_weight(model).requires_grad


@pytest.mark.parametrize("pattern", ["nothing", "model.layers.1", "("])
def test_pattern_that_trains_nothing_is_refused(model: PreTrainedModel, pattern: str) -> None:
    with pytest.raises(InputError, match=r"optim\.trainable"):
        choose_trainable(model, OptimConfig(trainable=pattern))


def test_schedules_match_their_formulas() -> None:
    linear = OptimConfig(lr=2.0, steps=12, warmup_steps=2, schedule="linear")
    rates = [learning_rate(linear, step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[-1] == pytest.approx(2.0 * (1 - 9 / 10))
    cosine = OptimConfig(lr=2.0, steps=10, schedule="cosine")
    assert learning_rate(cosine, 5) == pytest.approx(1.0)
    assert learning_rate(cosine, 9) == pytest.approx(1 + math.cos(0.9 * math.pi))
    assert learning_rate(OptimConfig(lr=2.0, steps=3), 2) == 2.0


def test_one_step_is_adamw_by_hand(model: PreTrainedModel) -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5, eps=1e-8, trainable=".*norm.*|.*q_proj.*")
    choose_trainable(model, config)
    optimizer = adamw(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in before:
            decay = 0.5 if before[name].ndim > 1 else 0.0  # norms do not decay
            gradient = gradients[name]
            assert gradient is not None
            expected = before[name] * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_clipping_returns_the_norm_before_it_scales(model: PreTrainedModel) -> None:
    choose_trainable(model, OptimConfig(trainable=".*norm.*"))
    chosen = [p for p in model.parameters() if p.requires_grad]
    for parameter in chosen:
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(p.numel() for p in chosen)
    norm = clip_gradients(model, OptimConfig(clip_norm=1.0))
    assert float(norm) == pytest.approx(3 * math.sqrt(count), rel=1e-6)
    after = math.sqrt(sum(float((p.grad**2).sum()) for p in chosen if p.grad is not None))
    assert after == pytest.approx(1.0, rel=1e-4)


def test_a_step_that_is_not_finite_is_left_out_with_all_after_it(model: PreTrainedModel) -> None:
    config = OptimConfig(lr=0.1, trainable=".*norm.*")
    choose_trainable(model, config)
    optimizer, chosen = adamw(model, config), [p for p in model.parameters() if p.requires_grad]
    guard = FiniteGuard(optimizer, World(0, 1, torch.device("cpu"), None))

    def step(number: int, gradient: float) -> None:
        for parameter in chosen:
            parameter.grad = torch.full_like(parameter, gradient)
        guard.judge(number, StepSums(guard.world), clip_gradients(model, config))
        optimizer.step()

    step(0, 1.0)
    guard.settle()
    after = [p.detach().clone() for p in chosen]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in chosen]
    for number, gradient in ((1, math.nan), (2, 1.0)):
        step(number, gradient)
    for parameter, old, moment in zip(chosen, after, moments, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    with pytest.raises(InputError, match="Step 2: the gradient is not finite"):
        guard.settle()


def test_eight_bit_moments_without_torchao_say_how_to_get_it(model: PreTrainedModel) -> None:
    if importlib.util.find_spec("torchao"):
        pytest.skip("torchao is installed")
    with pytest.raises(InputError, match="pip install torchao"):
        adamw(model, OptimConfig(state="8bit"))


def test_rate_is_set_where_it_is_kept() -> None:
    for rate in (0.5, torch.tensor(0.5)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        set_learning_rate(optimizer, 0.25)
        assert float(optimizer.param_groups[0]["lr"]) == 0.25
        assert isinstance(optimizer.param_groups[0]["lr"], type(rate))
