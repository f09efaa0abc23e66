"""Exact top-K of a logit source in one walk over vocabulary tiles, without an [N, V] tensor.

A floor per row is kept that provably does not exceed the K-th largest exact value: from seeds (the
K-th largest among any K distinct ids), else from what the walk has met, less `slack`. An id joins
the row's pool when tile + slack >= floor, so the true top-K is always in the pool; at the end the
few ids that the final floor cannot rule out get their exact value, and that alone decides.

Memory: the rows of a call are taken in blocks of n = 2^19 / max(T, C), T ids a tile and C slots a
pool, so that the tile (4nT bytes), its peaks (nT/2) and the pool (8nC) stay near 5 MiB for any N
and V. A tile full of ties (rows of zeros) is listed whole: about 40 MiB. Time: 2NVD FLOPs for the
product and one read of each tile from cache, for the peaks of groups of 8 ids: hits are rare, so a
group is opened only when its peak reaches the floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.candidate_pool import CandidatePool, pool_capacity, value_seeds
from unteach.kernels.logit_source import LogitSource
from unteach.kernels.topk_rank import exhaustive_topk, kth_largest

# One 2 MiB tile of 512 rows and 1024 ids: measured fastest on a Zen 3 core (wider tiles leave its
# caches, narrower ones cost the product its efficiency).
TILE_ELEMENTS = 1 << 19
TILE_IDS = 1024


@dataclass(frozen=True)
class TopK:
    """Top-K of each row by (value, smaller id), and the runners-up that the walk came across."""

    raw_NK: Tensor
    ids_NK: Tensor
    spare_NR: Tensor  # -1 where nothing was known
    fallback: int  # rows that needed the exhaustive search


def tile_width(k: int, vocab: int) -> int:
    """Ids per tile: at least K, so that the first tile alone gives every row a floor."""
    return min(max(TILE_IDS, k), vocab)


def row_blocks(rows: int, tile: int, k: int) -> Iterator[slice]:
    """Cut rows so that one tile, or one pool, never holds more than TILE_ELEMENTS."""
    step = max(1, TILE_ELEMENTS // max(tile, pool_capacity(k)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def exact_topk(
    source: LogitSource,
    k: int,
    vocab: int,
    *,
    tile: int,
    seeds_NS: Tensor | None = None,
    spare: int = 0,
) -> TopK:
    """Find the K largest logits of each row among ids below `vocab`.

    Args:
        source: rows of logits, few enough for one block (`row_blocks`).
        seeds_NS: int64 ids that may be good, -1 for none; they change the speed, not the result.
        spare: how many runners-up to return.
    """
    finite = source.finite()
    if finite is None or bool(finite.all()):
        return _search(source, k, vocab, tile, seeds_NS, spare)
    # A row with NaN or inf has no logits worth an order: K NaNs, at the smallest ids as in a tie.
    good = finite.nonzero().squeeze(1)
    seeds = None if seeds_NS is None else seeds_NS[good]
    part = _search(source.take(good), k, vocab, tile, seeds, spare)
    raw_NK = torch.full((source.rows, k), torch.nan, dtype=source.dtype, device=source.device)
    ids_NK = torch.arange(k, device=source.device).repeat(source.rows, 1)
    spare_NR = ids_NK.new_full((source.rows, spare), -1)
    raw_NK[good], ids_NK[good], spare_NR[good] = part.raw_NK, part.ids_NK, part.spare_NR
    return TopK(raw_NK, ids_NK, spare_NR, part.fallback)


def _search(
    source: LogitSource, k: int, vocab: int, tile: int, seeds_NS: Tensor | None, spare: int
) -> TopK:
    seeds = None
    floor_N = torch.full((source.rows,), -torch.inf, dtype=source.dtype, device=source.device)
    if seeds_NS is not None and seeds_NS.numel():
        seeds = value_seeds(source, seeds_NS)
        if seeds_NS.shape[1] >= k:
            floor_N = kth_largest(seeds.values_NS, k)
    pool = CandidatePool(source, k, vocab, floor_N)
    if source.rows:
        pool.fill(source, vocab, tile, spare)
    raw_NK, ids_NK = pool.top(source, seeds)
    spare_NR = pool.runners_up(spare, seeds)
    lost = pool.lost_N.nonzero().squeeze(1)
    if lost.numel():
        raw_NK[lost], ids_NK[lost] = exhaustive_topk(source.take(lost), k, vocab, tile)
        spare_NR[lost] = -1
    return TopK(raw_NK, ids_NK, spare_NR, lost.numel())
