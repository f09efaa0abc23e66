"""Gradients of logits that only few (row, id) pairs carry: no atomics, no dense product.

    raw_p = scale · hidden[row_p] · head[id_p] + bias[id_p],      c_p = dL / d raw_p
    dhidden[n] = scale Σ_{p: row_p = n} c_p head[id_p]     pairs in the order given
    dhead[v]   = scale Σ_{p: id_p = v} c_p hidden[row_p]   segments of equal id, rows ascending
    dbias[v]   = Σ_{p: id_p = v} c_p

Work is 2PD FLOPs a side against 2NVD of a dense backward (P <= 2KN pairs), traffic P rows of D
numbers a side plus one pass over the dense [V, D] gradient that autograd is handed. Sums are
float32 (float64 for float64 inputs), each taken one pair after another, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unteach.kernels.fixed_dot import gather_rows, slice_pairs


@dataclass(frozen=True)
class Pairs:
    """The (row, id) pairs that carry gradient, rows ascending.

    On the triton backend an id may be -1: an empty slot, of slope 0.
    """

    rows_P: Tensor
    ids_P: Tensor
    slopes_P: Tensor  # dL / d raw, accumulation dtype


def hidden_grad(
    pairs: Pairs, head_VD: Tensor, rows: int, scale: float, backend: str = "torch"
) -> Tensor:
    """[rows, D] in the accumulation dtype, so that a loss scale can still be applied.

    On the triton backend each row has equally many pairs, empty slots among them.
    """
    if backend == "triton":
        from unteach.kernels.sparse_grad_triton import hidden_grad_triton

        return hidden_grad_triton(pairs, head_VD, rows, scale)
    grad_ND = pairs.slopes_P.new_zeros(rows, head_VD.shape[1])
    _add_weighted_rows(grad_ND, pairs.rows_P, head_VD, pairs.ids_P, pairs.slopes_P * scale)
    return grad_ND


def head_grad(
    pairs: Pairs, hidden_ND: Tensor, vocab: int, scale: float, backend: str = "torch"
) -> Tensor:
    """Dense [vocab, D] in the dtype of the hidden states, zero where no pair fell."""
    if backend == "triton":
        from unteach.kernels.sparse_grad_triton import head_grad_triton

        return head_grad_triton(pairs, hidden_ND, vocab, scale)
    width, dtype = hidden_ND.shape[1], pairs.slopes_P.dtype
    grad_VD = torch.zeros(vocab, width, dtype=hidden_ND.dtype, device=hidden_ND.device)
    ids_P, order = pairs.ids_P.to(torch.int64).sort(stable=True)
    rows_P, slopes_P = pairs.rows_P[order], pairs.slopes_P[order] * scale
    touched, segment_P, counts = torch.unique_consecutive(
        ids_P, return_inverse=True, return_counts=True
    )
    step = slice_pairs(width, hidden_ND.device)
    bounds = [0, *counts.cumsum(0)[step - 1 :: step].tolist(), ids_P.shape[0]]
    for first, (start, stop) in zip(
        range(0, touched.shape[0], step), pairwise(bounds), strict=False
    ):
        ids = touched[first : first + step]
        sums = torch.zeros(ids.shape[0], width, dtype=dtype, device=hidden_ND.device)
        here = slice(start, stop)
        _add_weighted_rows(sums, segment_P[here] - first, hidden_ND, rows_P[here], slopes_P[here])
        grad_VD[ids] = sums.to(grad_VD.dtype)
    return grad_VD


def bias_grad(pairs: Pairs, bias_V: Tensor) -> Tensor:
    """Dense gradient of the bias, zero where no pair fell."""
    grad_V = torch.zeros(bias_V.shape[0], dtype=pairs.slopes_P.dtype, device=bias_V.device)
    ids_P, order = pairs.ids_P.to(torch.int64).clamp(min=0).sort(stable=True)
    _add_in_order(grad_V, ids_P, pairs.slopes_P[order])
    return grad_V.to(bias_V.dtype)


def _add_weighted_rows(
    sums_XD: Tensor, into_P: Tensor, matrix_YD: Tensor, index_P: Tensor, weight_P: Tensor
) -> None:
    """sums[into_p] += weight_p · matrix[index_p], one pair after another."""
    pairs, width = into_P.shape[0], sums_XD.shape[1]
    step = slice_pairs(width, sums_XD.device)
    x = torch.empty(min(step, pairs), width, dtype=sums_XD.dtype, device=sums_XD.device)
    for start in range(0, pairs, step):
        here = slice(start, min(start + step, pairs))
        terms = gather_rows(matrix_YD, index_P[here], x[: here.stop - start])
        terms.mul_(weight_P[here, None])
        _add_in_order(sums_XD, into_P[here], terms)


def _add_in_order(sums: Tensor, index_P: Tensor, terms: Tensor) -> None:
    if sums.is_cuda:  # index_add_ is atomic there; this one sorts stably and adds by segment
        sums.index_put_((index_P.to(torch.int64),), terms, accumulate=True)
    else:
        sums.index_add_(0, index_P, terms)
