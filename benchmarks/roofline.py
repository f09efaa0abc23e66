"""The least time a path can take: every FLOP and every byte it must do, at the device's peaks.

    floor = Σ over stages of max(FLOPs / peak FLOP/s, bytes / peak bytes/s)

Stages follow each other, so their times add up; within one, products hide traffic. A gathered row
counts once per (token, id) as memory traffic, D numbers each: the floor gives no credit for rows
that a cache may still hold, and charges nothing that a perfect program could leave out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# name in the card's full name → (dtypes, FLOP/s, bytes/s), measured on such a card by a large
# matrix product and a large copy
_BF16 = (torch.bfloat16, torch.float16)
PEAKS = {"H200": (_BF16, 790e12, 4.3e12)}


@dataclass(frozen=True)
class Peaks:
    """What the device does at best; None where nobody measured it."""

    flops_per_s: float | None
    bytes_per_s: float | None


@dataclass(frozen=True)
class Sizes:
    """What a case asks of a path; numbers per row are means.

    Attributes:
        item: bytes of a number.
        seeds: ids a row that the search is given.
        union: ids a row in either top-K set.
        unlisted: student ids a row whose logit the teacher's cached list does not hold.
        overlap: share of the student's top K that is in the teacher's.
    """

    rows: int
    vocab: int
    width: int
    item: int
    k: int
    seeds: int
    union: float
    unlisted: float
    overlap: float


@dataclass(frozen=True)
class Stage:
    flops: float
    bytes: float


def floor_ms(stages: list[Stage], peaks: Peaks) -> float | None:
    """Milliseconds at the device's peaks; None where these are unknown."""
    if peaks.flops_per_s is None or peaks.bytes_per_s is None:
        return None
    times = (max(s.flops / peaks.flops_per_s, s.bytes / peaks.bytes_per_s) for s in stages)
    return 1e3 * sum(times)


def sparse_path(s: Sizes, *, seeds: bool) -> list[Stage]:
    """One dense product to find the student's set; everything else is gathered.

    With b bytes a number and U ids in a row's union:
        seeds           2NSD FLOPs, NS + N rows of Db bytes: the logits that set the threshold
        dense           2NVD FLOPs, V + N rows; a workspace of tiles is meant to stay in the cache
        teacher         its logit at the student's ids that its list does not hold, and h_t
        hidden gradient U head rows a token, which serve the student's exact logits as well
        head gradient   U hidden rows a token, the dense gradient once, (row, id, slope) twice
    """
    row = s.width * s.item
    stages = [Stage(2 * s.rows * s.seeds * s.width, (s.rows * s.seeds + s.rows) * row)]
    dense = (s.vocab + s.rows) * row
    pairs = s.rows * s.union
    return [
        *(stages if seeds else []),
        Stage(2 * s.rows * s.vocab * s.width, dense),
        Stage(2 * s.rows * s.unlisted * s.width, (s.rows * s.unlisted + s.rows) * row),
        Stage(4 * pairs * s.width, (pairs + s.rows) * row),
        Stage(2 * pairs * s.width, (pairs + s.vocab) * row + 2 * 12 * pairs),
    ]


def topk_path(s: Sizes, *, seeds: bool) -> list[Stage]:
    """`linear_topk` alone: the threshold, the dense product, K exact logits a row."""
    row = s.width * s.item
    stages = sparse_path(s, seeds=seeds)[: 2 if seeds else 1]
    # seeds that are good have their exact logits already
    return stages if seeds else [*stages, Stage(2 * s.rows * s.k * s.width, s.rows * s.k * row)]


def gather_path(s: Sizes) -> list[Stage]:
    """`gather_linear` at the seeds, forward and backward: U rows a token each way, nothing of V but
    the dense gradient that autograd is handed.
    """
    row, pairs = s.width * s.item, s.rows * s.seeds
    each_way = Stage(2 * pairs * s.width, (pairs + s.rows) * row)
    head = Stage(2 * pairs * s.width, (pairs + s.vocab) * row + 2 * 12 * pairs)
    return [each_way, each_way, head]


def product(s: Sizes, count: int = 1) -> list[Stage]:
    """Matrix products of hidden states and head, logits written."""
    traffic = (s.vocab + s.rows) * s.width * s.item + s.rows * s.vocab * s.item
    return [Stage(2 * s.rows * s.vocab * s.width, traffic)] * count


def dense_path(s: Sizes, *, products: int, passes: int, gathered: float = 0) -> list[Stage]:
    """Logits in memory, torch.topk over them, and both gradients as dense products.

    Args:
        products: 2 where the teacher's logits are made as well; each is read by a top-K.
        passes: how often the dense [N, V] slopes are written or read beside the products.
        gathered: teacher rows a token, where its logits are not made.
    """
    logits = s.rows * s.vocab * s.item
    return [
        *product(s, products),
        *[Stage(0, logits)] * products,
        Stage(2 * s.rows * gathered * s.width, s.rows * gathered * s.width * s.item),
        Stage(0, passes * logits),
        *product(s, 2),
    ]


def cross_entropy_path(s: Sizes, *, products: int) -> list[Stage]:
    """Losses over the whole vocabulary in one pass of products, no logits in memory."""
    traffic = (s.vocab + s.rows) * s.width * s.item
    return [Stage(2 * s.rows * s.vocab * s.width, traffic)] * products


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks:
    """From the table for a GPU; measured here and now for a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (dtypes, flops, traffic) in PEAKS.items():
            if part in name:
                return Peaks(flops if dtype in dtypes else None, traffic)
        return Peaks(None, None)
    # low precision may be computed in float32 where that is faster
    flops = max(_product_rate(each) for each in {dtype, torch.float32})
    return Peaks(flops, _copy_rate())


def _product_rate(dtype: torch.dtype, size: int = 1024) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _best_s(lambda: torch.mm(a, b, out=out))


def _copy_rate(count: int = 1 << 24) -> float:
    """Bytes read and written a second, over buffers that no cache holds."""
    source, target = torch.zeros(count), torch.zeros(count)
    return 2 * 4 * count / _best_s(lambda: target.copy_(source))


def _best_s(work: Callable[[], object], times: int = 7) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
