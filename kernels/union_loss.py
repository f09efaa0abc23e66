"""The row-local half of Eq. 3: both top-K sets become one union, and the union a loss and slopes.

Every id of a row stands once, in ascending order, with weight [in T] + α [in S]; an id that only
one side found gets the other side's logit by a fixed-order dot. Nothing here grows with V, and each
sum runs in a fixed order over the slots, so a row's result is the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.fixed_dot import tree_sum_
from unteach.kernels.logit_source import ExactSource, soft_cap, soft_cap_slope
from unteach.kernels.teachers import TeacherRows
from unteach.kernels.topk_filter import TopK


@dataclass(frozen=True)
class Union:
    """Slots of each row's union; a slot that is not live has weight 0 and logits 0."""

    ids_NU: Tensor
    live_NU: Tensor
    weight_NU: Tensor
    student_NU: Tensor  # z_s
    teacher_NU: Tensor  # z_t
    coverage_N: Tensor
    finite_N: Tensor  # false where a side's hidden states hold NaN or inf


def join_sets(
    teacher: TeacherRows,
    student: TopK | None,
    source: ExactSource,
    *,
    k: int,
    alpha: float,
    softcap: float | None,
) -> Union:
    """Union of the teacher's first K ids and the student's, with both logits at each."""
    n, m = teacher.ids_NM.shape
    ids, raw_s, z_t = teacher.ids_NM, teacher.logits_NM.new_zeros(n, m), teacher.logits_NM
    if student is not None:
        ids = torch.cat((ids, student.ids_NK), 1)
        raw_s = torch.cat((raw_s, student.raw_NK), 1)
        z_t = torch.cat((z_t, torch.zeros_like(student.raw_NK)), 1)
    # Stable: where both sides hold an id, the teacher's entry comes first and the student's next.
    ids, order = ids.sort(dim=1, stable=True)
    raw_s, z_t = raw_s.gather(1, order), z_t.gather(1, order)
    listed, valid = order < m, ids >= 0
    twin = torch.zeros_like(valid)
    twin[:, 1:] = valid[:, 1:] & (ids[:, 1:] == ids[:, :-1])
    paired = torch.zeros_like(valid)
    paired[:, :-1] = twin[:, 1:]
    raw_s[:, :-1] = torch.where(paired[:, :-1], raw_s[:, 1:], raw_s[:, :-1])

    in_teacher = listed & valid & (order < k)
    in_student = paired | (~listed & ~twin)
    live = (in_teacher | in_student) & ~twin
    coverage_N = torch.ones(n, dtype=torch.float32, device=ids.device)
    if teacher.source is None:
        live &= listed
        if student is not None:
            coverage_N = paired.sum(1).float() / student.ids_NK.shape[1]

    only_teacher = live & ~in_student
    asked_s = source.at(ids.masked_fill(~only_teacher, -1))
    raw_s = torch.where(only_teacher, asked_s, raw_s)
    if teacher.source is not None:
        only_student = live & ~listed
        asked_t = teacher.logits_at(ids.masked_fill(~only_student, -1))
        z_t = torch.where(only_student, asked_t.to(z_t.dtype), z_t)
    # the search may never have read what is wrong with a row
    finite_N = torch.ones(n, dtype=torch.bool, device=ids.device)
    for side in (source, teacher.source):
        finite = None if side is None else side.finite()
        if finite is not None:
            finite_N = finite_N & finite
    z_t = z_t.masked_fill(~finite_N[:, None], torch.nan)
    weight = in_teacher.to(z_t.dtype) + alpha * in_student.to(z_t.dtype)
    return Union(
        ids,
        live,
        weight.masked_fill(~live, 0),
        soft_cap(raw_s, softcap).masked_fill(~live, 0),
        z_t.masked_fill(~live, 0),
        coverage_N,
        finite_N,
    )


def row_losses(
    union: Union, *, beta: float, center: bool, gate: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Loss of each row (gated), and its slope by the student's logits before the soft cap.

    With d = z_s - z_t (each less its mean over the union if `center`):
        L = min(1, TV / gate) Σ w S_β(d),    dL/dz = min(1, TV / gate) (e - [center] mean_U e),
        e = w clamp(d / β, -1, 1)
    """
    z_s, z_t, live = union.student_NU, union.teacher_NU, union.live_NU
    count_N1 = live.sum(1, keepdim=True).clamp(min=1).to(z_s.dtype)
    if center:
        z_s = (z_s - _sum(z_s) / count_N1).masked_fill(~live, 0)
        z_t = (z_t - _sum(z_t) / count_N1).masked_fill(~live, 0)
    d = z_s - z_t
    size = d.abs()
    if beta > 0:
        smooth = torch.where(size < beta, d * d * (0.5 / beta), size - 0.5 * beta)
        slope = union.weight_NU * (d / beta).clamp(-1, 1)
    else:
        smooth, slope = size, union.weight_NU * d.sign()
    loss_N1 = _sum(union.weight_NU * smooth)
    if center:
        slope = (slope - _sum(slope) / count_N1).masked_fill(~live, 0)
    if gate is not None:
        factor_N1 = (_total_variation(union) / gate).clamp(max=1)
        loss_N1, slope = loss_N1 * factor_N1, slope * factor_N1
    if softcap is not None:
        slope = slope * soft_cap_slope(union.student_NU, softcap)
    loss_N = loss_N1.squeeze(1)
    # an empty union sums to 0, whatever its row holds
    return loss_N.masked_fill(~(loss_N.isfinite() & union.finite_N), torch.nan), slope


def _sum(x_NU: Tensor) -> Tensor:
    return tree_sum_(x_NU.clone())[:, None]


def _total_variation(union: Union) -> Tensor:
    """Half the L1 distance of both softmaxes over the union, [N, 1]."""
    student = _softmax(union.student_NU, union.live_NU)
    teacher = _softmax(union.teacher_NU, union.live_NU)
    return 0.5 * _sum((student - teacher).abs())


def _softmax(z_NU: Tensor, live_NU: Tensor) -> Tensor:
    # exp through float64, for the reason that soft_cap gives
    z = z_NU.to(torch.float64).masked_fill(~live_NU, -torch.inf)
    top = z.amax(1, keepdim=True) if z.shape[1] else z.new_zeros(z.shape[0], 1)
    z = (z - top.masked_fill(top == -torch.inf, 0)).exp().to(z_NU.dtype)
    return z / _sum(z).clamp(min=torch.finfo(z.dtype).tiny)
