"""AdamW in little memory: bf16 parameters and bf16 moments, rounded stochastically.

Rounding to nearest would lose what is smaller than half a unit in the last place: an update of
1e-5 to a weight of 0.1, or the decay of a second moment at β2 = 0.999. Stochastic rounding keeps
both on average: x goes up with the probability of its place between its two bf16 neighbours.

The noise is a hash of seed, step, tensor and element, not a generator's state: the same on any
number of ranks, the same after a resume. Arithmetic is float32, a slice of a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

SLICE = 1 << 22  # elements that are float32 at a time
MASK = 0xFFFF  # the mantissa bits of float32 that bf16 lacks


class LeanAdamW(torch.optim.Optimizer):
    """AdamW whose moments have a dtype of their own; see the module's docstring.

    m ← β1 m + (1-β1) g;  v ← β2 v + (1-β2) g²;  p ← p (1 - lr·λ) - lr m̂ / (√v̂ + ε)

    A device-side `found_inf` of 1 leaves everything as it is, as in torch's fused AdamW.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.state_dtype, self.seed = state_dtype, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, except that moments keep their dtype: torch casts to the parameter's."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=_local(parameter).device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        skipped = self.found_inf
        taken = 1.0 if skipped is None else 1.0 - skipped.to(state["step"].device)
        state["step"] += taken
        tensors = [parameter, state["exp_avg"], state["exp_avg_sq"]]
        assert parameter.grad is not None
        flat = [*(_local(t).view(-1) for t in tensors), _local(parameter.grad).reshape(-1)]
        first = _first_element(parameter)
        for start in range(0, flat[0].numel(), SLICE):
            part = [t[start : start + SLICE] for t in flat]
            p, m, v, g = (t.float() for t in part)
            new = _adamw(p, m, v, g, state["step"], group)
            for index, (old, value) in enumerate(zip(part[:3], new, strict=True)):
                if skipped is not None:
                    value = torch.where(skipped.to(value.device) > 0, old.float(), value)
                key = (self.seed, state["step"], 3 * number + index)
                old.copy_(rounded(value, old.dtype, first + start, key))


def _adamw(
    p: Tensor, m: Tensor, v: Tensor, g: Tensor, step: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    beta1, beta2 = group["betas"]
    m = m.lerp(g, 1 - beta1)  # not in place: a float32 tensor is its own float32 copy
    v = v.lerp(g.square(), 1 - beta2)
    down = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    p = p * (1 - group["lr"] * group["weight_decay"])
    p = p - group["lr"] * (m / (1 - beta1**step)) / down
    return p, m, v


def rounded(value: Tensor, dtype: torch.dtype, first: int, key: tuple[int, Tensor, int]) -> Tensor:
    """float32 values in `dtype`: as they are, or rounded stochastically to bf16.

    Args:
        first: number of the first element in its whole tensor.
        key: seed, step (0-d, on the device) and number of the tensor.
    """
    if dtype != torch.bfloat16:
        return value.to(dtype)
    bits = value.contiguous().view(torch.int32) + noise(value.numel(), first, key, value.device)
    return torch.where(value.isfinite(), (bits & ~MASK).view(torch.float32), value).to(dtype)


def noise(count: int, first: int, key: tuple[int, Tensor, int], device: torch.device) -> Tensor:
    """int32 [count], uniform from 0 to 65535: a 32-bit hash of element, seed, step and tensor."""
    seed, step, tensor = key
    x = torch.arange(first, first + count, device=device).to(torch.int32)
    x = _mixed(x + _wrapped(seed * 0x9E3779B1 + tensor * 0x85EBCA77))
    return _mixed(x + (step.to(device).long() * 0x27D4EB2F).to(torch.int32)) & MASK


def _mixed(x: Tensor) -> Tensor:
    """Wellons' lowbias32: every input bit flips every output bit with probability one half."""
    x = (x ^ (x >> 16 & MASK)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _wrapped(0x846CA68B)
    return x ^ (x >> 16 & MASK)


def _wrapped(value: int) -> int:
    """The int32 of the same low 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_element(parameter: Tensor) -> int:
    """Where this rank's rows begin in the whole tensor, counted in elements."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0] * math.prod(parameter.shape[1:]) if offset else 0
