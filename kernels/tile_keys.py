# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: a total order in one integer, logit tiles, and the exact dot.

    key = ordered(value) << 32 | 0x7fffffff - id      larger value first, ties to the smaller id

`ordered` maps float32 to int32 so that integers compare as the numbers do, NaN above inf and -0 as
+0. `lane_dot` is the one float32 dot that decides: lane j adds the products d = j, j + 128, … in
this order, then neighbouring lanes are added pairwise. Launched with fp fusion off, each product
and each sum is one IEEE operation, so no block size, warp count or kernel can change a bit.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(128)
LEVELS = tl.constexpr(7)
# Below every ordered value: an empty slot, or an entry that has been taken.
NONE = tl.constexpr(-(2**31))
NONE_KEY = tl.constexpr(-(2**63))
NAN_BITS = tl.constexpr(0x7FC00000)
LOW_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def canonical(x):
    """One zero and one NaN."""
    x = tl.where(x == 0, 0.0, x)
    return tl.where(x != x, float("nan"), x)


@triton.jit
def ordered(x):
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, NAN_BITS, bits)
    return tl.where(bits < 0, bits ^ LOW_BITS, bits)


@triton.jit
def pack(order, ids):
    return (order.to(tl.int64) << 32) | (ids ^ LOW_BITS).to(tl.int64)


@triton.jit
def linear_tile(
    x_ptr,
    w_ptr,
    bias_ptr,
    rows,  # [BLOCK_N] int64
    mask_n,
    offs_v,  # [BLOCK_V]
    mask_v,
    D,
    scale,
    stride_xn,
    stride_wv,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale · (x · w) + bias, or the logits that x holds already: [BLOCK_N, BLOCK_V] float32."""
    if GIVEN:
        given = x_ptr + rows[:, None] * stride_xn + offs_v[None, :]
        acc = tl.load(given, mask=mask_n[:, None] & mask_v[None, :], other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        x_row = x_ptr + rows[:, None] * stride_xn
        w_row = w_ptr + offs_v.to(tl.int64)[None, :] * stride_wv
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            if EVEN_D:
                mask_x, mask_w = mask_n[:, None], mask_v[None, :]
            else:
                mask_x = mask_n[:, None] & (offs_d < D)[None, :]
                mask_w = mask_v[None, :] & (offs_d < D)[:, None]
            x = tl.load(x_row + offs_d[None, :], mask=mask_x, other=0.0)  # [BLOCK_N, BLOCK_D]
            w = tl.load(w_row + offs_d[:, None], mask=mask_w, other=0.0)  # [BLOCK_D, BLOCK_V]
            if UPCAST:  # the interpreter multiplies the raw bits of bf16
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        acc = acc * scale
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
            acc = acc + bias[None, :]
    return acc


@triton.jit
def lane_dot(x_row_ptr, w_ptr, ids, mask, D, stride_wv, BLOCK_U: tl.constexpr):
    """Dot of one hidden row with the head rows at `ids`, in the fixed order: [BLOCK_U] float32."""
    acc = tl.zeros([BLOCK_U, LANES], dtype=tl.float32)
    w_row = w_ptr + ids.to(tl.int64)[:, None] * stride_wv
    for start in range(0, D, LANES):
        offs_d = start + tl.arange(0, LANES)
        mask_d = offs_d < D
        x = tl.load(x_row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        w = tl.load(w_row + offs_d[None, :], mask=mask[:, None] & mask_d[None, :], other=0.0)
        acc = acc + x[None, :] * w.to(tl.float32)
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(acc, [BLOCK_U, LANES >> (level + 1), 2]))
        acc = even + odd
    return tl.reshape(acc, [BLOCK_U])
