"""Passes over the full vocabulary in tiles, for losses whose slopes are dense.

Forward keeps per row an online (maximum, sum of exponentials); backward recomputes each tile, makes
its slopes in place and multiplies them out at once. Tiles are the outer loop and row blocks the
inner one, so each tile of dL/dhead is finished in the accumulation dtype and rounded once.

Memory beside gradients: one [n, T] tile a side (n·T <= 2^19), and dL/dhidden in that dtype. FLOPs:
2NVD forward; backward 2NVD to recompute and 2NVD for each of the two gradients that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.logit_source import LinearSource, soft_cap_slope
from unteach.kernels.topk_filter import TILE_ELEMENTS, tile_width


@dataclass(frozen=True)
class Grads:
    """Gradients of a linear layer; None where not wanted."""

    hidden_ND: Tensor | None
    head_VD: Tensor | None
    bias_V: Tensor | None


class OnlineSum:
    """log Σ exp over the tiles seen so far, and a mean under the same weights; float64 per row."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.top_N = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.sum_N = torch.zeros_like(self.top_N)
        self.weighted_N = torch.zeros_like(self.top_N)

    def add_(self, z: Tensor, value: Tensor | None = None) -> None:
        """Take a tile of logits in, and Σ exp(z) · value if given. Overwrites the tile."""
        top = torch.maximum(self.top_N, z.amax(1).double())
        shift = top.masked_fill(top == -torch.inf, 0)
        z.sub_(shift.to(z.dtype)[:, None]).exp_()
        decay = (self.top_N - shift).exp()
        self.sum_N = self.sum_N * decay + z.sum(1).double()
        if value is not None:
            self.weighted_N = self.weighted_N * decay + (z.mul_(value)).sum(1).double()
        self.top_N = top

    def log(self) -> Tensor:
        return self.top_N + self.sum_N.log()

    def mean(self) -> Tensor:
        return self.weighted_N / self.sum_N


def tiles(vocab: int) -> Iterator[tuple[int, int]]:
    """Ranges of ids."""
    step = tile_width(1, vocab)
    for start in range(0, vocab, step):
        yield start, min(start + step, vocab)


def row_slices(rows: int, vocab: int) -> list[slice]:
    """Blocks of rows that keep one tile under TILE_ELEMENTS."""
    step = max(1, TILE_ELEMENTS // tile_width(1, vocab))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def capped_tile(source: LinearSource, start: int, stop: int, softcap: float | None) -> Tensor:
    """Final logits of a tile, in the source's workspace."""
    z = source.tile(start, stop)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def linear_grads(
    source: LinearSource,
    slopes_: Callable[[int, Tensor, int, int], Tensor],
    *,
    vocab: int,
    softcap: float | None,
    wants: tuple[bool, bool, bool],
) -> Grads:
    """Gradients from slopes that are made tile by tile.

    Args:
        slopes_: (row block, final logits of its tile, start, stop) to dL/dz, in place.
        wants: which of hidden, head and bias need a gradient.
    """
    head, bias = source.head_VD, source.bias_V
    width = head.shape[1]
    slices = row_slices(source.rows, vocab)
    blocks = [source.take(rows) for rows in slices]
    grad_ND = _zeros(source, source.rows, width) if wants[0] else None
    grad_VD = torch.zeros_like(head, memory_format=torch.contiguous_format) if wants[1] else None
    grad_V = torch.zeros_like(bias) if wants[2] and bias is not None else None
    for start, stop in tiles(vocab):
        dw = None
        if grad_VD is not None:
            same = grad_VD.dtype == source.dtype
            dw = grad_VD[start:stop] if same else _zeros(source, stop - start, width)
        db = None if grad_V is None else _zeros(source, stop - start)
        for index, (rows, block) in enumerate(zip(slices, blocks, strict=True)):
            z = capped_tile(block, start, stop, softcap)
            cap_slope = None if softcap is None else soft_cap_slope(z, softcap)
            slope = slopes_(index, z, start, stop)
            if cap_slope is not None:
                slope.mul_(cap_slope)
            if grad_ND is not None:
                grad_ND[rows].addmm_(slope, block.head_tile(start, stop), alpha=source.scale)
            if dw is not None:
                dw.addmm_(slope.t(), block.scaled_hidden())
            if db is not None:
                db += slope.sum(0)
        if grad_VD is not None and dw is not None and dw.dtype != grad_VD.dtype:
            grad_VD[start:stop] = dw.to(grad_VD.dtype)
        if grad_V is not None and db is not None:
            grad_V[start:stop] = db.to(grad_V.dtype)
    return Grads(grad_ND, grad_VD, grad_V)


def _zeros(source: LinearSource, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=source.dtype, device=source.device)
