"""AdamW in little memory: bf16 parameters and bf16 moments, rounded stochastically.

Rounding to nearest would lose what is smaller than half a unit in the last place: an update of
1e-5 to a weight of 0.1, or the decay of a second moment at β2 = 0.999. Stochastic rounding keeps
both on average: x goes up with the probability of its place between its two bf16 neighbours.

The noise is a hash of seed, step, tensor and element, not a generator's state: the same on any
number of ranks, the same after a resume. Arithmetic is float32: on a GPU one kernel for a tensor
(`kernels/adamw_triton.py`), elsewhere torch's operations, a slice of a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from unteach.kernels.checks import choose_backend

SLICE = 1 << 17  # elements that are float32 at a time: some twenty such arrays stay in a cache
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
        tensors = (parameter, state["exp_avg"], state["exp_avg_sq"])
        assert parameter.grad is not None
        p, m, v = (_local(t).view(-1) for t in tensors)
        flat = (p, m, v, _local(parameter.grad).reshape(-1))
        place = _first_element(parameter), _salt(self.seed, number)
        if choose_backend("auto", *flat) == "triton":
            from unteach.kernels.adamw_triton import adamw_triton  # triton may not be installed

            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adamw_triton(flat, state["step"], skipped, **options, place=place)
        else:
            _in_slices(flat, state["step"], skipped, group, place)


def _in_slices(
    flat: tuple[Tensor, ...],
    step: Tensor,
    skipped: Tensor | None,
    group: dict[str, Any],
    place: tuple[int, int],
) -> None:
    """By torch's operations; `place` is the number of the first element, and the tensor's salt."""
    if skipped is not None and float(skipped) > 0:
        return
    for start in range(0, flat[0].numel(), SLICE):
        part = [t[start : start + SLICE] for t in flat]
        p, m, v, g = (t.float() for t in part)
        new = _adamw(p, m, v, g, step, group)
        rounds = torch.bfloat16 in (part[0].dtype, part[1].dtype)
        chance = noise(len(p), place[0] + start, place[1], step) if rounds else (p, m, v)
        for old, value, drawn in zip(part[:3], new, chance, strict=True):
            old.copy_(rounded(value, drawn) if old.dtype == torch.bfloat16 else value)


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


@torch.no_grad()
def add_on_average(parameter: Tensor, change: Tensor, number: int) -> None:
    """Add `change` to this rank's rows of a parameter, and what bf16 cannot hold on average.

    Args:
        change: of the shape of those rows.
        number: sets the noise of this parameter apart from that of others.
    """
    flat, added = _local(parameter).view(-1), change.reshape(-1)
    first, salt = _first_element(parameter), _salt(0, number)
    once = torch.zeros((), device=flat.device)
    for start in range(0, flat.numel(), SLICE):
        old = flat[start : start + SLICE]
        value = old.float() + added[start : start + SLICE]
        if old.dtype == torch.bfloat16:
            value = rounded(value, noise(len(old), first + start, salt, once)[0])
        old.copy_(value)


def rounded(value: Tensor, drawn: Tensor) -> Tensor:
    """float32 values as bf16, up where the 16 bits that go and those drawn come to 2^16."""
    bits = value.view(torch.int32).add(drawn).bitwise_and_(~MASK)
    # A NaN whose bits ran over stays one; a select would cost more than all the rest on a CPU.
    return bits.view(torch.float32).add_(value.clamp(-1, 1), alpha=0).to(torch.bfloat16)


def noise(count: int, first: int, salt: int, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For parameter and both moments int32 [count], uniform from 0 to 65535.

    Args:
        first: number of the first element in its whole tensor.
        salt: of the tensor.
        step: 0-d.
    """
    x = torch.arange(count, dtype=torch.int32, device=step.device)
    x = _mixed(x.add_(_wrapped(first + salt)))
    x = _mixed(x.add_((step.long() * 0x27D4EB2F).to(torch.int32)))
    low, high = x & MASK, (x >> 16).bitwise_and_(MASK)
    return low, high, _mixed(x.add_(_wrapped(0x9E3779B9))).bitwise_and_(MASK)


def _salt(seed: int, tensor: int) -> int:
    """What sets the noise of a tensor apart, as an int32."""
    return _wrapped(seed * 0x9E3779B1 + tensor * 0x85EBCA77)


def _mixed(x: Tensor) -> Tensor:
    """Wellons' lowbias32, in place: every bit flips every other with probability one half."""
    x.bitwise_xor_((x >> 16).bitwise_and_(MASK)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_wrapped(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(MASK))


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
