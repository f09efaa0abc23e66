"""Passes over the full vocabulary in tiles, for losses whose slopes are dense.

Forward keeps per row an online (maximum, sum of exponentials); backward recomputes each tile, makes
its slopes in place and multiplies them out at once. Tiles are the outer loop and row blocks the
inner one, so each tile of dL/dhead is finished in the accumulation dtype and rounded once.

Memory beside gradients: one [n, T] tile a side (n·T <= 2^19 on a CPU, 2^24 elsewhere), and
dL/dhidden in that dtype. FLOPs: 2NVD forward; backward 2NVD to recompute and 2NVD for each of the
two gradients that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.logit_source import LinearSource, soft_cap_slope
from unteach.kernels.topk_filter import TILE_ELEMENTS, TILE_IDS


@dataclass(frozen=True)
class Grads:
    """Gradients of a linear layer; None where not wanted."""

    hidden_ND: Tensor | None
    head_VD: Tensor | None
    bias_V: Tensor | None


class OnlineSum:
    """Σ exp(z - base) over the tiles so far, and a mean under the same weights; float64 per row.

    `base_N` is the largest logit so far (0 where all are -inf), a float32 number in float32 runs:
    logits less it are small and as good as exact, whatever offset a row carries.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.base_N = torch.zeros(rows, dtype=torch.float64, device=device)
        self.sum_N = torch.zeros_like(self.base_N)
        self.weighted_N = torch.zeros_like(self.base_N)
        self._top_N = torch.full_like(self.base_N, -torch.inf)

    def lower_(self, z: Tensor) -> Tensor:
        """Raise the base to a tile's largest logit, and take it off the tile in place."""
        top_N = torch.maximum(self._top_N, z.amax(1).double())
        self.base_N = top_N.masked_fill(top_N == -torch.inf, 0)
        decay_N = (self._top_N - self.base_N).exp()
        self.sum_N, self.weighted_N = self.sum_N * decay_N, self.weighted_N * decay_N
        self._top_N = top_N
        return z.sub_(self.base_N.to(z.dtype)[:, None])

    def add_(self, lowered: Tensor, value: Tensor | None = None) -> None:
        """Take in what `lower_` gave, and its Σ exp · value if given. Overwrites the tile."""
        self.sum_N = self.sum_N + lowered.exp_().sum(1).double()
        if value is not None:
            self.weighted_N = self.weighted_N + lowered.mul_(value).sum(1).double()

    def log(self) -> Tensor:
        """log Σ exp(z - base)."""
        return self.sum_N.log()

    def mean(self) -> Tensor:
        return self.weighted_N / self.sum_N


def softmax_(z: Tensor, log_sum_2N: Tensor) -> Tensor:
    """Softmax of a tile in place, from its rows' (base, log Σ exp(z - base)).

    One number for both would be rounded at the size of the logits, and all slopes of a row with it.
    """
    return z.sub_(log_sum_2N[0, :, None]).sub_(log_sum_2N[1, :, None]).exp_()


def tiles(vocab: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of ids."""
    step = _tile(vocab, device)[1]
    for start in range(0, vocab, step):
        yield start, min(start + step, vocab)


def row_slices(rows: int, vocab: int, device: torch.device) -> list[slice]:
    """Blocks of rows that keep one tile as small as the device likes it."""
    step = _tile(vocab, device)[0]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _tile(vocab: int, device: torch.device) -> tuple[int, int]:
    """Rows and ids of a tile: one of a core's cache, or one that is worth some fifty launches."""
    most, ids = (TILE_ELEMENTS, TILE_IDS) if device.type == "cpu" else (1 << 24, 4096)
    ids = min(ids, vocab)
    return max(1, most // ids), ids


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
    slices = row_slices(source.rows, vocab, source.device)
    blocks = [source.take(rows) for rows in slices]
    grad_ND = _zeros(source, source.rows, width) if wants[0] else None
    grad_VD = torch.zeros_like(head, memory_format=torch.contiguous_format) if wants[1] else None
    grad_V = torch.zeros_like(bias) if wants[2] and bias is not None else None
    for start, stop in tiles(vocab, source.device):
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
