"""Where logits come from, seen by the top-K search: in cheap tiles, or exactly at chosen ids.

    raw = scale · (hidden · head) + bias,      z = softcap · tanh(raw / softcap)

Selection works on `raw`: the soft cap is monotone but saturates, and would make ties of what is
ordered. A tile is a matrix product whose rounding depends on the shape; `values` is the fixed-order
dot. `slack` bounds how far the two can be apart, so a search may filter on tiles and still decide
on exact values:

    |tile - value| <= 2 (D + 8) u (scale · |h| |w| + |b|),     u the unit roundoff
    (any order of D products and sums errs by at most D u Σ|h_d w_d|, and Cauchy-Schwarz)
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from unteach.kernels.fixed_dot import gather_dot

# Relative error of one rounded input of a float32 product, by torch's float32 matmul precision.
_INPUT_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


class ExactSource(Protocol):
    """Rows of logits before the soft cap, at chosen ids."""

    @property
    def rows(self) -> int: ...

    def finite(self) -> Tensor | None:
        """Which rows can have finite logits; None where that is not known beforehand."""
        ...

    def at(self, ids_NU: Tensor) -> Tensor:
        """The logits that decide, at some ids of each row; 0 where the id is -1."""
        ...


class LogitSource(ExactSource, Protocol):
    """Rows of logits before the soft cap, in tiles too."""

    dtype: torch.dtype
    device: torch.device

    def take(self, rows: slice | Tensor) -> LogitSource:
        """The same source for some of its rows."""
        ...

    def tile(self, start: int, stop: int) -> Tensor:
        """Logits of ids in [start, stop), each off by at most `slack`; valid until the next."""
        ...

    def slack(self, start: int, stop: int) -> Tensor:
        """Per row, the largest difference between `tile` and `values` over these ids."""
        ...

    def values(self, rows_P: Tensor, ids_P: Tensor) -> Tensor:
        """The logits that decide, at single (row, id) pairs."""
        ...


class LinearSource:
    """Logits of hidden states and a head, never held all at once."""

    def __init__(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        self.hidden_ND, self.head_VD, self.bias_V = hidden_ND, head_VD, bias_V
        self.scale, self.dtype, self.device = scale, dtype, hidden_ND.device
        self._wide_ND: Tensor | None = None
        self._norm_N: Tensor | None = None
        # What blocks of the same rows share: workspace, and (largest row norm, largest |bias|)
        self._buffers: dict[str, Tensor] = {}
        self._bounds: dict[tuple[int, int], tuple[float, float]] = {}

    @property
    def rows(self) -> int:
        return self.hidden_ND.shape[0]

    def take(self, rows: slice | Tensor) -> LinearSource:
        part = LinearSource(self.hidden_ND[rows], self.head_VD, self.bias_V, self.scale, self.dtype)
        part._buffers, part._bounds = self._buffers, self._bounds
        return part

    def finite(self) -> Tensor | None:
        return self.hidden_ND.isfinite().all(dim=1)

    def tile(self, start: int, stop: int) -> Tensor:
        x, width = self.scaled_hidden(), stop - start
        w = self.head_tile(start, stop)
        # products go into given memory: an enclosing autocast leaves those alone
        acc = self._buffer("tile", self.rows, width)
        if self.bias_V is None:
            return torch.mm(x, w.t(), out=acc)
        bias = self.bias_V[start:stop].to(self.dtype)
        return torch.addmm(bias, x, w.t(), out=acc)

    def slack(self, start: int, stop: int) -> Tensor:
        norm, bias = self._tile_bounds(start, stop)
        width = self.hidden_ND.shape[1]
        info = torch.finfo(self.dtype)
        relative = (width + 8) * info.eps + 4 * _input_roundoff(self.dtype)
        if self._norm_N is None:
            self._norm_N = row_norms(self.scaled_hidden())
        # one per cent more than the norms themselves may have lost to rounding
        return (self._norm_N * (1.01 * norm) + bias) * relative + width * info.tiny

    def values(self, rows_P: Tensor, ids_P: Tensor) -> Tensor:
        dot_P = gather_dot(self.hidden_ND, self.head_VD, rows_P, ids_P, self.dtype)
        if self.scale != 1:
            dot_P.mul_(self.scale)
        if self.bias_V is not None:
            dot_P.add_(self.bias_V.index_select(0, ids_P).to(self.dtype))
        return dot_P

    def at(self, ids_NU: Tensor) -> Tensor:
        return _values_at(self, ids_NU)

    def head_tile(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the head in the accumulation dtype; a view where that is free."""
        w = self.head_VD[start:stop]
        if w.dtype == self.dtype:
            return w
        return self._buffer("head", stop - start, w.shape[1]).copy_(w)

    def scaled_hidden(self) -> Tensor:
        """scale · hidden in the accumulation dtype; themselves if they will do."""
        if self._wide_ND is None:
            wide = self.hidden_ND.to(self.dtype)
            self._wide_ND = wide if self.scale == 1 else wide * self.scale
        return self._wide_ND

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
            self._buffers[name] = held
        return held[: rows * columns].view(rows, columns)

    def _tile_bounds(self, start: int, stop: int) -> tuple[float, float]:
        bounds = self._bounds.get((start, stop))
        if bounds is None:
            bounds = (float(largest_norm(row_norms(self.head_tile(start, stop)))), 0.0)
            if self.bias_V is not None:
                bias = self.bias_V[start:stop].to(self.dtype).abs()
                bounds = (bounds[0], _largest_finite(bias))
            self._bounds[start, stop] = bounds
        return bounds


class GivenSource:
    """Logits that somebody holds already; rows are picked tile by tile, never copied whole."""

    def __init__(
        self, logits_NV: Tensor, dtype: torch.dtype, index_N: Tensor | None = None
    ) -> None:
        self.logits_NV, self.dtype, self.device = logits_NV, dtype, logits_NV.device
        self.index_N = index_N

    @property
    def rows(self) -> int:
        return self.logits_NV.shape[0] if self.index_N is None else self.index_N.shape[0]

    def take(self, rows: slice | Tensor) -> GivenSource:
        if self.index_N is not None:
            return GivenSource(self.logits_NV, self.dtype, self.index_N[rows])
        if isinstance(rows, slice):
            return GivenSource(self.logits_NV[rows], self.dtype)
        return GivenSource(self.logits_NV, self.dtype, rows)

    def finite(self) -> Tensor | None:
        return None

    def tile(self, start: int, stop: int) -> Tensor:
        tile = self.logits_NV[:, start:stop]
        if self.index_N is not None:
            tile = tile.index_select(0, self.index_N)
        return tile.to(self.dtype)

    def slack(self, start: int, stop: int) -> Tensor:
        return torch.zeros(self.rows, dtype=self.dtype, device=self.device)

    def values(self, rows_P: Tensor, ids_P: Tensor) -> Tensor:
        rows_P = rows_P if self.index_N is None else self.index_N[rows_P]
        return self.logits_NV[rows_P, ids_P].to(self.dtype)

    def at(self, ids_NU: Tensor) -> Tensor:
        return _values_at(self, ids_NU)


def soft_cap(raw: Tensor, softcap: float | None) -> Tensor:
    """The model's final logits from those before the soft cap.

    Through float64: a vectorised tanh may round its last elements otherwise than the rest, and a
    float32 result would then depend on where in the batch a row stands.
    """
    if softcap is None:
        return raw
    return (softcap * torch.tanh(raw.to(torch.float64) / softcap)).to(raw.dtype)


def soft_cap_slope(z: Tensor, softcap: float) -> Tensor:
    """dz / d raw at final logits `z`."""
    return 1 - (z / softcap) ** 2


def _values_at(source: LogitSource, ids_NU: Tensor) -> Tensor:
    rows_P, slots_P = (ids_NU >= 0).nonzero(as_tuple=True)
    raw_NU = torch.zeros(ids_NU.shape, dtype=source.dtype, device=source.device)
    raw_NU[rows_P, slots_P] = source.values(rows_P, ids_NU[rows_P, slots_P])
    return raw_NU


def row_norms(x_XD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Each row's length, and what squares that underflowed may add; inf where they overflow."""
    norm_X: Tensor = torch.linalg.vector_norm(x_XD, dim=1, dtype=dtype)
    return norm_X + math.sqrt(x_XD.shape[1] * torch.finfo(norm_X.dtype).tiny)


def largest_norm(norm_X: Tensor) -> Tensor:
    """The longest row; inf lets no row be ruled out, and so makes the search exhaustive."""
    # a row with NaN makes NaN on every path and needs no bound
    return norm_X.nan_to_num(nan=0.0, posinf=torch.inf).amax()


def _largest_finite(x: Tensor) -> float:
    # an infinite bias makes inf on every path and needs no bound
    return float(x.nan_to_num(nan=0.0, posinf=0.0).max()) if x.numel() else 0.0


def _input_roundoff(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 0.0
    try:
        return _INPUT_ROUNDOFF[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch refuses to name a mixture of its old and its newer switches
        return _INPUT_ROUNDOFF["medium"]
