"""Exact top-K logits of hidden · headᵀ, without an [N, V] tensor.

    raw = scale · (hidden · head) + bias,   top-K by (raw, smaller id),   logits = softcap(raw)

Floor on a CPU: 2NVD FLOPs, the head read once per 512 rows; 5 MiB of workspace, about 40 where all
logits tie (topk_filter.py). Values are float32 dots of fixed order (float64 for float64 inputs),
the same bits in any batch and from any seeds on one backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unteach.kernels.checks import (
    accumulation_dtype,
    check_ids,
    check_k,
    check_linear,
    check_logit_rule,
    check_vocab,
    choose_backend,
    valid_ids,
)
from unteach.kernels.logit_source import LinearSource, soft_cap
from unteach.kernels.topk_filter import exact_topk, row_blocks, tile_width
from unteach.kernels.triton_launch import MAX_K


def linear_topk_reference(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    *,
    vocab: int | None = None,
    seeds_NS: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_topk` from full logits; seeds and backend change nothing."""
    dtype = accumulation_dtype(hidden_ND)
    raw = scale * (hidden_ND.detach().to(dtype) @ head_VD.detach().to(dtype).t())
    raw = raw if bias_V is None else raw + bias_V.detach().to(dtype)
    limit = check_vocab(vocab, raw.shape[1])
    values, ids = raw[:, :limit].sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :k], ids[:, :k]
    return (values if softcap is None else softcap * torch.tanh(values / softcap)), ids


def linear_topk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    *,
    vocab: int | None = None,
    seeds_NS: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The K largest logits of each row and their ids, sorted; ties go to the smaller id.

    A row with NaN or inf in it gets NaN logits at ids 0 to K - 1.

    Args:
        vocab: ids at or beyond it are never selected (padding rows of the head).
        seeds_NS: ids that may be in the top K, of any integer type; only the speed depends on them.
        softcap, scale: the model's own.
    Returns:
        logits_NK, float32 (float64 for float64 inputs), without gradient; ids_NK, int64.
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    check_linear(hidden_ND, head_VD, bias_V)
    scale, softcap = check_logit_rule(scale, softcap)
    limit = check_vocab(vocab, head_VD.shape[0])
    k = check_k(k, limit)
    n, device = hidden_ND.shape[0], hidden_ND.device
    if seeds_NS is not None:
        check_ids("seeds_NS", seeds_NS, n, device)
    too_wide = None if k <= MAX_K else f"k is {k}, its running list holds {MAX_K}"
    if choose_backend(backend, hidden_ND, without_triton=too_wide) == "triton":
        return _linear_topk_triton(hidden_ND, head_VD, k, limit, seeds_NS, bias_V, softcap, scale)
    dtype = accumulation_dtype(hidden_ND)
    raw_NK = torch.empty(n, k, dtype=dtype, device=device)
    ids_NK = torch.empty(n, k, dtype=torch.int64, device=device)
    with torch.no_grad():
        source = LinearSource(hidden_ND, head_VD, bias_V, scale, dtype)
        tile = tile_width(k, limit)
        for rows in row_blocks(n, tile, k):
            seeds = None if seeds_NS is None else valid_ids(seeds_NS[rows], limit)
            top = exact_topk(source.take(rows), k, limit, tile=tile, seeds_NS=seeds)
            raw_NK[rows], ids_NK[rows] = top.raw_NK, top.ids_NK
    return soft_cap(raw_NK, softcap), ids_NK


def _linear_topk_triton(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    vocab: int,
    seeds_NS: Tensor | None,
    bias_V: Tensor | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from unteach.kernels.topk_triton import search
    from unteach.kernels.triton_source import TritonLinear

    with torch.no_grad():
        source = TritonLinear.of(hidden_ND, head_VD, bias_V, scale)
        top = search(source, k, vocab, seeds_NS=seeds_NS).top
        return soft_cap(top.raw_NK, softcap), top.ids_NK
