"""Activation checkpointing: what a block keeps for its backward pass, and what it makes again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
PRODUCTS = frozenset((_aten.mm.default, _aten.addmm.default, _aten.bmm.default))
ATTENTION = frozenset(
    (
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    )
)
# Beside attention, every n-th matrix product of a block is kept: they take longest to make.
KEPT = {"elementwise": 1, "selective": 2}


def checkpoint_blocks(layers: nn.ModuleList, mode: str | int) -> None:
    """Wrap the blocks that recompute: none, all, every n-th, or all of them by operation."""
    if mode == "off":
        return
    every = mode if isinstance(mode, int) else 1
    options: dict[str, Any] = {}
    if mode in KEPT:
        options["context_fn"] = partial(_keeping, KEPT[str(mode)])
    for index in range(0, len(layers), every):
        layers[index] = checkpoint_wrapper(layers[index], **options)


def _keeping(nth: int) -> Any:
    """Contexts of one block's forward pass and its repetition, which makes what was not kept."""
    products = {False: 0, True: 0}  # met so far, in the first pass and in the repetition

    def policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        if operation in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operation in PRODUCTS:
            products[context.is_recompute] += 1
            if products[context.is_recompute] % nth == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
