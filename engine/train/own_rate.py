"""A learning rate that finds itself: GeN's parabola through the loss at three points of a step.

L(θ - xη d) ~ L0 - b x + a x²/2 along the optimiser's own direction d; the best rate is η b/a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from unteach.engine.config import Config
from unteach.engine.data.sampler import rank_batches
from unteach.engine.model import Head, PreTrainedModel
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.methods import find_method
from unteach.engine.train.parallel import LOSS_METHOD, World, compute_dtype
from unteach.engine.train.supervise import Part, micro_batch

SMOOTHING = 0.9
KEY = "own_rate"  # in the optimiser's groups, so that checkpoints hold it


def best_rate(rate: float, ahead: float, here: float, behind: float) -> float:
    """The rate at the bottom of the parabola: exact where the loss is quadratic along d.

    η* = (η/2) · (L₊ - L₋) / (L₊ - 2 L₀ + L₋)

    Args:
        ahead: L₋, the loss after the step, at θ - η d.
        here: L₀, before it.
        behind: L₊, at θ + η d.
    """
    return rate / 2 * (behind - ahead) / (behind - 2 * here + ahead)


def next_rate(rate: float, ahead: float, here: float, behind: float) -> float:
    """GeN's guarded move towards `best_rate`.

    Kept as it is where the loss has no bottom in this direction (a <= 0 or b <= 0); halved where
    it is not finite; else drawn a tenth of the way to the best, held within half and double.
    """
    if not all(math.isfinite(loss) for loss in (ahead, here, behind)):
        return rate / 2
    curvature, descent = behind - 2 * here + ahead, (behind - ahead) / 2
    if not (curvature > 0 and descent > 0):
        return rate
    best = min(max(best_rate(rate, ahead, here, behind), rate / 2), 2 * rate)
    return SMOOTHING * rate + (1 - SMOOTHING) * best


class OwnRate:
    """The factor of the scheduled rate, adapted every few steps; 1 for methods without it."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        head: Head,
        cache: TeacherCache | None,
        world: World,
    ) -> None:
        adapts = find_method(config.method.name).own_rate
        self.every = config.method.own_rate_every if adapts else None
        self.config, self.model, self.optimizer = config, model, optimizer
        self.head, self.cache, self.world = head, cache, world
        if self.every is not None:
            for group in optimizer.param_groups:
                group[KEY] = 1.0

    @property
    def factor(self) -> float:
        """What the scheduled rate is multiplied by."""
        return float(self.optimizer.param_groups[0].get(KEY, 1.0))

    def step(self, number: int, kept: Part) -> None:
        """The optimiser's step; where a probe is due, with the loss before, after and behind it.

        The probe moves parameters only: the optimiser's state is that of a step without one, and
        the parameters end where the step has put them, bit for bit. Memory: two copies of the
        trainable parameters while it lasts.

        Args:
            kept: the part of the loss that the rate is fitted to.
        """
        if self.every is None or number % self.every:
            self.optimizer.step()
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        here = self._loss(kept)
        before = [p.detach().clone() for p in parameters]
        self.optimizer.step()
        ahead = self._loss(kept)
        after = [p.detach().clone() for p in parameters]
        for b, a in zip(before, after, strict=True):
            b.mul_(2).sub_(a)  # in place: a third copy would be the fullest moment of a step
        _set(parameters, before)
        behind = self._loss(kept)
        _set(parameters, after)
        factor = next_rate(self.factor, ahead, here, behind)
        for group in self.optimizer.param_groups:
            group[KEY] = factor

    @torch.no_grad()
    def _loss(self, part: Part) -> float:
        """The loss of a part over all ranks, nothing kept of it."""
        method, world = self.config.method, self.world
        total = torch.zeros((), device=world.device)
        accumulation = self.config.optim.accumulation
        for chosen in rank_batches(part.examples, world.rank, world.size, accumulation):
            batch = micro_batch(chosen, part, self.config).to(world.device)
            with compute_dtype(self.config.parallel, world):
                output = getattr(self.model, LOSS_METHOD)(
                    batch, part, method, self.head, self.cache, None, float(bool(chosen))
                )
            total += output.loss
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a root stays whole after a forward that no backward follows
        return float(world.reduced(total))


@torch.no_grad()
def _set(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
