"""Eq. 3 on a GPU: every row at once, shapes that the host knows, no sync.

The searches work on lists of rows; everything after them on the rectangle [N, U] of both sets' ids,
where an empty slot has id -1. Nothing has a V in it but the head and its gradient. Ignored rows
are searched in no pass and keep empty slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unteach.kernels.bitopk_torch import BitopkOutput, Forward, LossOptions
from unteach.kernels.checks import valid_ids
from unteach.kernels.logit_source import soft_cap
from unteach.kernels.sparse_grad import Pairs
from unteach.kernels.sparse_grad_triton import hidden_grad_triton
from unteach.kernels.teachers import HiddenTeacher, LogitsTeacher, Teacher, TeacherRows
from unteach.kernels.tile_grad import row_loss_kernel
from unteach.kernels.topk_rank import first_occurrences
from unteach.kernels.topk_triton import search
from unteach.kernels.triton_launch import next_power, on_device
from unteach.kernels.triton_source import TritonGiven, TritonLinear, TritonSource
from unteach.kernels.union_loss import Union, join_sets


def forward_triton(
    source: TritonLinear,
    teacher: Teacher,
    options: LossOptions,
    *,
    vocab: int,
    weight_N: Tensor | None,
    normalizer: float | Tensor,
    seeds_NS: Tensor | None,
    wants_hidden_grad: bool,
) -> Forward:
    """`forward_torch` by kernels."""
    n, k, device, head_VD = source.rows, options.k, source.device, source.head_VD
    ones_N = torch.ones(n, dtype=torch.float32, device=device)
    weight_N = ones_N if weight_N is None else weight_N.float()
    active_N = weight_N != 0
    factor_N = torch.where(active_N, weight_N / normalizer, 0)
    told, fallback = _read_teacher(teacher, options, vocab, active_N)
    student, student_ids_NS = None, torch.zeros(n, 0, dtype=torch.int32, device=device)
    if options.alpha:
        spare = min(2 * k, head_VD.shape[0]) - k
        found = search(source, k, vocab, active_N=active_N, seeds_NS=seeds_NS, spare=spare)
        student, fallback = found.top, fallback + found.fallback
        ids_NS = torch.cat((student.ids_NK, student.spare_NR), 1)
        student_ids_NS = ids_NS.masked_fill(~active_N[:, None], -1).to(torch.int32)
    union = join_sets(told, student, source, k=k, alpha=options.alpha, softcap=options.softcap)
    live_NU = union.live_NU & active_N[:, None]
    ids_NU = union.ids_NU.to(torch.int32).masked_fill(~live_NU, -1)
    row_loss_N, slope_NU = _row_losses(union, live_NU, factor_N, options)
    row_loss_N = row_loss_N.masked_fill(active_N & ~union.finite_N, torch.nan)
    loss = torch.where(active_N, row_loss_N.double() * factor_N.double(), 0).sum().float()
    rows_NU = torch.arange(n, dtype=torch.int32, device=device)[:, None].expand(ids_NU.shape)
    pairs = Pairs(rows_NU.flatten(), ids_NU.flatten(), slope_NU.flatten())
    grad_ND = None
    if wants_hidden_grad:
        grad_ND = hidden_grad_triton(pairs, head_VD, n, options.scale)
    coverage_N = torch.where(active_N, union.coverage_N, 1)
    output = BitopkOutput(loss, row_loss_N, student_ids_NS, coverage_N, fallback)
    return Forward(output, pairs, grad_ND)


def _read_teacher(
    teacher: Teacher, options: LossOptions, vocab: int, active_N: Tensor
) -> tuple[TeacherRows, Tensor]:
    """The teacher's set of every row, and how many rows its search gave up on."""
    k, softcap = options.k, options.softcap
    source: TritonSource | None = None
    if isinstance(teacher, HiddenTeacher):
        source = TritonLinear.of(teacher.hidden_NE, teacher.head_VE, teacher.bias_V, options.scale)
    elif isinstance(teacher, LogitsTeacher):
        source, softcap = TritonGiven.of(teacher.logits_NV), None
    if isinstance(teacher, LogitsTeacher) or teacher.ids_NM is None:
        assert source is not None
        found = search(source, k, vocab, active_N=active_N)
        ids_NK = found.top.ids_NK.masked_fill(~active_N[:, None], -1)
        logits = soft_cap(found.top.raw_NK, softcap)
        return TeacherRows(ids_NK, logits, source, softcap, 0), found.fallback
    given = teacher.logits_NM
    ids_NM = teacher.ids_NM if given is not None else teacher.ids_NM[:, :k]
    ids_NM = valid_ids(ids_NM, vocab).masked_fill(~active_N[:, None], -1)
    ids_NM = first_occurrences(ids_NM)
    if given is None:
        assert source is not None
        logits = soft_cap(source.at(ids_NM), softcap)
    else:
        logits = given.detach().float()
    none = torch.zeros((), dtype=torch.int64, device=active_N.device)
    return TeacherRows(ids_NM, logits, source, softcap, 0), none


def _row_losses(
    union: Union, live_NU: Tensor, factor_N: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its slopes times the row's factor."""
    n, u = union.ids_NU.shape
    loss_N = torch.zeros(n, dtype=torch.float32, device=live_NU.device)
    slope_NU = torch.zeros(n, u, dtype=torch.float32, device=live_NU.device)
    if not slope_NU.numel():
        return loss_N, slope_NU
    with on_device(slope_NU):
        row_loss_kernel[(n,)](
            union.student_NU.masked_fill(~live_NU, 0),
            union.teacher_NU.masked_fill(~live_NU, 0),
            union.weight_NU.masked_fill(~live_NU, 0),
            live_NU.to(torch.uint8),
            factor_N,
            loss_N,
            slope_NU,
            u,
            options.beta,
            1.0 if options.gate is None else options.gate,
            1.0 if options.softcap is None else options.softcap,
            L1=options.beta == 0,
            CENTER=options.center,
            HAS_GATE=options.gate is not None,
            HAS_CAP=options.softcap is not None,
            BLOCK_U=next_power(max(16, u)),
            num_warps=4,
        )
    return loss_N, slope_NU
