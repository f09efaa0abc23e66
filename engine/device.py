"""Which device a run computes on."""

from __future__ import annotations

import os

import torch

from unteach.engine.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one, and this rank's own card under torchrun."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"run.device is {name}: choose auto, cpu or cuda.")
    if name == "cpu" or not torch.cuda.is_available():
        if name == "cuda":
            raise InputError("run.device is cuda, but torch sees no CUDA device: set it to auto.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
