"""Which parameters train, with what optimiser, at what rate."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from unteach.engine.config import Config, OptimConfig
from unteach.engine.errors import InputError
from unteach.engine.model import DTYPES, PreTrainedModel, empty_model, head_weight
from unteach.engine.train.lean_adamw import LeanAdamW
from unteach.engine.train.lora import add_adapters


def check_trainable(config: Config, path: str) -> None:
    """Refuse a pattern that trains nothing, by a model's names alone.

    Raises:
        InputError: names the key, of the training or of the teaching before it.
    """
    asked = {"optim.trainable": config.optim}
    if config.target is not None:
        asked["target.trainable"] = OptimConfig(trainable=config.target.trainable)
    for key, optim in asked.items():
        choose_trainable(empty_model(path, config.model), optim, key)


def choose_trainable(
    model: PreTrainedModel, config: OptimConfig, key: str = "optim.trainable"
) -> list[str]:
    """Freeze what the pattern does not match, or all but adapters; return what trains.

    Args:
        key: of the config, which holds the pattern.
    Raises:
        InputError: no pattern, or one that matches no parameter.
    """
    try:
        pattern = re.compile(config.trainable)
    except re.error as error:
        raise InputError(f"{key} {config.trainable!r} is no pattern: {error}.") from error
    if config.lora_rank is not None:
        return add_adapters(model, config)
    head = head_weight(model) if config.head == "frozen" else None
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(pattern.fullmatch(name)) and parameter is not head)
        if parameter.requires_grad:
            chosen.append(name)
    if not chosen:
        first = next(name for name, _ in model.named_parameters())
        raise InputError(f"{key} {config.trainable!r} matches no parameter; one is named {first}.")
    return chosen


def adamw(model: nn.Module, config: OptimConfig, *, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; vectors (norms, biases) do not decay.

    torch's fused one where parameters and moments are float32, else the lean one of this room, or
    torchao's for 8-bit moments. bf16 parameters are always rounded stochastically.

    Raises:
        InputError: 8-bit moments without torchao.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.state == "8bit":
        return _eight_bit(groups, options, seed)
    if config.state == "float32" and all(p.dtype == torch.float32 for p in trainable):
        return torch.optim.AdamW(groups, **options, fused=True)
    return LeanAdamW(groups, **options, state_dtype=DTYPES[config.state], seed=seed)


def _eight_bit(
    groups: list[dict[str, Any]], options: dict[str, Any], seed: int
) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "optim.state 8bit is torchao's, which is not installed: `pip install torchao`, or set "
            "optim.state=bfloat16."
        ) from error
    optimizer = AdamW8bit(groups, **options, bf16_stochastic_round=True)

    def reseed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Its rounding draws from torch's generator, which a resumed run must find as it was.
        steps = [int(state["step"]) for state in optimizer.state.values()]
        torch.manual_seed(seed * 1_000_003 + max(steps, default=0))

    optimizer.register_step_pre_hook(reseed)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step; some optimisers keep it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of optimiser step `step`, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(config.steps - config.warmup_steps, 1)
    share = (step - config.warmup_steps) / span
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1.0 - share)
        case "cosine":
            return config.lr * 0.5 * (1.0 + math.cos(math.pi * share))


def clip_gradients(model: nn.Module, config: OptimConfig) -> Tensor:
    """Scale gradients down to the largest allowed global norm; return the norm before that."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    limit = config.clip_norm if config.clip_norm is not None else math.inf
    return nn.utils.clip_grad_norm_(trainable, limit)
