"""Logits of hidden · headᵀ at chosen ids only; backward as sparse as the choice.

    z[n, u] = softcap(scale · hidden[n] · head[ids[n, u]] + bias[ids[n, u]])

Floor: NU rows of the head read forward, and NU rows a side backward, 2NUD FLOPs each; no term has a
V in it but the dense [V, D] gradient that autograd is handed. Dots and sums are float32 (float64
for float64 inputs) in fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unteach.kernels.checks import (
    accumulation_dtype,
    check_ids,
    check_linear,
    check_logit_rule,
    choose_backend,
    valid_ids,
)
from unteach.kernels.logit_source import ExactSource, LinearSource, soft_cap, soft_cap_slope
from unteach.kernels.sparse_grad import Pairs, bias_grad, head_grad, hidden_grad


def gather_linear_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_NU: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`gather_linear` from full logits."""
    dtype = accumulation_dtype(hidden_ND)
    z = scale * (hidden_ND.to(dtype) @ head_VD.to(dtype).t())
    z = z if bias_V is None else z + bias_V.to(dtype)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    ids_NU = valid_ids(ids_NU, z.shape[1])
    return torch.where(ids_NU >= 0, z.gather(1, ids_NU.clamp(min=0)), 0)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        ids_NU: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        backend: str,
    ) -> Tensor:
        z_NU = soft_cap(_source(hidden_ND, head_VD, bias_V, scale, backend).at(ids_NU), softcap)
        ctx.softcap, ctx.scale, ctx.backend = softcap, scale, backend
        ctx.rows, ctx.vocab, ctx.dtype = hidden_ND.shape[0], head_VD.shape[0], hidden_ND.dtype
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            hidden_ND if needs[1] else None,
            head_VD if needs[0] else None,
            bias_V if needs[3] else None,
            ids_NU,
            None if softcap is None else z_NU,
        )
        return z_NU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NU: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, ids_NU, z_NU = ctx.saved_tensors
        if z_NU is not None:
            grad_NU = grad_NU * soft_cap_slope(z_NU, ctx.softcap)
        pairs = _pairs(ids_NU, grad_NU, ctx.backend)
        grads: list[Tensor | None] = [None] * 7
        if ctx.needs_input_grad[0]:
            grad_ND = hidden_grad(pairs, head_VD, ctx.rows, ctx.scale, ctx.backend)
            grads[0] = grad_ND.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = head_grad(pairs, hidden_ND, ctx.vocab, ctx.scale, ctx.backend)
        if ctx.needs_input_grad[3]:
            grads[3] = bias_grad(pairs, bias_V)
        return tuple(grads)


def _source(
    hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, scale: float, backend: str
) -> ExactSource:
    if backend == "triton":
        from unteach.kernels.triton_source import TritonLinear

        return TritonLinear.of(hidden_ND, head_VD, bias_V, scale)
    return LinearSource(hidden_ND, head_VD, bias_V, scale, accumulation_dtype(hidden_ND))


def _pairs(ids_NU: Tensor, grad_NU: Tensor, backend: str) -> Pairs:
    if backend == "triton":
        rows_N1 = torch.arange(ids_NU.shape[0], dtype=torch.int32, device=ids_NU.device)[:, None]
        slopes_NU = grad_NU.masked_fill(ids_NU < 0, 0)
        return Pairs(rows_N1.expand_as(ids_NU).flatten(), ids_NU.flatten(), slopes_NU.flatten())
    rows_P, slots_P = (ids_NU >= 0).nonzero(as_tuple=True)
    return Pairs(rows_P, ids_NU[rows_P, slots_P], grad_NU[rows_P, slots_P])


def gather_linear(
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_NU: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Logits at some ids of each row, differentiable in hidden states, head and bias.

    Args:
        ids_NU: integers of any type, repetitions allowed; an id outside the vocabulary (-1) gives
            0 and no gradient.
        softcap, scale: the model's own.
    Returns:
        logits_NU, float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_linear(hidden_ND, head_VD, bias_V)
    scale, softcap = check_logit_rule(scale, softcap)
    check_ids("ids_NU", ids_NU, hidden_ND.shape[0], hidden_ND.device)
    backend = choose_backend(backend, hidden_ND)
    ids_NU = valid_ids(ids_NU, head_VD.shape[0])
    logits_NU: Tensor = _GatherLinear.apply(
        hidden_ND, head_VD, ids_NU, bias_V, softcap, scale, backend
    )
    return logits_NU
