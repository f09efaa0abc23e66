"""Exact top-K on a GPU without a host sync: a fast search, and ever slower ones for its failures.

1. With seeds: the K-th largest exact value τ among any K distinct ids bounds the true K-th from
   below, so {tile >= τ - slack} holds the top K. One pass appends these ids; no running top-K. It
   makes its tiles itself, or filters those of a library's products (`DENSE_PASS`).
2. Rows without enough seeds, or with more hits than slots: a running list of the best values.
3. Both give each row its M >= 2K largest tile values. Ids within 2·slack of the K-th get their
   exact dot, and that alone decides. If even the M-th is that close, rounding may hide a member of
   the top K among the rest, and every id of the row gets its exact dot.

Each stage is launched with a list of its rows and their number on the device. Its result for a row
is the same bits whichever stage gave it: (exact value, smaller id) is a total order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.checks import valid_ids
from unteach.kernels.tile_topk import (
    append_kernel,
    exhaustive_kernel,
    extract_kernel,
    filter_kernel,
    merge_kernel,
)
from unteach.kernels.topk_filter import TopK
from unteach.kernels.topk_rank import first_occurrences, kth_largest
from unteach.kernels.triton_launch import (
    EXHAUSTIVE_BLOCK,
    EXHAUSTIVE_KEPT,
    EXHAUSTIVE_WARPS,
    FILTER_WARPS,
    PRODUCT_IDS,
    PRODUCT_ROWS,
    WIDTH_STEP,
    Tile,
    append_tile,
    architecture,
    dense_pass,
    extract_tile,
    interpreting,
    kept_width,
    next_power,
    on_device,
    split_count,
)
from unteach.kernels.triton_source import TritonGiven, TritonLinear, TritonSource

# An ordered value of INT32_MIN marks an empty slot (tile_keys.py).
_NONE = -(2**31)
_LOW_BITS = 2**31 - 1
_NAN_BITS = 0x7FC00000
# Slots of a row in the seeded pass: some 4K ids reach a threshold from fresh seeds.
_SLOTS = 256
# Programs of the exhaustive search, which share out whatever rows there are.
_EXHAUSTIVE_PROGRAMS = 1024
_EXHAUSTIVE_SPLITS = 16


@dataclass(frozen=True)
class Found:
    """A top-K, and how many rows the first search gave up on (0-d, on the device)."""

    top: TopK
    fallback: Tensor


@dataclass(frozen=True)
class RowList:
    """Rows with a property, first in a list that holds all rows, and their number."""

    rows_N: Tensor  # int32
    count: Tensor  # int32, one element

    @staticmethod
    def of(wanted_N: Tensor) -> RowList:
        order = wanted_N.to(torch.int8).argsort(descending=True, stable=True)
        return RowList(order.to(torch.int32), wanted_N.sum(dtype=torch.int32).view(1))


def search(
    source: TritonSource,
    k: int,
    vocab: int,
    *,
    active_N: Tensor | None = None,
    seeds_NS: Tensor | None = None,
    spare: int = 0,
    splits: int | None = None,
) -> Found:
    """Find the K largest logits of each row among ids below `vocab`.

    Args:
        active_N: rows to look at; the others get what a row of NaN gets. None: all.
        seeds_NS: ids that may be good; they change the speed, not the result.
        spare: how many runners-up to return.
        splits: parts of the vocabulary, a power of two; None: enough to fill the machine.
    """
    n, device = source.rows, source.device
    finite_N, kept = source.finite(), kept_width(k)
    wanted_N = torch.ones(n, dtype=torch.bool, device=device) if active_N is None else active_N
    wanted_N = wanted_N if finite_N is None else wanted_N & finite_N
    if n == 0:
        return _nothing(source, k, spare)
    slack_N = source.slack(vocab)
    keys_NM = torch.full((n, kept), -(2**63), dtype=torch.int64, device=device)
    lost_N = wanted_N
    if seeds_NS is not None and seeds_NS.shape[1] >= k:
        seeded_N, threshold_N = _thresholds(source, seeds_NS, slack_N, wanted_N, k, vocab)
        lost_N = wanted_N & ~_append(source, seeded_N, threshold_N, vocab, keys_NM, splits)
    _extract(source, RowList.of(lost_N), vocab, keys_NM, splits)
    raw_NM, ids_NM = unpack(keys_NM)
    fallback = lost_N.sum() if seeds_NS is not None else torch.zeros_like(lost_N.sum())
    if isinstance(source, TritonLinear):
        kth_N1, real_NM = raw_NM[:, k - 1 : k], ids_NM >= 0
        near_NM = real_NM & ~(raw_NM < kth_N1 - 2 * slack_N[:, None])
        value_NM = source.at(ids_NM.masked_fill(~near_NM, -1))
        raw_NM = torch.where(near_NM, value_NM, raw_NM)
        keys_NM = pack(raw_NM, ids_NM).topk(kept, dim=1).values
        raw_NM, ids_NM = unpack(keys_NM)
        hidden_N = near_NM[:, -1] & (slack_N > 0) & ~kth_N1.squeeze(1).isnan() & wanted_N
        if kept < vocab:
            raw_NM, ids_NM = _search_blurred(source, hidden_N, k, vocab, raw_NM, ids_NM)
            fallback = fallback + (hidden_N & ~lost_N if seeds_NS is not None else hidden_N).sum()
    ids_NM = torch.nn.functional.pad(ids_NM, (0, max(0, k + spare - kept)), value=-1)
    first_NK = torch.arange(k, device=device).expand(n, k)
    top = TopK(
        raw_NM[:, :k].masked_fill(~wanted_N[:, None], torch.nan),
        torch.where(wanted_N[:, None], ids_NM[:, :k], first_NK),
        ids_NM[:, k : k + spare].masked_fill(~wanted_N[:, None], -1),
        0,
    )
    return Found(top, fallback)


def order_bits(x: Tensor) -> Tensor:
    """int64 that compares as the float32 does: `ordered` of tile_keys.py."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    bits = bits.masked_fill(x.isnan(), _NAN_BITS)
    return torch.where(bits < 0, bits ^ _LOW_BITS, bits).to(torch.int64)


def pack(raw: Tensor, ids: Tensor) -> Tensor:
    """Sort keys of tile_keys.py; empty slots come last."""
    keys = (order_bits(raw) << 32) | (_LOW_BITS - ids)
    return keys.masked_fill(ids < 0, -(2**63))


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids; -inf and -1 in empty slots."""
    order = (keys >> 32).to(torch.int32)
    raw = torch.where(order < 0, order ^ _LOW_BITS, order).view(torch.float32)
    empty = order == _NONE
    ids = _LOW_BITS - (keys & 0xFFFFFFFF)
    return raw.masked_fill(empty, -torch.inf), ids.masked_fill(empty, -1)


def _thresholds(
    source: TritonSource, seeds_NS: Tensor, slack_N: Tensor, wanted_N: Tensor, k: int, vocab: int
) -> tuple[Tensor, Tensor]:
    """Which rows have K distinct seeds, and what a tile's value must reach there (ordered)."""
    ids_NS = first_occurrences(valid_ids(seeds_NS, vocab)).masked_fill(~wanted_N[:, None], -1)
    raw_NS = source.at(ids_NS).masked_fill(ids_NS < 0, -torch.inf)
    floor_N = kth_largest(raw_NS, k) - slack_N
    seeded_N = (ids_NS >= 0).sum(1) >= k
    return seeded_N, order_bits(floor_N.masked_fill(floor_N.isnan(), -torch.inf)).to(torch.int32)


def _append(
    source: TritonSource,
    seeded_N: Tensor,
    threshold_N: Tensor,
    vocab: int,
    keys_NM: Tensor,
    splits: int | None,
) -> Tensor:
    """Fill in the keys of rows that have a threshold; return which rows were done."""
    n, kept = keys_NM.shape
    chip, plain = architecture(source.device), _plain(source)
    if isinstance(source, TritonLinear) and dense_pass(chip, plain=plain) == "product":
        return _append_products(source, seeded_N, threshold_N, vocab, keys_NM)
    tile = append_tile(chip, plain=plain)
    splits = splits or split_count(-(-n // tile.block_n), -(-vocab // tile.block_v))
    slots = max(32, max(_SLOTS, 4 * kept) // splits)
    part = torch.empty(n, splits, slots, dtype=torch.int64, device=source.device)
    used_NS = torch.zeros(n, splits, dtype=torch.int32, device=source.device)
    rows = RowList.of(seeded_N)
    with on_device(keys_NM):
        append_kernel[(-(-n // tile.block_n), splits)](
            *_operands(source),
            rows.rows_N,
            rows.count,
            threshold_N,
            part,
            used_NS,
            *_sizes(source, vocab),
            **_tile_options(source, tile),
            SPLITS=splits,
            SLOTS=slots,
        )
    _merge(part, used_NS, rows, keys_NM)
    return seeded_N & (used_NS <= slots).all(1)


def _append_products(
    source: TritonLinear, seeded_N: Tensor, threshold_N: Tensor, vocab: int, keys_NM: Tensor
) -> Tensor:
    """`_append` by a library's products: rows × ids of the workspace at a time."""
    n, kept = keys_NM.shape
    slots, device = max(_SLOTS, 4 * kept), source.device
    part = torch.empty(n, 1, slots, dtype=torch.int64, device=device)
    used_N1 = torch.zeros(n, 1, dtype=torch.int32, device=device)
    threshold_N = threshold_N.masked_fill(~seeded_N, _LOW_BITS)
    elements = min(n, PRODUCT_ROWS) * min(vocab, PRODUCT_IDS)
    workspace = torch.empty(elements, dtype=torch.float32, device=device)
    for row in range(0, n, PRODUCT_ROWS):
        x = source.hidden_ND[row : row + PRODUCT_ROWS]
        for first in range(0, vocab, PRODUCT_IDS):
            w = source.head_VD[first : min(first + PRODUCT_IDS, vocab)]
            z = workspace[: len(x) * len(w)].view(len(x), len(w))
            _product(x, w, z)
            with on_device(z):
                filter_kernel[(len(x),)](
                    z,
                    z if source.bias_V is None else source.bias_V,
                    threshold_N,
                    part,
                    used_N1,
                    row,
                    first,
                    len(w),
                    source.scale,
                    HAS_BIAS=source.bias_V is not None,
                    SLOTS=slots,
                    BLOCK_V=next_power(min(vocab, PRODUCT_IDS)),
                    num_warps=FILTER_WARPS,
                )
    _merge(part, used_N1, RowList.of(seeded_N), keys_NM)
    return seeded_N & (used_N1 <= slots).squeeze(1)


def _product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """x · wᵀ, added up in float32 and not rounded to the inputs' dtype."""
    if x.is_cuda:
        torch.mm(x, w.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.float(), w.float().t(), out=out)


def _extract(
    source: TritonSource, rows: RowList, vocab: int, keys_NM: Tensor, splits: int | None
) -> None:
    """Fill in the keys of the listed rows."""
    n, kept = keys_NM.shape
    tile = extract_tile(architecture(source.device), kept, plain=_plain(source))
    splits = splits or split_count(-(-n // tile.block_n), -(-vocab // tile.block_v))
    part = torch.empty(n, splits, kept, dtype=torch.int64, device=source.device)
    with on_device(keys_NM):
        extract_kernel[(-(-n // tile.block_n), splits)](
            *_operands(source),
            rows.rows_N,
            rows.count,
            part,
            *_sizes(source, vocab),
            **_tile_options(source, tile),
            SPLITS=splits,
            KEPT=kept,
        )
    _merge(part, None, rows, keys_NM)


def _search_blurred(
    source: TritonLinear, hidden_N: Tensor, k: int, vocab: int, raw_NM: Tensor, ids_NM: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the exhaustive top-K in place of what these rows have."""
    n, kept = hidden_N.shape[0], max(EXHAUSTIVE_KEPT, next_power(k))
    rows, splits = RowList.of(hidden_N), _EXHAUSTIVE_SPLITS
    part = torch.empty(n, splits, kept, dtype=torch.int64, device=source.device)
    keys = torch.full((n, kept), -(2**63), dtype=torch.int64, device=source.device)
    programs = 2 if interpreting() else _EXHAUSTIVE_PROGRAMS
    with on_device(keys):
        exhaustive_kernel[(programs,)](
            *_operands(source),
            rows.rows_N,
            rows.count,
            part,
            *_sizes(source, vocab),
            HAS_BIAS=source.bias_V is not None,
            SPLITS=splits,
            KEPT=kept,
            BLOCK_U=EXHAUSTIVE_BLOCK,
            num_warps=EXHAUSTIVE_WARPS,
            enable_fp_fusion=False,
        )
    _merge(part, None, rows, keys)
    raw, ids = unpack(keys)
    missing = raw_NM.shape[1] - k
    raw = torch.nn.functional.pad(raw[:, :k], (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(ids[:, :k], (0, missing), value=-1)
    return torch.where(hidden_N[:, None], raw, raw_NM), torch.where(hidden_N[:, None], ids, ids_NM)


def _merge(part: Tensor, used_NS: Tensor | None, rows: RowList, keys_NM: Tensor) -> None:
    n, splits, slots = part.shape
    with on_device(part):
        merge_kernel[(n,)](
            part,
            rows.count if used_NS is None else used_NS,
            rows.rows_N,
            rows.count,
            keys_NM,
            HAS_USED=used_NS is not None,
            SPLITS=splits,
            SLOTS=slots,
            KEPT=keys_NM.shape[1],
            num_warps=1 if splits * slots <= 512 else 4,
        )


def _operands(source: TritonSource) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(source, TritonGiven):
        return (source.logits_NV,) * 3
    x = source.hidden_ND
    return x, source.head_VD, x if source.bias_V is None else source.bias_V


def _sizes(source: TritonSource, vocab: int) -> tuple[int, int, float, int, int]:
    """V, D, scale and both row strides."""
    if isinstance(source, TritonGiven):
        return vocab, 1, 1.0, source.logits_NV.stride(0), 1
    x, w = source.hidden_ND, source.head_VD
    return vocab, x.shape[1], source.scale, x.stride(0), w.stride(0)


def _plain(source: TritonSource) -> bool:
    """Whether the product has to do without 16-byte loads and tensor cores."""
    if isinstance(source, TritonGiven):
        return False
    x = source.hidden_ND
    return x.element_size() > 2 or x.shape[1] % WIDTH_STEP != 0


def _tile_options(source: TritonSource, tile: Tile) -> dict[str, int | bool]:
    given = isinstance(source, TritonGiven)
    x = source.logits_NV if isinstance(source, TritonGiven) else source.hidden_ND
    depth = tile.depth(x.element_size())
    return {
        "GIVEN": given,
        "HAS_BIAS": isinstance(source, TritonLinear) and source.bias_V is not None,
        "EVEN_D": not given and x.shape[1] % depth == 0,
        "UPCAST": interpreting(),
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _nothing(source: TritonSource, k: int, spare: int) -> Found:
    none = torch.zeros(0, k, dtype=torch.float32, device=source.device)
    ids = none.to(torch.int64)
    top = TopK(none, ids, ids.new_zeros(0, spare), 0)
    return Found(top, torch.zeros((), dtype=torch.int64, device=source.device))
