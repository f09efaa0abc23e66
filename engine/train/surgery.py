"""Several goals, one step: gradients of their own, weighed by their Gram matrix, summed.

Every rule here is a weight for each goal, found from the G x G inner products alone. Those are
summed over ranks first, so that every rank has the same weights whatever part of a gradient it
holds. Memory: G gradients beside the parameters, sharded as they are, instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unteach.engine.config import MethodConfig
from unteach.engine.train.methods import find_method
from unteach.engine.train.parallel import World

NEGLIGIBLE = 1e-4  # of the longest gradient: below it a gradient is rounding, with no direction
SINGULAR = 1e-12
CUT_OFF = 1e-6  # singular values of the goals to keep, of the largest


def ngdiff_combine(gram_GG: Tensor) -> Tensor:
    """Weights of NGDiff: every goal counts by its direction alone.

    g = Σ_k g_k / ||g_k||;   with g_1 = -∇CE(forget), g_2 = ∇CE(retain) that is NGDiff's
    g_R/||g_R|| - g_F/||g_F||, for which g·g_R >= 0 and g·g_F <= 0.

    Args:
        gram_GG: inner products of the goals' gradients, float64.
    Returns:
        weights_G; 0 for a gradient of length 0.
    """
    length_G = gram_GG.diagonal().clamp_min(0).sqrt()
    return torch.where(length_G > 0, 1 / length_G, 0.0)


def mgda_weights(gram_GG: Tensor) -> Tensor:
    """The shortest convex combination of the goals' gradients, a descent direction for them all.

    min_w || Σ_k w_k g_k ||²,  w >= 0, Σ w = 1.   For d = -Σ w_k g_k: g_k·d <= -||d||² for every k.

    Exact for two goals (closed form) and three (corners, edges, the inside); beyond, Wolfe's
    method, which is finite.

    Args:
        gram_GG: inner products of the goals' gradients, float64.
    Returns:
        weights_G on the simplex, finite for equal and for zero gradients.
    """
    goals = gram_GG.shape[0]
    largest = float(gram_GG.diagonal().max())
    if not largest > 0:
        return torch.full_like(gram_GG[0], 1 / goals)
    scaled_GG = gram_GG / largest
    if goals > 3:
        return _wolfe(scaled_GG)
    found: list[Tensor] = list(torch.eye(goals, dtype=gram_GG.dtype))
    for i in range(goals):
        for j in range(i):
            found.append(_edge(scaled_GG, i, j))
    inside = _inside(scaled_GG) if goals == 3 else None
    if inside is not None:
        found.append(inside)
    return min(found, key=lambda w: float(w @ scaled_GG @ w))


def projection_weights(gram_GG: Tensor) -> Tensor:
    """The first goal's gradient without what lies along the others', at its old length (FedOSD).

    d = g_1 - Aᵀ (A Aᵀ)⁺ A g_1, A's rows the other gradients; then d · ||g_1|| / ||d||.

    Args:
        gram_GG: inner products of the goals' gradients, float64; the goal to forget first.
    Returns:
        weights_G; 0 where the others leave nothing of the first.
    """
    weights_G = torch.zeros_like(gram_GG[0])
    weights_G[0] = 1.0
    inverse: Tensor = torch.linalg.pinv(gram_GG[1:, 1:], hermitian=True, rtol=CUT_OFF**2)
    weights_G[1:] = -inverse @ gram_GG[1:, 0]
    before, after = float(gram_GG[0, 0]), float(weights_G @ gram_GG @ weights_G)
    if not after > SINGULAR * before:
        return torch.zeros_like(weights_G)
    return weights_G * math.sqrt(before / after)


def cosines(gram_GG: Tensor) -> Tensor:
    """Cosine of the angle between every two goals' gradients; 0 for a gradient of length 0."""
    length_G = gram_GG.diagonal().clamp_min(0).sqrt()
    product_GG = length_G[:, None] * length_G[None]
    return torch.where(product_GG > 0, gram_GG / product_GG, 0.0).clamp(-1, 1)


def gram_matrix(gradients_G: Sequence[Sequence[Tensor | None]], world: World) -> Tensor:
    """Inner products of whole gradients, float64 on the CPU, the same on every rank.

    Args:
        gradients_G: for each goal a tensor a parameter, whole or sharded alike; None is zero.
    """
    goals = len(gradients_G)
    gram_GG = torch.zeros(goals, goals, dtype=torch.float64, device=world.device)
    for parts in zip(*gradients_G, strict=True):
        local = [None if part is None else _local(part).float() for part in parts]
        for i in range(goals):
            for j in range(i + 1):
                first, second = local[i], local[j]
                if first is not None and second is not None:
                    gram_GG[i, j] += (first * second).sum(dtype=torch.float64)
    if world.mesh is not None:
        # Replicas hold the same shards: they are not counted again.
        dist.all_reduce(gram_GG, group=world.mesh.get_group("shard"))
    return (gram_GG + gram_GG.tril(-1).T).cpu()


class GoalGradients:
    """The gradients of one step's goals, taken from the parameters as each is finished."""

    def __init__(self, model: nn.Module, method: MethodConfig, world: World) -> None:
        self.rule = find_method(method.name).combine
        self.direction, self.world = method.direction, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kept: list[list[Tensor | None]] = []

    def keep(self) -> None:
        """Take away the gradient that has just been finished, where goals are kept apart."""
        if self.rule is not None:
            self.kept.append([p.grad for p in self.parameters])
            for parameter in self.parameters:
                parameter.grad = None

    def combine(self) -> None:
        """Give the parameters the weighted sum; the weights are the one sync of such a step."""
        if self.rule is None:
            return
        weights = self.weights(gram_matrix(self.kept, self.world)).tolist()
        for parameter, *parts in zip(self.parameters, *self.kept, strict=True):
            for weight, part in zip(weights, parts, strict=True):
                if part is None:
                    continue
                term = part.mul_(weight)
                parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)
        self.kept = []

    def weights(self, gram_GG: Tensor) -> Tensor:
        """The rule's weight of each goal.

        A gradient that is no more than rounding is left out: KL to the original model has one at
        the first step, and the shortest combination would be that noise alone.

        Returns:
            weights_G; NaN where a gradient is NaN or inf, so that the step's guard refuses it.
        """
        if self.rule == "ngdiff":
            return ngdiff_combine(gram_GG)
        if self.direction == "projection":
            if not bool(torch.isfinite(gram_GG).all()):
                return torch.full_like(gram_GG[0], math.nan)
            return projection_weights(gram_GG)
        length_G = gram_GG.diagonal().sqrt()
        real_R = (~(length_G <= NEGLIGIBLE * length_G.max())).nonzero()[:, 0]
        weights_G = torch.zeros_like(length_G)
        gram_RR, length_R = gram_GG[real_R][:, real_R], length_G[real_R]
        if not bool(torch.isfinite(gram_RR).all()) or len(real_R) == 0:
            return weights_G if len(real_R) == 0 else torch.full_like(length_G, math.nan)
        if self.direction == "normalized-mgda":
            weights_G[real_R] = mgda_weights(cosines(gram_RR)) / length_R
        else:
            weights_G[real_R] = mgda_weights(gram_RR)
        return weights_G


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _edge(gram_GG: Tensor, i: int, j: int) -> Tensor:
    """The shortest point between two gradients."""
    weights_G = torch.zeros_like(gram_GG[0])
    gap2 = float(gram_GG[i, i] - 2 * gram_GG[i, j] + gram_GG[j, j])
    share = float(gram_GG[j, j] - gram_GG[i, j]) / gap2 if gap2 > SINGULAR else 0.5
    weights_G[i] = min(max(share, 0.0), 1.0)
    weights_G[j] = 1 - weights_G[i]
    return weights_G


def _inside(gram_GG: Tensor) -> Tensor | None:
    """The shortest point of the plane through three gradients, where it lies between them.

    Where the three lie on a line, an edge holds a point as short.
    """
    steps_2G = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]], dtype=gram_GG.dtype)
    plane_22 = steps_2G @ gram_GG @ steps_2G.T
    if not float(torch.linalg.det(plane_22)) > SINGULAR:
        return None
    start_G = torch.tensor([1.0, 0.0, 0.0], dtype=gram_GG.dtype)
    weights_G = start_G + torch.linalg.solve(plane_22, -steps_2G @ gram_GG @ start_G) @ steps_2G
    return weights_G if bool((weights_G >= 0).all()) else None


def _wolfe(gram_GG: Tensor) -> Tensor:
    """Wolfe's shortest point of a polytope: add what shortens most, drop what hinders."""
    goals = gram_GG.shape[0]
    weights_G = torch.zeros_like(gram_GG[0])
    chosen = [int(gram_GG.diagonal().argmin())]
    weights_G[chosen] = 1.0
    for _ in range(10 * goals):
        slope_G = gram_GG @ weights_G
        corner = int(slope_G.argmin())
        if float(slope_G[corner]) >= float(weights_G @ slope_G) - 1e-12 or corner in chosen:
            break
        chosen.append(corner)
        while True:
            target_C = _affine(gram_GG[chosen][:, chosen])
            now_C = weights_G[chosen]
            if bool((target_C > 1e-12).all()):
                weights_G[chosen] = target_C
                break
            falling = target_C <= 1e-12
            reach = now_C[falling] / (now_C[falling] - target_C[falling]).clamp_min(1e-300)
            now_C = now_C + min(1.0, float(reach.min())) * (target_C - now_C)
            kept = [n for n, w in enumerate(now_C.tolist()) if w > 1e-12]
            weights_G.zero_()
            chosen = [chosen[n] for n in kept]
            weights_G[chosen] = now_C[kept]
    return weights_G / weights_G.sum()


def _affine(gram_CC: Tensor) -> Tensor:
    """Weights, of any sign, of the shortest point of the plane through these gradients."""
    ones_C = torch.ones_like(gram_CC[0])
    inverse: Tensor = torch.linalg.pinv(gram_CC + ones_C[:, None] * ones_C, hermitian=True)
    solved_C = inverse @ ones_C
    return solved_C / solved_C.sum()
