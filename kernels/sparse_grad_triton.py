"""Sparse gradients on a GPU without atomics and without a host sync: the equations of sparse_grad.

Pairs are a rectangle [N, U] laid flat, an id of -1 where a slot is empty. For dL/dhead they are
sorted by id, and each run of equal ids is cut into units. How many units there are is known on the
device only: buffers have the size of the bound, and the programs that share the units out read the
number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unteach.kernels.sparse_grad import Pairs
from unteach.kernels.tile_grad import head_join_kernel, head_units_kernel, hidden_grad_kernel
from unteach.kernels.triton_launch import (
    GATHER_BLOCK,
    GRAD_COLUMNS,
    interpreting,
    next_power,
    on_device,
)
from unteach.kernels.triton_source import dense_rows

# Pairs of one id that one program sums. Larger: a longer tail behind the most frequent id; smaller:
# more sums to keep, 8 P D / UNIT bytes.
UNIT = 256
_PROGRAMS = 1024


def hidden_grad_triton(pairs: Pairs, head_VD: Tensor, rows: int, scale: float) -> Tensor:
    """[rows, D] float32; each row has equally many pairs."""
    n, width = rows, head_VD.shape[1]
    u = pairs.ids_P.shape[0] // max(rows, 1)
    grad_ND = torch.empty(n, width, dtype=torch.float32, device=head_VD.device)
    if not grad_ND.numel():
        return grad_ND
    head_VD = dense_rows(head_VD)
    block = _columns(width)
    with on_device(head_VD):
        hidden_grad_kernel[(n, -(-width // block))](
            pairs.slopes_P.contiguous(),
            pairs.ids_P.to(torch.int32).contiguous(),
            head_VD,
            grad_ND,
            u,
            width,
            scale,
            head_VD.stride(0),
            BLOCK_U=GATHER_BLOCK,
            BLOCK_D=block,
            num_warps=4,
        )
    return grad_ND


def head_grad_triton(
    pairs: Pairs, hidden_ND: Tensor, vocab: int, scale: float, *, unit: int = UNIT
) -> Tensor:
    """Dense [vocab, D] in the dtype of the hidden states, zero where no pair fell."""
    width, device = hidden_ND.shape[1], hidden_ND.device
    grad_VD = torch.zeros(vocab, width, dtype=hidden_ND.dtype, device=device)
    total = pairs.ids_P.shape[0]
    if not total:
        return grad_VD
    hidden_ND = dense_rows(hidden_ND)
    ids_P = pairs.ids_P.to(torch.int32)
    ids_P, order = ids_P.masked_fill(ids_P < 0, vocab).sort(stable=True)
    rows_P, slopes_P = pairs.rows_P.to(torch.int32)[order], pairs.slopes_P[order]

    runs = _cut(ids_P, vocab, unit)
    kept = torch.empty(runs.slots, width, dtype=torch.float32, device=device)
    block = _columns(width)
    programs = (2 if interpreting() else _PROGRAMS, -(-width // block))
    with on_device(hidden_ND):
        head_units_kernel[programs](
            rows_P,
            slopes_P,
            ids_P,
            runs.start_U,
            runs.length_U,
            runs.slot_U,
            runs.units,
            hidden_ND,
            grad_VD,
            kept,
            width,
            scale,
            hidden_ND.stride(0),
            BLOCK_P=GATHER_BLOCK,
            BLOCK_D=block,
            num_warps=4,
        )
        head_join_kernel[programs](
            ids_P,
            runs.start_J,
            runs.slot_J,
            runs.units_J,
            runs.joins,
            kept,
            grad_VD,
            width,
            BLOCK_D=block,
            num_warps=4,
        )
    return grad_VD


class _Runs(NamedTuple):
    """Runs of equal ids cut into units [U], and the runs of several units, to be joined [J].

    Int32; of the lists, which have the size of their bounds, the first `units` and `joins` count.
    A unit of a run that has several keeps its sum in its slot, -1 where it writes the gradient.
    """

    start_U: Tensor
    length_U: Tensor
    slot_U: Tensor
    units: Tensor
    start_J: Tensor
    slot_J: Tensor
    units_J: Tensor
    joins: Tensor
    slots: int


def _cut(ids_P: Tensor, vocab: int, unit: int) -> _Runs:
    """Cut sorted ids, `vocab` behind the last, into units of at most `unit` pairs of one id."""
    total = ids_P.shape[0]
    place_P = torch.arange(total, device=ids_P.device)
    first = torch.ones(total, dtype=torch.bool, device=ids_P.device)
    first[1:] = ids_P[1:] != ids_P[:-1]
    # A running maximum would say the same, in one thread block for the whole list.
    run_P = first.cumsum(0) - 1
    starts = place_P.new_full((total + 1,), total)
    starts.scatter_(0, torch.where(first, run_P, total), torch.where(first, place_P, total))
    begin_P, end_P = starts[run_P], starts[run_P + 1]
    opens = ((place_P - begin_P) % unit == 0) & (ids_P < vocab)
    shared = opens & (end_P - begin_P > unit)
    slots = 2 * (total // unit) + 1
    start_U, units = _compact(place_P, opens, total)
    slot_P = (shared.cumsum(0) - 1).masked_fill(~shared, -1).to(torch.int32)
    length_U = torch.minimum(end_P[start_U] - start_U, torch.full_like(start_U, unit))
    start_J, joins = _compact(place_P, shared & first, slots)
    units_J = (end_P[start_J] - start_J + unit - 1) // unit
    return _Runs(
        start_U.to(torch.int32),
        length_U.to(torch.int32),
        slot_P[start_U],
        units,
        start_J.to(torch.int32),
        slot_P[start_J],
        units_J.to(torch.int32),
        joins,
        slots,
    )


def _compact(place_P: Tensor, chosen: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Places that were chosen, ascending, in a list of `bound`; and their number."""
    slot_P = torch.where(chosen, chosen.cumsum(0) - 1, bound)
    found = torch.zeros(bound + 1, dtype=torch.int64, device=place_P.device)
    found.scatter_(0, slot_P, place_P)
    return found[:bound], chosen.sum(dtype=torch.int32).view(1)


def _columns(width: int) -> int:
    return min(GRAD_COLUMNS, next_power(max(16, width)))
