"""Eq. 3 the obvious way: full logits, boolean sets, autograd. Nothing but an oracle.

Sets are [N, V] masks and every logit exists, so each line can be held against the equation. Ties go
to the smaller id by a stable sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unteach.kernels.checks import accumulation_dtype, valid_ids
from unteach.kernels.teachers import HiddenTeacher, LogitsTeacher, Teacher


def bitopk_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher,
    *,
    k: int,
    alpha: float,
    beta: float,
    weight_N: Tensor | None,
    normalizer: float | Tensor | None,
    center: bool,
    gate: float | None,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row losses, student ids and coverage; differentiable in the student."""
    dtype = accumulation_dtype(hidden_ND)
    raw = _raw_logits(hidden_ND, head_VD, bias_V, scale, dtype)
    z_s, in_t, z_t, covered = (
        _cap(raw, softcap),
        *_teacher_side(teacher, raw, k=k, scale=scale, softcap=softcap, vocab=vocab),
    )
    n, found = raw.shape[0], min(2 * k, raw.shape[1])
    weight_N = torch.ones_like(raw[:, 0]) if weight_N is None else weight_N.to(dtype)
    ignored = weight_N == 0
    student_ids = torch.full((n, found if alpha else 0), -1, device=raw.device)
    in_s = torch.zeros_like(in_t)
    coverage = torch.ones(n, dtype=torch.float32, device=raw.device)
    if alpha:
        top = _top_ids(raw.detach(), min(found, vocab), vocab)
        student_ids[:, : top.shape[1]] = top
        in_s.scatter_(1, top[:, :k], True)
        coverage = torch.where(ignored, 1, (in_s & covered).sum(1).float() / k)
        in_s = in_s & covered
    row_N = _row_losses(z_s, z_t, in_t, in_s, alpha=alpha, beta=beta, center=center, gate=gate)
    broken = ~hidden_ND.isfinite().all(1)
    if isinstance(teacher, HiddenTeacher):
        broken = broken | ~teacher.hidden_NE.isfinite().all(1)
    row_N = torch.where(ignored, 0, row_N.masked_fill(broken, torch.nan))
    loss = (weight_N * row_N).sum() / (max(n, 1) if normalizer is None else normalizer)
    ids = student_ids.masked_fill(ignored[:, None], -1).to(torch.int32)
    return loss if n else raw.sum(), row_N.detach(), ids, coverage


def _row_losses(
    z_s: Tensor,
    z_t: Tensor,
    in_t: Tensor,
    in_s: Tensor,
    *,
    alpha: float,
    beta: float,
    center: bool,
    gate: float | None,
) -> Tensor:
    union = in_t | in_s
    factor: Tensor | float = 1.0
    if gate is not None:
        p_s, p_t = (
            torch.where(union, z.detach(), -torch.inf).softmax(1).nan_to_num(nan=0.0)
            for z in (z_s, z_t)
        )
        factor = ((p_s - p_t).abs().sum(1) / 2 / gate).clamp(max=1)
    if center:
        count = union.sum(1, keepdim=True).clamp(min=1)
        z_s, z_t = (z - torch.where(union, z, 0).sum(1, keepdim=True) / count for z in (z_s, z_t))
    d = torch.where(union, z_s - z_t, 0)
    size = d.abs()
    smooth = torch.where(size < beta, d * d / (2 * beta), size - beta / 2) if beta > 0 else size
    return factor * (smooth * in_t + alpha * smooth * in_s).sum(1)


def _teacher_side(
    teacher: Teacher,
    raw: Tensor,
    *,
    k: int,
    scale: float,
    softcap: float | None,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's set, its final logits and where it has any: three [N, V] tensors."""
    v = raw.shape[1]
    covered = torch.ones_like(raw, dtype=torch.bool)
    in_t = torch.zeros_like(covered)
    if isinstance(teacher, LogitsTeacher):
        z_t = _fit(teacher.logits_NV.detach().to(raw.dtype), v)
        return in_t.scatter_(1, _top_ids(z_t, k, vocab), True), z_t, covered
    z_t = torch.zeros_like(raw)
    if isinstance(teacher, HiddenTeacher):
        raw_t = _raw_logits(
            teacher.hidden_NE, teacher.head_VE, teacher.bias_V, scale, raw.dtype
        ).detach()
        z_t = _fit(_cap(raw_t, softcap), v)
        if teacher.ids_NM is None:
            return in_t.scatter_(1, _top_ids(_fit(raw_t, v), k, vocab), True), z_t, covered
    else:
        covered = torch.zeros_like(covered)
    assert teacher.ids_NM is not None
    ids_NM = valid_ids(teacher.ids_NM, vocab)
    for slot in reversed(range(ids_NM.shape[1])):  # of two equal ids the first one speaks
        rows = (ids_NM[:, slot] >= 0).nonzero().squeeze(1)
        ids = ids_NM[rows, slot]
        if teacher.logits_NM is not None:
            z_t[rows, ids] = teacher.logits_NM.detach()[rows, slot].to(raw.dtype)
            covered[rows, ids] = True
        in_t[rows, ids] |= slot < k
    return in_t, z_t, covered


def _raw_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    raw = scale * (hidden.to(dtype) @ head.to(dtype).t())
    return raw if bias is None else raw + bias.to(dtype)


def _cap(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def _fit(logits: Tensor, width: int) -> Tensor:
    """Cut or pad the teacher's vocabulary to the student's; padded ids are never selected."""
    missing = max(0, width - logits.shape[1])
    return torch.nn.functional.pad(logits[:, :width], (0, missing))


def _top_ids(raw: Tensor, k: int, vocab: int) -> Tensor:
    return raw[:, :vocab].sort(dim=1, descending=True, stable=True).indices[:, :k]
