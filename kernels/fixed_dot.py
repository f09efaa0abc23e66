"""Dot products and sums whose order of additions is a function of the width alone.

    tree(x_1 .. x_w) = tree(x_1 + x_{w-h+1}, .., x_h + x_w, x_{h+1}, .., x_{w-h}),  h = floor(w/2)

A library reduction may change its order with the batch shape, the thread count or the alignment.
Here each level is one elementwise addition (and the products one elementwise multiplication, in a
separate pass, so nothing can be contracted to a fused multiply-add): IEEE 754 leaves no freedom.
The same (row, id) therefore has the same bits in any batch, on any path, from any seeds of this
backend. The Triton kernels add in another order, as fixed as this one (tile_keys.py).

Cost: 2PD multiplications and additions and about 4PD·4 bytes, in slices that stay in the cache.
"""

import torch
from torch import Tensor

# Elements of one slice: two float32 buffers of 2 MiB, measured fastest on a Zen 3 core with 512 KiB
# of L2 (kernels launched per slice weigh more below, cache misses above).
SLICE_ELEMENTS = 1 << 19
# A GPU wants its slices larger than its caches, to fill the machine.
SLICE_ELEMENTS_CUDA = 1 << 24


def slice_pairs(width: int, device: torch.device) -> int:
    """How many (row, id) pairs of `width` numbers one slice takes."""
    elements = SLICE_ELEMENTS_CUDA if device.type == "cuda" else SLICE_ELEMENTS
    return max(1, elements // width)


def tree_sum_(x_PW: Tensor) -> Tensor:
    """Sum each row in the fixed order. Overwrites its argument."""
    width = x_PW.shape[1]
    if width == 0:
        return x_PW.new_zeros(x_PW.shape[0])
    while width > 1:
        half = width // 2
        x_PW[:, :half].add_(x_PW[:, width - half : width])
        width -= half
    return x_PW[:, 0]


def gather_dot(
    hidden_ND: Tensor, head_VD: Tensor, rows_P: Tensor, ids_P: Tensor, dtype: torch.dtype
) -> Tensor:
    """Dot product of hidden row and head row for each pair, accumulated in `dtype`."""
    pairs, width = rows_P.shape[0], hidden_ND.shape[1]
    dot_P = torch.empty(pairs, dtype=dtype, device=hidden_ND.device)
    step = slice_pairs(width, hidden_ND.device)
    x = torch.empty(min(step, pairs), width, dtype=dtype, device=hidden_ND.device)
    for start in range(0, pairs, step):
        stop = min(start + step, pairs)
        w = gather_rows(head_VD, ids_P[start:stop], x[: stop - start])
        h = hidden_ND.index_select(0, rows_P[start:stop])
        w.mul_(h.to(dtype))
        dot_P[start:stop] = tree_sum_(w)
    return dot_P


def gather_rows(matrix_XD: Tensor, index_P: Tensor, out_PD: Tensor) -> Tensor:
    """Copy the rows at `index_P` into `out_PD`, widened to its dtype."""
    if matrix_XD.dtype == out_PD.dtype:
        return torch.index_select(matrix_XD, 0, index_P, out=out_PD)
    return out_PD.copy_(matrix_XD.index_select(0, index_P))
