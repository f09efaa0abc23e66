"""Log-probabilities of labels under hidden · headᵀ, without an [N, V] tensor.

    logp_n = z_n[y_n] - log Σ_v exp z_n[v],      d logp_n / dz_n[v] = [v = y_n] - softmax(z_n)[v]

The slope is dense, so both directions walk over vocabulary tiles and nothing but the row's
maximum and log Σ exp above it is kept between them. Floor: 2NVD FLOPs forward, 6NVD backward (4NVD
with a frozen head); the head read twice per block of rows (512 on a CPU). Logits and sums float32,
running sums float64 per row.
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
from unteach.kernels.dense_tiles import (
    OnlineSum,
    capped_tile,
    linear_grads,
    row_slices,
    softmax_,
    tiles,
)
from unteach.kernels.logit_source import LinearSource


def linear_logprob_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`linear_logprob` from full logits."""
    dtype = accumulation_dtype(hidden_ND)
    z = scale * (hidden_ND.to(dtype) @ head_VD.to(dtype).t())
    z = z if bias_V is None else z + bias_V.to(dtype)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels_N = valid_ids(labels_N, z.shape[1])
    logp = z.log_softmax(1).gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels_N >= 0, logp, 0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        dtype, v = accumulation_dtype(hidden_ND), head_VD.shape[0]
        active_N = (labels_N >= 0).nonzero().squeeze(1)
        labels_A = labels_N[active_N]
        source = LinearSource(hidden_ND, head_VD, bias_V, scale, dtype).take(active_N)
        log_sum_2A = torch.empty(2, source.rows, dtype=dtype, device=hidden_ND.device)
        logp_N = torch.zeros(labels_N.shape[0], dtype=dtype, device=hidden_ND.device)
        for rows in row_slices(source.rows, v, source.device):
            here, labels = source.take(rows), labels_A[rows]
            chosen = torch.zeros(labels.shape[0], dtype=dtype, device=hidden_ND.device)
            online = OnlineSum(labels.shape[0], hidden_ND.device)
            for start, stop in tiles(v, source.device):
                z = capped_tile(here, start, stop, softcap)
                inside, column = _labels_within(labels, start, stop)
                chosen = torch.where(inside, z.gather(1, column[:, None])[:, 0], chosen)
                online.add_(online.lower_(z))
            log_sum_2A[:, rows] = torch.stack((online.base_N, online.log())).to(dtype)
            logp_N[active_N[rows]] = (chosen.double() - online.base_N - online.log()).to(dtype)
        ctx.softcap, ctx.scale = softcap, scale
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, active_N, labels_A, log_sum_2A)
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, active_N, labels_A, log_sum_2A = ctx.saved_tensors
        dtype, v = accumulation_dtype(hidden_ND), head_VD.shape[0]
        source = LinearSource(hidden_ND, head_VD, bias_V, ctx.scale, dtype).take(active_N)
        grad_A = grad_N[active_N].to(dtype)
        slices = row_slices(source.rows, v, source.device)

        def slopes_(index: int, z: Tensor, start: int, stop: int) -> Tensor:
            rows = slices[index]
            softmax_(z, log_sum_2A[:, rows]).mul_(-grad_A[rows, None])
            inside, column = _labels_within(labels_A[rows], start, stop)
            return z.scatter_add_(1, column[:, None], (grad_A[rows] * inside)[:, None])

        needs = ctx.needs_input_grad
        grads = linear_grads(
            source, slopes_, vocab=v, softcap=ctx.softcap, wants=(needs[0], needs[1], needs[3])
        )
        grad_ND = None
        if grads.hidden_ND is not None:
            grad_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format)
            grad_ND[active_N] = grads.hidden_ND.to(hidden_ND.dtype)
        return grad_ND, grads.head_VD, None, grads.bias_V, None, None


def _labels_within(labels_A: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Whether each row's label falls into a tile, and its column there, any where it does not."""
    inside = (labels_A >= start) & (labels_A < stop)
    return inside, (labels_A - start).clamp(0, stop - start - 1)


def linear_logprob(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each row's label, nats, differentiable in hidden states, head and bias.

    Args:
        labels_N: integers; -100, or any id outside the vocabulary, gives 0 and no gradient.
        softcap, scale: the model's own.
    Returns:
        logp_N, float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_linear(hidden_ND, head_VD, bias_V)
    scale, softcap = check_logit_rule(scale, softcap)
    check_ids("labels_N", labels_N, hidden_ND.shape[0], hidden_ND.device, dimensions=1)
    choose_backend(backend, hidden_ND, without_triton="linear_logprob has no kernels of its own")
    labels_N = valid_ids(labels_N, head_VD.shape[0])
    logp_N: Tensor = _LinearLogprob.apply(hidden_ND, head_VD, labels_N, bias_V, softcap, scale)
    return logp_N
