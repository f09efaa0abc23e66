"""Losses and their gradients in float64 on a few rows: what every provider is held to.

Made from the equations with no code of the kernels: full logits of these rows, sets by sorting,
slopes by hand. The head is widened a slice at a time, so that the largest head fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unteach.benchmarks.comparison import Errors
from unteach.benchmarks.presets import Case

SLICE_IDS = 8192


def errors_of(found: tuple[Tensor, ...], case: Case) -> Errors:
    """How far a provider of Eq. 3 is from it: its mean over the rows, and both gradients."""
    return differences(found, case, *_exact(case))


def differences(
    found: tuple[Tensor, ...], case: Case, true_loss: float, slopes_NV: Tensor
) -> Errors:
    """How far (loss, dL/dhidden, dL/dhead) are from float64 on the same rounded inputs.

    Args:
        slopes_NV: dL/dz of the logits before the soft cap, float64.
    """
    loss, grad_hidden, grad_head = found
    hidden, head = case.hidden_ND.detach().double(), case.head_VD.detach()
    true_hidden = torch.zeros_like(hidden)
    off = largest = 0.0
    for ids in _slices(head):
        slopes = slopes_NV[:, ids]
        true_hidden += slopes @ head[ids].double()
        true = slopes.t() @ hidden
        off = max(off, float((grad_head[ids].double() - true).abs().max()))
        largest = max(largest, float(true.abs().max()))
    off_hidden = float((grad_hidden.double() - true_hidden).abs().max())
    grad = max(off / largest, off_hidden / float(true_hidden.abs().max()))
    return Errors(abs(float(loss) - true_loss) / abs(true_loss), grad)


def topk_errors_of(found: tuple[Tensor, ...], case: Case) -> Errors:
    """How far K sorted raw logits of each row are from float64; ties make ids incomparable."""
    raw = raw_logits(case.hidden_ND, case.head_VD)
    true = raw.sort(dim=1, descending=True).values[:, : case.k]
    return Errors(float((found[0].double() - true).abs().max() / true.abs().max()))


def _exact(case: Case) -> tuple[float, Tensor]:
    """The loss, and its slope by every logit before the soft cap."""
    raw_s = raw_logits(case.hidden_ND, case.head_VD)
    raw_t = raw_logits(case.teacher.hidden_NE, case.teacher.head_VE)
    weight = torch.zeros_like(raw_s)
    for raw in (raw_t, raw_s):
        chosen = raw.sort(dim=1, descending=True, stable=True).indices[:, : case.k]
        weight.scatter_add_(1, chosen, torch.ones_like(raw[:, : case.k]))
    (z_s, cap_slope), (z_t, _) = (soft_capped(raw, case.softcap) for raw in (raw_s, raw_t))
    d, n = z_s - z_t, len(raw_s)
    smooth = torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5)
    return float((weight * smooth).sum() / n), weight * d.clamp(-1, 1) * cap_slope / n


def soft_capped(raw: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Final logits, and their slope by the raw ones."""
    if softcap is None:
        return raw, torch.ones_like(raw)
    z = softcap * torch.tanh(raw / softcap)
    return z, 1 - (z / softcap) ** 2


def raw_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden · headᵀ in float64, [N, V]."""
    wide, weight = hidden.detach().double(), head.detach()
    return torch.cat([wide @ weight[ids].double().t() for ids in _slices(weight)], 1)


def _slices(head: Tensor) -> Iterator[slice]:
    for start in range(0, len(head), SLICE_IDS):
        yield slice(start, min(start + SLICE_IDS, len(head)))
