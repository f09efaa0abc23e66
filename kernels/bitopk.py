"""Bidirectional top-K distillation on raw logits, without an [N, V] tensor in either direction.

arXiv 2604.15482, eq. 3, over the top-K sets T of the teacher and S of the student:

    L = (1/Z) Σ_n ω_n [ Σ_{i in T} S_β(z_s, z_t) + α Σ_{j in S} S_β(z_s, z_t) ]
    dL/dz_s[i] = (ω_n / Z) w_i clamp((z_s - z_t) / β, -1, 1),    w_i = [i in T] + α [i in S]

There is no normaliser over the vocabulary: at most 2K logits of a row have a slope, and it is known
as soon as both logits are. So the dense work is one product, to find S (none if α = 0; one more to
find T where the teacher brings no ids); teacher logits, dL/dhidden and dL/dhead are gathers.

Floor on a CPU, float32, teacher ids given: 2NVD FLOPs (29 GFLOP at N=512, D=576, V=49152) against
8NVD of eager; head read once per 512 rows; about 5KN gathered rows of 4D bytes (K=32: 190 MB) for
the exact dots and both gradients. Memory beside the gradients: 5 MiB of tiles and pools (about 40
where rows of zeros make all logits tie), dL/dhidden in float32 (4ND bytes, so that a loss scale can
be applied before rounding) and 12 bytes for each of at most 2KN pairs. All logits, losses and sums
are float32 (float64 where an input is).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unteach.kernels.bitopk_reference import bitopk_reference
from unteach.kernels.bitopk_torch import BitopkOutput, LossOptions, forward_torch
from unteach.kernels.checks import (
    accumulation_dtype,
    check_device,
    check_ids,
    check_k,
    check_linear,
    check_logit_rule,
    check_number,
    check_vector,
    check_vocab,
    choose_backend,
)
from unteach.kernels.logit_source import LinearSource
from unteach.kernels.sparse_grad import Pairs, bias_grad, head_grad
from unteach.kernels.teachers import (
    HiddenTeacher,
    LogitsTeacher,
    SparseTeacher,
    Teacher,
    check_teacher,
    teacher_operands,
)
from unteach.kernels.triton_launch import MAX_K, MAX_LISTED

__all__ = [
    "BitopkOutput",
    "HiddenTeacher",
    "LogitsTeacher",
    "SparseTeacher",
    "bitopk_loss",
    "bitopk_loss_reference",
]


def bitopk_loss_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher,
    *,
    k: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    weight_N: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    center: bool = False,
    gate: float | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab: int | None = None,
    seeds_NS: Tensor | None = None,
    backend: str = "auto",
) -> BitopkOutput:
    """`bitopk_loss` from full logits and autograd; seeds and backend change nothing."""
    options = LossOptions(
        k=k, alpha=alpha, beta=beta, center=center, gate=gate, softcap=softcap, scale=scale
    )
    limit, options = _check(
        hidden_ND, head_VD, teacher, options, vocab, weight_N, normalizer, bias_V, seeds_NS
    )
    choose_backend(backend)
    loss, row_loss_N, student_ids_NS, coverage_N = bitopk_reference(
        hidden_ND,
        head_VD,
        teacher,
        **vars(options),
        weight_N=weight_N,
        normalizer=normalizer,
        bias_V=bias_V,
        vocab=limit,
    )
    none = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    return BitopkOutput(loss, row_loss_N, student_ids_NS, coverage_N, none)


class _SparseLoss(torch.autograd.Function):
    """A loss whose slopes are known: only grad_output is still missing."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        loss: Tensor,
        grad_ND: Tensor | None,
        pairs: Pairs,
        scale: float,
        backend: str,
    ) -> Tensor:
        ctx.backend, ctx.scale = backend, scale
        ctx.vocab, ctx.dtype = head_VD.shape[0], hidden_ND.dtype
        wants_head, wants_bias = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(
            grad_ND,
            hidden_ND if wants_head else None,
            bias_V if wants_bias else None,
            *((pairs.rows_P, pairs.ids_P, pairs.slopes_P) if wants_head or wants_bias else ()),
        )
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, hidden_ND, bias_V, *columns = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 8
        if ctx.needs_input_grad[0]:
            grads[0] = (grad_ND * grad_output).to(ctx.dtype)
        if columns:
            rows_P, ids_P, slopes_P = columns
            pairs = Pairs(rows_P, ids_P, slopes_P * grad_output)
            if ctx.needs_input_grad[1]:
                grads[1] = head_grad(pairs, hidden_ND, ctx.vocab, ctx.scale, ctx.backend)
            if ctx.needs_input_grad[2]:
                grads[2] = bias_grad(pairs, bias_V)
        return tuple(grads)


def bitopk_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher,
    *,
    k: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    weight_N: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    center: bool = False,
    gate: float | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab: int | None = None,
    seeds_NS: Tensor | None = None,
    backend: str = "auto",
) -> BitopkOutput:
    """Smooth-L1 between student and teacher logits over both top-K sets (module docstring).

    Args:
        weight_N: weight of each row; rows of weight 0 are skipped. None: ones.
        normalizer: what the sum is divided by, a number or a 0-d tensor. None: N.
        center: subtract from each side its mean over the row's union before comparing.
        gate: γ > 0; a row counts min(1, TV/γ), TV between both softmaxes over its union.
        softcap, scale: the model's own; they hold for a HiddenTeacher's logits too.
        vocab: ids at or beyond it are never selected (padding rows of the head).
        seeds_NS: ids that may be in the student's top K; only the speed depends on them.
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    options = LossOptions(
        k=k, alpha=alpha, beta=beta, center=center, gate=gate, softcap=softcap, scale=scale
    )
    limit, options = _check(
        hidden_ND, head_VD, teacher, options, vocab, weight_N, normalizer, bias_V, seeds_NS
    )
    backend = choose_backend(
        backend, hidden_ND, *teacher_operands(teacher), without_triton=_too_wide(teacher, options)
    )
    asked: dict[str, Any] = {
        "vocab": limit,
        "weight_N": weight_N,
        "normalizer": max(hidden_ND.shape[0], 1) if normalizer is None else normalizer,
        "seeds_NS": seeds_NS,
        "wants_hidden_grad": torch.is_grad_enabled() and hidden_ND.requires_grad,
    }
    with torch.no_grad():
        if backend == "triton":
            from unteach.kernels.bitopk_triton import forward_triton
            from unteach.kernels.triton_source import TritonLinear

            linear = TritonLinear.of(hidden_ND, head_VD, bias_V, options.scale)
            forward = forward_triton(linear, teacher, options, **asked)
        else:
            dtype = accumulation_dtype(hidden_ND)
            source = LinearSource(hidden_ND, head_VD, bias_V, options.scale, dtype)
            forward = forward_torch(source, teacher, options, **asked)
    found = forward.output
    loss = _SparseLoss.apply(
        hidden_ND,
        head_VD,
        bias_V,
        found.loss,
        forward.grad_ND,
        forward.pairs,
        options.scale,
        backend,
    )
    return found._replace(loss=loss)


def _too_wide(teacher: Teacher, options: LossOptions) -> str | None:
    """Why the kernels cannot hold this problem in registers."""
    if options.k > MAX_K:
        return f"k is {options.k}, the kernels hold {MAX_K}"
    ids_NM = None if isinstance(teacher, LogitsTeacher) else teacher.ids_NM
    if ids_NM is not None and ids_NM.shape[1] > MAX_LISTED:
        return f"teacher.ids_NM has {ids_NM.shape[1]} ids a row, the kernels hold {MAX_LISTED}"
    return None


def _check(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher,
    options: LossOptions,
    vocab: int | None,
    weight_N: Tensor | None,
    normalizer: float | Tensor | None,
    bias_V: Tensor | None,
    seeds_NS: Tensor | None,
) -> tuple[int, LossOptions]:
    """Check every argument; return how many ids can be selected, and plain options."""
    check_linear(hidden_ND, head_VD, bias_V)
    scale, softcap = check_logit_rule(options.scale, options.softcap)
    n, device = hidden_ND.shape[0], hidden_ND.device
    teacher_vocab = check_teacher(teacher, options.k, n, device)
    sizes = [size for size in (head_VD.shape[0], teacher_vocab) if size is not None]
    limit = check_vocab(vocab, min(sizes))
    k = check_k(options.k, limit)
    check_number("alpha", options.alpha, zero=True)
    check_number("beta", options.beta, zero=True)
    check_number("gate", options.gate, optional=True)
    if weight_N is not None:
        check_vector("weight_N", weight_N, n, device)
    if seeds_NS is not None:
        check_ids("seeds_NS", seeds_NS, n, device)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
            )
        check_device("normalizer", normalizer, device)
    elif n:
        check_number("normalizer", normalizer, optional=True)
    plain = replace(
        options,
        k=k,
        alpha=float(options.alpha),
        beta=float(options.beta),
        gate=None if options.gate is None else float(options.gate),
        scale=scale,
        softcap=softcap,
    )
    return limit, plain
