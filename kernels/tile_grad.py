# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Row losses and sparse gradients: everything after both top-K sets are known.

`row_loss`     equation of union_loss.py: a row's union lies in registers, sums over it are free.
`hidden_grad`  dhidden[n] = scale Σ_u c[n, u] head[ids[n, u]]: U head rows read a hidden row.
`head_units`   dhead[v] = scale Σ_{p: id_p = v} c_p hidden[row_p], pairs sorted by id. A unit is at
               most UNIT pairs of one id, so that an id which thousands of rows share is spread over
               many programs; an id of one unit is written at once, the others' units are kept in
               float32 and added in order by `head_join`.

No atomics: an output has one writer, and each sum one order.
"""

import triton
import triton.language as tl


@triton.jit
def row_loss_kernel(
    student_ptr,  # [N, U] float32, final logits
    teacher_ptr,
    weight_ptr,  # [N, U] float32: [in T] + alpha [in S]
    live_ptr,  # [N, U] uint8
    factor_ptr,  # [N] float32: weight of the row over the normalizer
    loss_ptr,  # [N] float32: before that factor
    slope_ptr,  # [N, U] float32: dL / d raw, with that factor
    U,
    beta,
    gate,
    softcap,
    L1: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_u = tl.arange(0, BLOCK_U)
    mask_u = offs_u < U
    live = tl.load(live_ptr + row * U + offs_u, mask=mask_u, other=0) != 0
    weight = tl.load(weight_ptr + row * U + offs_u, mask=mask_u, other=0.0)
    student = tl.load(student_ptr + row * U + offs_u, mask=mask_u, other=0.0)
    teacher = tl.load(teacher_ptr + row * U + offs_u, mask=mask_u, other=0.0)
    size = tl.sum(live.to(tl.float32), 0)
    size = tl.where(size > 0, size, 1.0)
    d = student - teacher
    if CENTER:
        mean = tl.sum(student, 0) / size - tl.sum(teacher, 0) / size
        d = tl.where(live, d - mean, 0.0)
    far = tl.abs(d)
    if L1:
        smooth = far
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # NaN stays
    else:
        smooth = tl.where(far < beta, d * d * (0.5 / beta), far - 0.5 * beta)
        slope = d / beta
        slope = tl.where(slope > 1, 1.0, tl.where(slope < -1, -1.0, slope))
    loss = tl.sum(weight * smooth, 0)
    slope = weight * slope
    if CENTER:
        slope = tl.where(live, slope - tl.sum(slope, 0) / size, 0.0)
    if HAS_GATE:
        low = float("-inf")
        top_s = tl.max(tl.where(live, student, low), 0)
        top_t = tl.max(tl.where(live, teacher, low), 0)
        p_s = tl.where(live, tl.exp(student - top_s), 0.0)
        p_t = tl.where(live, tl.exp(teacher - top_t), 0.0)
        sum_s, sum_t = tl.sum(p_s, 0), tl.sum(p_t, 0)
        p_s = p_s / tl.where(sum_s == 0, 1.0, sum_s)
        p_t = p_t / tl.where(sum_t == 0, 1.0, sum_t)
        share = 0.5 * tl.sum(tl.abs(p_s - p_t), 0) / gate
        share = tl.where(share > 1, 1.0, share)
        loss = loss * share
        slope = slope * share
    if HAS_CAP:
        slope = slope * (1.0 - (student / softcap) * (student / softcap))
    loss = tl.where(tl.abs(loss) < float("inf"), loss, float("nan"))
    tl.store(loss_ptr + row, loss)
    slope = tl.where(live, slope * tl.load(factor_ptr + row), 0.0)
    tl.store(slope_ptr + row * U + offs_u, slope, mask=mask_u)


@triton.jit
def hidden_grad_kernel(
    slope_ptr,  # [N, U] float32
    ids_ptr,  # [N, U] int32, -1: no slope
    w_ptr,
    grad_ptr,  # [N, D] float32
    U,
    D,
    scale,
    stride_wv,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, U, BLOCK_U):
        offs_u = start + tl.arange(0, BLOCK_U)
        ids = tl.load(ids_ptr + row * U + offs_u, mask=offs_u < U, other=-1)
        live = ids >= 0
        slope = tl.load(slope_ptr + row * U + offs_u, mask=live, other=0.0) * scale
        w = tl.load(
            w_ptr + ids.to(tl.int64)[:, None] * stride_wv + offs_d[None, :],
            mask=live[:, None] & mask_d[None, :],
            other=0.0,
        )  # [BLOCK_U, BLOCK_D]
        acc += tl.sum(slope[:, None] * w.to(tl.float32), 0)
    tl.store(grad_ptr + row * D + offs_d, acc, mask=mask_d)


@triton.jit
def head_units_kernel(
    rows_ptr,  # [P] int32, sorted by id
    slopes_ptr,  # [P] float32
    ids_ptr,  # [P] int32, ascending
    start_ptr,  # [units] int32: first pair
    length_ptr,  # [units] int32
    slot_ptr,  # [units] int32: where its sum is kept, -1 for the only unit of an id
    count_ptr,  # number of units
    x_ptr,
    grad_ptr,  # [V, D] contiguous
    kept_ptr,  # [slots, D] float32
    D,
    scale,
    stride_xn,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    for unit in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        start = tl.load(start_ptr + unit)
        length = tl.load(length_ptr + unit)
        slot = tl.load(slot_ptr + unit).to(tl.int64)
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, length, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            mask_p = offs_p < length
            rows = tl.load(rows_ptr + start + offs_p, mask=mask_p, other=0).to(tl.int64)
            slope = tl.load(slopes_ptr + start + offs_p, mask=mask_p, other=0.0) * scale
            x = tl.load(
                x_ptr + rows[:, None] * stride_xn + offs_d[None, :],
                mask=mask_p[:, None] & mask_d[None, :],
                other=0.0,
            )  # [BLOCK_P, BLOCK_D]
            acc += tl.sum(slope[:, None] * x.to(tl.float32), 0)
        token = tl.load(ids_ptr + start).to(tl.int64)
        alone = slot < 0
        tl.store(grad_ptr + token * D + offs_d, acc, mask=mask_d & alone)
        tl.store(kept_ptr + slot * D + offs_d, acc, mask=mask_d & (slot >= 0))


@triton.jit
def head_join_kernel(
    ids_ptr,
    start_ptr,  # [joins] int32: first pair of an id that has several units
    slot_ptr,  # [joins] int32: where its first unit is kept, the others behind it
    units_ptr,  # [joins] int32: how many
    count_ptr,
    kept_ptr,
    grad_ptr,
    D,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    for join in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        slot = tl.load(slot_ptr + join).to(tl.int64)
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for unit in range(0, tl.load(units_ptr + join)):
            acc += tl.load(kept_ptr + (slot + unit) * D + offs_d, mask=mask_d, other=0.0)
        token = tl.load(ids_ptr + tl.load(start_ptr + join)).to(tl.int64)
        tl.store(grad_ptr + token * D + offs_d, acc, mask=mask_d)
