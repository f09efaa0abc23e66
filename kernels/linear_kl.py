"""KL(reference || student) over the full vocabulary, from hidden states, without an [N, V] tensor.

    KL_n = Σ_v p_r[v] (z_r[v] - z_s[v]) - log Σ exp z_r + log Σ exp z_s,     p = softmax(z)
    dKL_n / dz_s[v] = p_s[v] - p_r[v]

The mean of z_r - z_s under p_r is kept beside both log-sums in one walk: the terms that cancel when
both models agree cancel inside it. Logits are counted from the largest of their side so far, so
that an offset between the sides, which softmax cannot see, costs the differences no bits. Floor:
2NV(D + E) FLOPs forward; backward the same again and 2NVD for each gradient that is wanted. Logits
float32, running sums float64 per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unteach.kernels.checks import (
    accumulation_dtype,
    check_device,
    check_linear,
    check_logit_rule,
    check_vocab,
    choose_backend,
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


def linear_kl_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    reference_NE: Tensor,
    reference_head_VE: Tensor,
    *,
    vocab: int | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`linear_kl` from full logits."""
    dtype = accumulation_dtype(hidden_ND, reference_NE)
    limit = check_vocab(vocab, min(head_VD.shape[0], reference_head_VE.shape[0]))
    z_s = scale * (hidden_ND.to(dtype) @ head_VD.to(dtype).t())
    z_s = z_s if bias_V is None else z_s + bias_V.to(dtype)
    z_r = scale * (reference_NE.to(dtype) @ reference_head_VE.to(dtype).t()).detach()
    if softcap is not None:
        z_s, z_r = (softcap * torch.tanh(z / softcap) for z in (z_s, z_r))
    logp_s, logp_r = z_s[:, :limit].log_softmax(1), z_r[:, :limit].log_softmax(1)
    return (logp_r.exp() * (logp_r - logp_s)).sum(1).to(accumulation_dtype(hidden_ND))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        reference_NE: Tensor,
        reference_head_VE: Tensor,
        bias_V: Tensor | None,
        vocab: int,
        softcap: float | None,
        scale: float,
    ) -> Tensor:
        dtype, n = accumulation_dtype(hidden_ND), hidden_ND.shape[0]
        student = LinearSource(hidden_ND, head_VD, bias_V, scale, dtype)
        reference = LinearSource(reference_NE, reference_head_VE, None, scale, dtype)
        kl_N = torch.empty(n, dtype=dtype, device=hidden_ND.device)
        log_sums_4N = torch.empty(4, n, dtype=dtype, device=hidden_ND.device)
        for rows in row_slices(n, vocab, hidden_ND.device):
            ours, theirs = student.take(rows), reference.take(rows)
            sum_s, sum_r = (OnlineSum(ours.rows, hidden_ND.device) for _ in range(2))
            for start, stop in tiles(vocab, hidden_ND.device):
                z_s = capped_tile(ours, start, stop, softcap)
                z_r = capped_tile(theirs, start, stop, softcap)
                before = sum_s.base_N - sum_r.base_N
                gap = sum_r.lower_(z_r) - sum_s.lower_(z_s)
                # the gaps of the tiles before were taken from other bases
                moved = sum_s.base_N - sum_r.base_N - before
                sum_r.weighted_N = sum_r.weighted_N + sum_r.sum_N * moved
                sum_r.add_(z_r, gap)
                sum_s.add_(z_s)
            # the bases stand in the mean and in both log-sums, and cancel
            kl_N[rows] = (sum_r.mean() - sum_r.log() + sum_s.log()).to(dtype)
            kept = (sum_s.base_N, sum_s.log(), sum_r.base_N, sum_r.log())
            log_sums_4N[:, rows] = torch.stack(kept).to(dtype)
        ctx.vocab, ctx.softcap, ctx.scale = vocab, softcap, scale
        # autograd refuses to save a tensor that was made in inference mode
        reference_side = reference_NE, reference_head_VE
        ctx.unsaved = [x if x.is_inference() else None for x in reference_side]
        saved = [None if x.is_inference() else x for x in reference_side]
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, log_sums_4N, *saved)
        return kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, log_sums_4N, *saved = ctx.saved_tensors
        reference_NE, reference_head_VE = (
            held if x is None else x for x, held in zip(saved, ctx.unsaved, strict=True)
        )
        dtype, softcap = accumulation_dtype(hidden_ND), ctx.softcap
        slices = row_slices(hidden_ND.shape[0], ctx.vocab, hidden_ND.device)
        source = LinearSource(reference_NE, reference_head_VE, None, ctx.scale, dtype)
        reference = [source.take(rows) for rows in slices]
        grad_N = grad_N.to(dtype)

        def slopes_(index: int, z: Tensor, start: int, stop: int) -> Tensor:
            rows = slices[index]
            p_r = capped_tile(reference[index], start, stop, softcap)
            softmax_(p_r, log_sums_4N[2:, rows])
            softmax_(z, log_sums_4N[:2, rows])
            return z.sub_(p_r).mul_(grad_N[rows, None])

        needs = ctx.needs_input_grad
        grads = linear_grads(
            LinearSource(hidden_ND, head_VD, bias_V, ctx.scale, dtype),
            slopes_,
            vocab=ctx.vocab,
            softcap=softcap,
            wants=(needs[0], needs[1], needs[4]),
        )
        grad_ND = None if grads.hidden_ND is None else grads.hidden_ND.to(hidden_ND.dtype)
        return grad_ND, grads.head_VD, None, None, grads.bias_V, None, None, None


def linear_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    reference_NE: Tensor,
    reference_head_VE: Tensor,
    *,
    vocab: int | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """KL divergence of the student from a frozen reference, per row, in nats.

    Args:
        reference_NE, reference_head_VE: the reference's hidden states and head; no gradient.
        vocab: ids at or beyond it belong to neither distribution. None: ids that both heads have.
        bias_V: the student's only; append a column to the reference for one of its own.
        softcap, scale: the model's own, applied to both sides.
    Returns:
        kl_N, float32 (float64 for float64 inputs), differentiable in the student.
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_linear(hidden_ND, head_VD, bias_V)
    names = ("reference_NE", "reference_head_VE", "")
    check_linear(reference_NE, reference_head_VE, None, names=names)
    scale, softcap = check_logit_rule(scale, softcap)
    check_device("reference_NE", reference_NE, hidden_ND.device)
    if reference_NE.shape[0] != hidden_ND.shape[0]:
        raise ValueError(
            f"reference_NE has {reference_NE.shape[0]} rows, expected {hidden_ND.shape[0]} "
            "like hidden_ND"
        )
    limit = check_vocab(vocab, min(head_VD.shape[0], reference_head_VE.shape[0]))
    choose_backend(backend, hidden_ND, without_triton="linear_kl has no kernels of its own")
    kl_N: Tensor = _LinearKL.apply(
        hidden_ND,
        head_VD,
        reference_NE.detach(),
        reference_head_VE.detach(),
        bias_V,
        limit,
        softcap,
        scale,
    )
    return kl_N
