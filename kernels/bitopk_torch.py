"""Eq. 3 by torch operations: blocks of rows through search, union, loss and sparse gradient.

Each block holds one tile and one pool; what stays per row is its loss, its ids, dL/dhidden in the
accumulation dtype, and the pairs from which the backward makes dL/dhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unteach.kernels.checks import valid_ids
from unteach.kernels.logit_source import LinearSource
from unteach.kernels.sparse_grad import Pairs, hidden_grad
from unteach.kernels.teachers import Teacher, TeacherReader, TeacherRows
from unteach.kernels.topk_filter import exact_topk, row_blocks, tile_width
from unteach.kernels.union_loss import join_sets, row_losses


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a row depends on, beside its logits."""

    k: int
    alpha: float
    beta: float
    center: bool
    gate: float | None
    softcap: float | None
    scale: float


class BitopkOutput(NamedTuple):
    """Only `loss` carries gradient.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs).
        row_loss_N: loss of each row, gated, before weight and normalizer; 0 for ignored rows.
        student_ids_NS: int32 [N, min(2K, V)]: the exact top K, then the best that were met, -1
            where none is known (all of an ignored row). [N, 0] if alpha is 0. Next step's seeds.
        coverage_N: share of the student's set that the teacher could answer for; 1 if none was
            asked.
        fallback_rows: 0-d, how many rows the fast search gave up on; large means bad seeds or ties.
    """

    loss: Tensor
    row_loss_N: Tensor
    student_ids_NS: Tensor
    coverage_N: Tensor
    fallback_rows: Tensor


@dataclass(frozen=True)
class Forward:
    """The output, and what the backward needs."""

    output: BitopkOutput
    pairs: Pairs
    grad_ND: Tensor | None


@dataclass(frozen=True)
class _Block:
    row_loss_N: Tensor
    student_ids_NS: Tensor
    coverage_N: Tensor
    fallback: int
    pairs: Pairs  # slopes of the row losses


def forward_torch(
    source: LinearSource,
    teacher: Teacher,
    options: LossOptions,
    *,
    vocab: int,
    weight_N: Tensor | None,
    normalizer: float | Tensor,
    seeds_NS: Tensor | None,
    wants_hidden_grad: bool,
) -> Forward:
    """Every row that is not ignored, block after block."""
    n, dtype, device, head_VD = source.rows, source.dtype, source.device, source.head_VD
    k, scale, softcap = options.k, options.scale, options.softcap
    reader = TeacherReader(teacher, k=k, vocab=vocab, scale=scale, softcap=softcap, dtype=dtype)
    found = min(2 * k, head_VD.shape[0]) if options.alpha else 0
    factor_N = torch.ones(n, dtype=dtype, device=device)
    factor_N = factor_N if weight_N is None else weight_N.to(dtype)
    active_N = factor_N.nonzero().squeeze(1)
    factor_N = factor_N / normalizer
    seeds_NS = None if seeds_NS is None else valid_ids(seeds_NS, vocab)
    row_loss_N = torch.zeros(n, dtype=dtype, device=device)
    student_ids_NS = torch.full((n, found), -1, dtype=torch.int32, device=device)
    coverage_N = torch.ones(n, dtype=torch.float32, device=device)
    grad_ND = row_loss_N.new_zeros(n, head_VD.shape[1]) if wants_hidden_grad else None
    parts: list[Pairs] = []
    fallback = 0
    tile = tile_width(k, vocab)
    for block in row_blocks(active_N.shape[0], tile, k):
        rows = block if active_N.shape[0] == n else active_N[block]
        here, seeds = source.take(rows), None if seeds_NS is None else seeds_NS[rows]
        result = _forward_block(here, reader.read(rows), options, vocab, seeds)
        row_loss_N[rows], coverage_N[rows] = result.row_loss_N, result.coverage_N
        student_ids_NS[rows] = result.student_ids_NS.to(torch.int32)
        fallback += result.fallback
        pairs, rows_P = result.pairs, active_N[block][result.pairs.rows_P]
        pairs = Pairs(pairs.rows_P, pairs.ids_P, pairs.slopes_P * factor_N[rows_P])
        if grad_ND is not None:
            grad_ND[rows] = hidden_grad(pairs, head_VD, here.rows, scale)
        parts.append(Pairs(rows_P.to(torch.int32), pairs.ids_P.to(torch.int32), pairs.slopes_P))
    loss = (row_loss_N.double() * factor_N.double())[active_N].sum().to(dtype)
    count = torch.tensor(fallback, device=device)
    output = BitopkOutput(loss, row_loss_N, student_ids_NS, coverage_N, count)
    return Forward(output, _joined(parts, row_loss_N), grad_ND)


def _forward_block(
    source: LinearSource,
    told: TeacherRows,
    options: LossOptions,
    vocab: int,
    seeds_NS: Tensor | None,
) -> _Block:
    k, spare = options.k, min(2 * options.k, source.head_VD.shape[0]) - options.k
    student, fallback = None, told.fallback
    student_ids_NS = told.ids_NM.new_empty(source.rows, 0)
    if options.alpha:
        tile = tile_width(k, vocab)
        student = exact_topk(source, k, vocab, tile=tile, seeds_NS=seeds_NS, spare=spare)
        student_ids_NS = torch.cat((student.ids_NK, student.spare_NR), 1)
        fallback += student.fallback
    union = join_sets(told, student, source, k=k, alpha=options.alpha, softcap=options.softcap)
    row_loss_N, slope_NU = row_losses(
        union,
        beta=options.beta,
        center=options.center,
        gate=options.gate,
        softcap=options.softcap,
    )
    rows_P, slots_P = union.live_NU.nonzero(as_tuple=True)
    pairs = Pairs(rows_P, union.ids_NU[rows_P, slots_P], slope_NU[rows_P, slots_P])
    return _Block(row_loss_N, student_ids_NS, union.coverage_N, fallback, pairs)


def _joined(parts: list[Pairs], row_loss_N: Tensor) -> Pairs:
    none = row_loss_N[:0]
    parts = parts or [Pairs(none.to(torch.int32), none.to(torch.int32), none)]
    return Pairs(
        torch.cat([part.rows_P for part in parts]),
        torch.cat([part.ids_P for part in parts]),
        torch.cat([part.slopes_P for part in parts]),
    )
