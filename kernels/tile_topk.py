# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Searches for the largest logits of each row that never leave the tile in which they were made.

`extract`     keeps a running list of the largest tile values: while some row's best exceeds its
              smallest kept key, take it in and mask it. Needs nothing to start from.
`append`      stores every id whose tile value reaches the row's threshold; ends a row whose slots
              are full. No list, hence larger tiles.
`filter`      the same for a tile that a library has multiplied: reads each logit once.
`exhaustive`  the same list as extract, of exact values: one fixed-order dot for every id. For rows
              in which rounding blurs more ids than a list can hold.
`merge`       sorts what the parts of the vocabulary have found for a row.

All work on a list of rows and its length on the device; programs beyond it return. Part s of S
takes tiles s, s + S, …: frequent ids lie close together, and so fall to different parts. Floors:
2NVD FLOPs and NVD (1 / BLOCK_N + 1 / BLOCK_V) loads for a tile search; the head once for each row
of an exhaustive one. No atomics: a program owns its part of a row.
"""

import triton
import triton.language as tl

from unteach.kernels.tile_keys import (
    NONE,
    NONE_KEY,
    lane_dot,
    linear_tile,
    ordered,
    pack,
)


@triton.jit
def extract_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    rows_ptr,  # [N] int32, of which the first `count` are wanted
    count_ptr,
    part_ptr,  # [N, SPLITS, KEPT] int64
    V,
    D,
    scale,
    stride_xn,
    stride_wv,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = tl.load(count_ptr)
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    if first >= count:
        return
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < count
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    slots = tl.arange(0, KEPT)
    columns = tl.arange(0, BLOCK_V)
    # distinct fillers: what replaces one of them must not replace them all
    run = tl.zeros([BLOCK_N, KEPT], dtype=tl.int64) + (slots.to(tl.int64) + NONE_KEY)[None, :]
    low = tl.min(run, 1)
    for tile in range(split, tl.cdiv(V, BLOCK_V), SPLITS):
        offs_v = tile * BLOCK_V + columns
        mask_v = offs_v < V
        x = linear_tile(
            x_ptr,
            w_ptr,
            bias_ptr,
            rows,
            mask_n,
            offs_v,
            mask_v,
            D,
            scale,
            stride_xn,
            stride_wv,
            GIVEN,
            HAS_BIAS,
            EVEN_D,
            UPCAST,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        order = tl.where(mask_n[:, None] & mask_v[None, :], ordered(x), NONE)
        best, arg = tl.max(order, 1, return_indices=True)  # of equal values the smaller id
        key = pack(best, tile * BLOCK_V + arg)
        enters = (key > low) & (best > NONE)
        while tl.max(enters.to(tl.int32), 0) > 0:
            run = tl.where(enters[:, None] & (run == low[:, None]), key[:, None], run)
            order = tl.where(enters[:, None] & (columns[None, :] == arg[:, None]), NONE, order)
            low = tl.min(run, 1)
            best, arg = tl.max(order, 1, return_indices=True)
            key = pack(best, tile * BLOCK_V + arg)
            enters = (key > low) & (best > NONE)
    part = part_ptr + (rows[:, None] * SPLITS + split) * KEPT + slots[None, :]
    tl.store(part, run, mask=mask_n[:, None])


@triton.jit
def append_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    rows_ptr,
    count_ptr,
    threshold_ptr,  # [N] int32, ordered values
    part_ptr,  # [N, SPLITS, SLOTS] int64
    used_ptr,  # [N, SPLITS] int32, more than SLOTS where a row ran over
    V,
    D,
    scale,
    stride_xn,
    stride_wv,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = tl.load(count_ptr)
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    if first >= count:
        return
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < count
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    threshold = tl.load(threshold_ptr + rows, mask=mask_n, other=0)
    used = tl.zeros([BLOCK_N], dtype=tl.int32)
    part = part_ptr + (rows * SPLITS + split) * SLOTS
    for tile in range(split, tl.cdiv(V, BLOCK_V), SPLITS):
        offs_v = tile * BLOCK_V + columns
        mask_v = offs_v < V
        x = linear_tile(
            x_ptr,
            w_ptr,
            bias_ptr,
            rows,
            mask_n,
            offs_v,
            mask_v,
            D,
            scale,
            stride_xn,
            stride_wv,
            GIVEN,
            HAS_BIAS,
            EVEN_D,
            UPCAST,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        order = ordered(x)
        wanted = mask_n[:, None] & mask_v[None, :] & (order >= threshold[:, None])
        # a row that has run over takes nothing more: equal logits must not walk through every id
        wanted = wanted & (used <= SLOTS)[:, None]
        order = tl.where(wanted, order, NONE)
        best, arg = tl.max(order, 1, return_indices=True)
        while tl.max(best, 0) > NONE:
            hit = best > NONE
            key = pack(best, tile * BLOCK_V + arg)
            tl.store(part + used, key, mask=hit & (used < SLOTS))
            used += hit.to(tl.int32)
            taken = (columns[None, :] == arg[:, None]) | (used > SLOTS)[:, None]
            order = tl.where(taken, NONE, order)
            best, arg = tl.max(order, 1, return_indices=True)
    tl.store(used_ptr + rows * SPLITS + split, used, mask=mask_n)


@triton.jit
def filter_kernel(
    z_ptr,  # [rows, columns] float32 contiguous: hidden states times ids first_id, first_id + 1, …
    bias_ptr,
    threshold_ptr,  # [N] int32, ordered values; above all of them where a row wants nothing
    part_ptr,  # [N, SLOTS] int64
    used_ptr,  # [N] int32, read and written: more than SLOTS where a row ran over
    first_row,
    first_id,
    columns,
    scale,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    offs = tl.arange(0, BLOCK_V)
    mask = offs < columns
    x = tl.load(z_ptr + place * columns + offs, mask=mask, other=0.0) * scale
    if HAS_BIAS:
        x = x + tl.load(bias_ptr + first_id + offs, mask=mask, other=0.0)
    order = ordered(x)
    order = tl.where(mask & (order >= tl.load(threshold_ptr + row)), order, NONE)
    used = tl.load(used_ptr + row)
    best, arg = tl.max(order, 0, return_indices=True)
    while (best > NONE) & (used <= SLOTS):
        tl.store(part_ptr + row * SLOTS + used, pack(best, first_id + arg), mask=used < SLOTS)
        used += 1
        order = tl.where(offs == arg, NONE, order)
        best, arg = tl.max(order, 0, return_indices=True)
    tl.store(used_ptr + row, used)


@triton.jit
def exhaustive_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    rows_ptr,
    count_ptr,
    part_ptr,  # [N, SPLITS, KEPT] int64
    V,
    D,
    scale,
    stride_xn,
    stride_wv,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    work = tl.load(count_ptr) * SPLITS
    slots = tl.arange(0, KEPT)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        place, split = item // SPLITS, item % SPLITS
        row = tl.load(rows_ptr + place).to(tl.int64)
        run = slots.to(tl.int64) + NONE_KEY
        low = tl.min(run, 0)
        for tile in range(split, tl.cdiv(V, BLOCK_U), SPLITS):
            ids = tile * BLOCK_U + tl.arange(0, BLOCK_U)
            inside = ids < V
            dot = lane_dot(x_ptr + row * stride_xn, w_ptr, ids, inside, D, stride_wv, BLOCK_U)
            raw = dot * scale
            if HAS_BIAS:
                raw = raw + tl.load(bias_ptr + ids, mask=inside, other=0.0)
            keys = tl.where(inside, pack(ordered(raw), ids), NONE_KEY)
            best = tl.max(keys, 0)
            while best > low:
                run = tl.where(run == low, best, run)
                keys = tl.where(keys == best, NONE_KEY, keys)
                low = tl.min(run, 0)
                best = tl.max(keys, 0)
        tl.store(part_ptr + (row * SPLITS + split) * KEPT + slots, run)


@triton.jit
def merge_kernel(
    part_ptr,  # [N, SPLITS, SLOTS] int64
    used_ptr,  # [N, SPLITS] int32: how many slots of a part hold something
    rows_ptr,
    count_ptr,
    keys_ptr,  # [N, KEPT] int64, sorted
    HAS_USED: tl.constexpr,  # else all slots do
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    KEPT: tl.constexpr,
):
    place = tl.program_id(0)
    if place >= tl.load(count_ptr):
        return
    row = tl.load(rows_ptr + place).to(tl.int64)
    offs = tl.arange(0, SPLITS * SLOTS)
    if HAS_USED:
        used = tl.load(used_ptr + row * SPLITS + offs // SLOTS)
        full = offs % SLOTS < used
        keys = tl.load(part_ptr + row * (SPLITS * SLOTS) + offs, mask=full, other=NONE_KEY)
    else:
        keys = tl.load(part_ptr + row * (SPLITS * SLOTS) + offs)
    for slot in range(KEPT):
        best = tl.max(keys, 0)
        tl.store(keys_ptr + row * KEPT + slot, best)
        keys = tl.where(keys == best, NONE_KEY, keys)
