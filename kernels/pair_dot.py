# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Exact logits at chosen ids: one float32 dot of fixed order for each (row, id).

    raw[n, u] = scale · lane_dot(x[n], w[ids[n, u]]) + bias[ids[n, u]]

Moves NU head rows of D numbers and as good as nothing else. The order is that of tile_keys.py: the
same bits wherever the pair stands.
"""

import triton
import triton.language as tl

from unteach.kernels.tile_keys import canonical, lane_dot

BLOCK_U = 16
WARPS = 4


@triton.jit
def pair_dot_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    ids_ptr,  # [N, U] int32, -1: not wanted
    raw_ptr,  # [N, U] float32, 0 where not wanted
    U,
    D,
    scale,
    stride_xn,
    stride_wv,
    HAS_BIAS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask_u = offs_u < U
    ids = tl.load(ids_ptr + row * U + offs_u, mask=mask_u, other=-1)
    wanted = ids >= 0
    # a block in which nothing is wanted takes no step
    width = tl.where(tl.max(ids, 0) >= 0, D, 0)
    dot = lane_dot(x_ptr + row * stride_xn, w_ptr, ids, wanted, width, stride_wv, BLOCK_U)
    raw = dot * scale
    if HAS_BIAS:
        raw = raw + tl.load(bias_ptr + ids, mask=wanted, other=0.0)
    tl.store(raw_ptr + row * U + offs_u, tl.where(wanted, canonical(raw), 0.0), mask=mask_u)
