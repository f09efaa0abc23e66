"""Order of (value, id) pairs, and the exhaustive top-K for rows that no filter can thin out.

Larger values first, NaN before all, ties to the smaller id: a total order, so a top-K is unique.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unteach.kernels.logit_source import LogitSource

# Rows that one exhaustive step takes: their scores, ids and sort keys make 64 · (T + K) · 28 bytes.
_ROWS = 64


def rank(values_NW: Tensor, ids_NW: Tensor, k: int) -> Tensor:
    """Indices of the first K entries of each row in the total order."""
    by_id = ids_NW.argsort(dim=1, stable=True)
    by_value = values_NW.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    return by_id.gather(1, by_value[:, :k])


def kth_largest(x_NW: Tensor, k: int) -> Tensor:
    """K-th largest of each row, NaN counted as the largest and written as +inf."""
    largest = x_NW.topk(k, dim=1, sorted=False).values
    kth: Tensor = largest.masked_fill(largest.isnan(), torch.inf).amin(1)
    return kth


def first_occurrences(ids_NM: Tensor) -> Tensor:
    """Ids in place, with -1 for each one that stood before in its row."""
    ordered, index = ids_NM.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids_NM, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ids_NM.masked_fill(repeated.scatter(1, index, repeated), -1)


def exhaustive_topk(source: LogitSource, k: int, vocab: int, tile: int) -> tuple[Tensor, Tensor]:
    """Top-K by the exact value of every id that is not plainly beaten, tile after tile.

    Ids ascend, so a newcomer must be strictly better than the K-th: equal logits cost no more than
    the first tile, and equal ones that rounding blurs cost one exact dot each.
    """
    parts = [
        _exhaustive_rows(source.take(slice(start, start + _ROWS)), k, vocab, tile)
        for start in range(0, source.rows, _ROWS)
    ]
    raw, ids = zip(*parts, strict=True)
    return torch.cat(raw), torch.cat(ids)


def _exhaustive_rows(source: LogitSource, k: int, vocab: int, tile: int) -> tuple[Tensor, Tensor]:
    n = source.rows
    raw_NK = torch.empty(n, 0, dtype=source.dtype, device=source.device)
    ids_NK = torch.empty(n, 0, dtype=torch.int64, device=source.device)
    for start in range(0, vocab, tile):
        stop = min(start + tile, vocab)
        x = source.tile(start, stop)
        near = torch.ones_like(x, dtype=torch.bool)
        if raw_NK.shape[1] == k:
            kth = raw_NK[:, -1]
            near = ~(x + source.slack(start, stop)[:, None] <= kth[:, None])
            near &= ~kth.isnan()[:, None]  # nothing comes before a NaN of smaller id
        rows, columns = near.nonzero(as_tuple=True)
        exact = torch.full_like(x, -torch.inf)
        exact[rows, columns] = source.values(rows, columns + start)
        ids = torch.arange(start, stop, device=source.device).expand(n, -1)
        raw, ids = torch.cat((raw_NK, exact), 1), torch.cat((ids_NK, ids), 1)
        order = rank(raw, ids, k)
        raw_NK, ids_NK = raw.gather(1, order), ids.gather(1, order)
    return raw_NK, ids_NK
