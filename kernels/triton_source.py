"""Logits as the Triton kernels see them: exactly at chosen ids, or tile by tile in a search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unteach.kernels.logit_source import largest_norm, row_norms
from unteach.kernels.pair_dot import BLOCK_U, WARPS, pair_dot_kernel
from unteach.kernels.triton_launch import on_device


@dataclass(frozen=True, eq=False)
class TritonLinear:
    """Logits of hidden states and a head; values are `lane_dot`s."""

    hidden_ND: Tensor  # rows contiguous
    head_VD: Tensor
    bias_V: Tensor | None  # float32
    scale: float

    @staticmethod
    def of(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, scale: float) -> TritonLinear:
        """Detached and laid out for the kernels; copies only what is not."""
        bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        return TritonLinear(dense_rows(hidden_ND), dense_rows(head_VD), bias_V, scale)

    @property
    def rows(self) -> int:
        return self.hidden_ND.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden_ND.device

    @cached_property
    def finite_N(self) -> Tensor:
        return self.hidden_ND.isfinite().all(dim=1)

    def finite(self) -> Tensor | None:
        """Which rows can have finite logits."""
        return self.finite_N

    def at(self, ids_NU: Tensor) -> Tensor:
        """Logits before the soft cap, float32; 0 where the id is -1."""
        ids_NU = ids_NU.to(torch.int32).contiguous()
        n, u = ids_NU.shape
        raw_NU = torch.empty(n, u, dtype=torch.float32, device=self.device)
        if not raw_NU.numel():
            return raw_NU
        x, w = self.hidden_ND, self.head_VD
        with on_device(x):
            pair_dot_kernel[(n, -(-u // BLOCK_U))](
                x,
                w,
                x if self.bias_V is None else self.bias_V,
                ids_NU,
                raw_NU,
                u,
                x.shape[1],
                self.scale,
                x.stride(0),
                w.stride(0),
                HAS_BIAS=self.bias_V is not None,
                BLOCK_U=BLOCK_U,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        return raw_NU

    def slack(self, vocab: int) -> Tensor:
        """Per row, the largest difference between a tile's value and the exact one.

        The bound of logit_source.py with the largest norm of all head rows; 0 for a row of zeros.
        """
        wide = torch.float32
        info, width = torch.finfo(wide), self.hidden_ND.shape[1]
        norm_N = row_norms(self.hidden_ND, wide) * self.scale
        bound_N = norm_N * (1.01 * largest_norm(row_norms(self.head_VD[:vocab], wide)))
        if self.bias_V is not None:
            bound_N = bound_N + _largest_finite(self.bias_V[:vocab].abs())
        slack_N: Tensor = bound_N * ((width + 8) * info.eps) + width * info.tiny
        return slack_N.masked_fill(~self.hidden_ND.any(dim=1), 0)


@dataclass(frozen=True, eq=False)
class TritonGiven:
    """Logits that somebody holds already."""

    logits_NV: Tensor  # rows contiguous

    @staticmethod
    def of(logits_NV: Tensor) -> TritonGiven:
        return TritonGiven(dense_rows(logits_NV))

    @property
    def rows(self) -> int:
        return self.logits_NV.shape[0]

    @property
    def device(self) -> torch.device:
        return self.logits_NV.device

    def finite(self) -> Tensor | None:
        """Not known beforehand."""
        return None

    def slack(self, vocab: int) -> Tensor:
        """A tile holds the very values that decide."""
        return torch.zeros(self.rows, dtype=torch.float32, device=self.device)

    def at(self, ids_NU: Tensor) -> Tensor:
        """The logits at these ids, float32; 0 where the id is -1."""
        found = self.logits_NV.gather(1, ids_NU.to(torch.int64).clamp(min=0)).float()
        return found.masked_fill(ids_NU < 0, 0)


TritonSource = TritonLinear | TritonGiven


def dense_rows(x: Tensor) -> Tensor:
    """Detached, with neighbouring columns side by side in memory."""
    x = x.detach()
    return x if x.stride(1) == 1 else x.contiguous()


def _largest_finite(x: Tensor) -> Tensor:
    # an infinite bias makes inf on every path and needs no bound
    return x.nan_to_num(nan=0.0, posinf=0.0).amax()
