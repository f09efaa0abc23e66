# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""One AdamW update of one tensor in one kernel, with stochastic rounding to bf16 where asked.

The equations and the noise are `engine/train/lean_adamw.py`'s, which in torch's own operations
takes some sixty passes over float32 and int64 copies of each slice.

Floor: every tensor read once, all but the gradient written once: 14 bytes an element where
parameter, moments and gradient are bf16, 9.4 ms at 3.2 billion parameters and 4.8 TB/s. Not
measured on a GPU yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from unteach.kernels.triton_launch import ADAMW_BLOCK, on_device


@triton.jit
def _mixed(x):
    """Wellons' lowbias32 on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _lost(log_beta, step):
    """1 - β^step, to float32 precision where it is small: its own series there."""
    y = log_beta * step
    series = -y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))))
    return tl.where(y > -0.1, series, 1 - tl.exp(y))


@triton.jit
def _put(ptr, offs, value, live, drawn, STOCHASTIC: tl.constexpr):
    """Store, after stochastic rounding by the 16 bits drawn."""
    if STOCHASTIC:
        bits = value.to(tl.uint32, bitcast=True) + drawn
        up_or_down = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < float("inf"), up_or_down, value)
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["place"])
def adamw_kernel(
    p_ptr,  # [numel] each
    m_ptr,
    v_ptr,
    g_ptr,
    step_ptr,  # float32, counts this update
    found_ptr,  # float32: above 0 nothing changes
    numel,
    place,  # the tensor's salt and the number of its first element, added mod 2^32
    lr,
    kept,  # 1 - lr · weight decay
    rest1,  # 1 - β1
    rest2,
    log_beta1,
    log_beta2,
    eps,
    HAS_FOUND: tl.constexpr,
    ROUND_P: tl.constexpr,
    ROUND_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HAS_FOUND:
        numel = tl.where(tl.load(found_ptr) > 0, 0, numel)
    live = offs < numel
    p = tl.load(p_ptr + offs, mask=live, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=live, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offs, mask=live, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=live, other=0.0).to(tl.float32)
    step = tl.load(step_ptr)

    # Not m + (1-β)(g - m): where β is near 0 that loses a g far smaller than the moment.
    m = (m - rest1 * m) + rest1 * g
    v = (v - rest2 * v) + rest2 * (g * g)
    down = tl.sqrt(v / _lost(log_beta2, step)) + eps
    p = p * kept - lr * (m / _lost(log_beta1, step)) / down

    mixed = _mixed(offs.to(tl.uint32) + place.to(tl.uint32))
    mixed = _mixed(mixed + step.to(tl.int64).to(tl.uint32) * 0x27D4EB2F)
    _put(p_ptr, offs, p, live, mixed & 0xFFFF, ROUND_P)
    _put(m_ptr, offs, m, live, mixed >> 16, ROUND_STATE)
    _put(v_ptr, offs, v, live, _mixed(mixed + 0x9E3779B9) & 0xFFFF, ROUND_STATE)


def adamw_triton(
    tensors: tuple[Tensor, ...],
    step: Tensor,
    found_inf: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    place: tuple[int, int],
) -> None:
    """Update parameter and moments in place.

    Args:
        tensors: parameter, first and second moment, gradient: each [numel], contiguous, bf16, fp16
            or fp32; only bf16 is rounded stochastically.
        step: 0-d float32 on the device, this update counted.
        found_inf: 0-d on the device; above 0 nothing changes.
        place: number of the first element in its whole tensor, and what sets its noise apart.
    """
    p, m, v, g = tensors
    if not p.numel():
        return
    with on_device(p):
        adamw_kernel[(-(-p.numel() // ADAMW_BLOCK),)](
            p,
            m,
            v,
            g,
            step,
            step if found_inf is None else found_inf.float(),
            p.numel(),
            (sum(place) + 2**31) % 2**32 - 2**31,  # one type whatever its size, so one build
            lr,
            1 - lr * weight_decay,
            1 - betas[0],
            1 - betas[1],
            _log(betas[0]),
            _log(betas[1]),
            eps,
            HAS_FOUND=found_inf is not None,
            ROUND_P=p.dtype == torch.bfloat16,
            ROUND_STATE=m.dtype == torch.bfloat16,
            BLOCK=ADAMW_BLOCK,
            num_warps=4,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf  # 0^step is 0 from the first step on
