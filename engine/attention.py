"""Attention implementations by name: which need a package, and whether it is there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from unteach.engine.errors import InputError

# name → (distribution that brings it, how to install that)
FLASH = {
    "flash_attention_2": (
        "flash-attn",
        "`pip install --no-build-isolation 'unteach[flash]'` builds it where a CUDA toolkit is",
    ),
    "flash_attention_3": (
        "flash-attn-3",
        "build it from the folder `hopper` of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attention_4": ("flash-attn-4", "`pip install --pre 'unteach[fa4]'`"),
}


def check_attention(name: str, device: torch.device) -> str:
    """Name and version of an attention implementation that can train here.

    Raises:
        InputError: it is not installed, or has no kernels for this device; says what to do.
    """
    if name not in FLASH:
        if name == "flex_attention" and device.type == "cpu":
            raise InputError(
                "model.attention flex_attention has no backward pass on a CPU: set "
                "model.attention=sdpa."
            )
        return f"{name} of torch {torch.__version__}"
    try:
        found = version(FLASH[name][0])
    except PackageNotFoundError as error:
        raise InputError(
            f"model.attention {name} is not installed: {attention_remedy(name)}."
        ) from error
    if device.type != "cuda":
        raise InputError(f"model.attention {name} needs a CUDA device: set model.attention=sdpa.")
    return f"{name} of {FLASH[name][0]} {found}"


def attention_remedy(name: str) -> str:
    """How an attention implementation is installed, and what serves without it."""
    remedy = FLASH[name][1] if name in FLASH else "install it"
    return f"{remedy}, or set model.attention=sdpa"
