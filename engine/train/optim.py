"""Which parameters train, with what optimiser, at what rate."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from unteach.engine.config import OptimConfig
from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedModel, head_weight


def choose_trainable(model: PreTrainedModel, config: OptimConfig) -> list[str]:
    """Freeze what `optim.trainable` does not match; return the names that train.

    Raises:
        InputError: no pattern, or one that matches no parameter.
    """
    try:
        pattern = re.compile(config.trainable)
    except re.error as error:
        raise InputError(f"optim.trainable {config.trainable!r} is no pattern: {error}.") from error
    head = head_weight(model) if config.head == "frozen" else None
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(pattern.fullmatch(name)) and parameter is not head)
        if parameter.requires_grad:
            chosen.append(name)
    if not chosen:
        first = next(name for name, _ in model.named_parameters())
        raise InputError(
            f"optim.trainable {config.trainable!r} matches no parameter; one is named {first}."
        )
    return chosen


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; vectors (norms, biases) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


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
