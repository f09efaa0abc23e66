"""Low-rank adapters: y = x·Wᵀ + (α/r)·x·Aᵀ·Bᵀ with W frozen (LoRA, arXiv 2106.09685, Eq. 3).

r·(in + out) values of a linear layer train in place of in·out, so gradients and AdamW state all but
vanish; activations do not. A and B are parameters of the layer itself: sharding, recomputation and
checkpoints treat them like any other, and the export holds W + (α/r)·B·A under W's own name.
"""

from __future__ import annotations

import hashlib
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unteach.engine.config import OptimConfig
from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedModel, blocks
from unteach.engine.train.lean_adamw import add_on_average
from unteach.engine.train.parallel import WRAPPED, local, own_rows, whole

ADAPTERS = ("lora_A", "lora_B")


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank term beside its frozen weight.

    Attributes:
        lora_A: [r, in], random at first.
        lora_B: [out, r], zero at first, so that training begins at the base model.
        lora_scale: α/r.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        low = F.linear(input, self.lora_A) * self.lora_scale
        return super().forward(input) + F.linear(low, self.lora_B)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one that no model file has."""
    return name.rpartition(".")[2] in ADAPTERS


def add_adapters(model: PreTrainedModel, config: OptimConfig) -> list[str]:
    """Give each block's linear layers that `optim.trainable` matches A and B, without values yet.

    All else is frozen: norms, embedding and head have no adapters.

    Returns:
        The names that train.
    Raises:
        InputError: the pattern matches no linear layer of a block.
    """
    assert config.lora_rank is not None
    model.requires_grad_(False)
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    trainable = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or id(module) not in inside:
            continue
        if re.fullmatch(config.trainable, f"{name}.weight"):
            _adapt(module, config.lora_rank, config.lora_alpha / config.lora_rank)
            trainable += [f"{name}.{part}" for part in ADAPTERS]
    if not trainable:
        raise InputError(
            f"optim.trainable {config.trainable!r} matches no linear layer of a block, and "
            "optim.lora_rank adapts no other: set optim.trainable='.*'."
        )
    return trainable


def _adapt(layer: nn.Linear, rank: int, scale: float) -> None:
    layer.__class__ = AdaptedLinear
    assert isinstance(layer, AdaptedLinear)
    layer.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
    layer.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, rank))
    layer.lora_scale = scale


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted layer, by a name that no wrapper of ours changes."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    return {name.replace(WRAPPED, ""): m for name, m in layers.items()}


@torch.no_grad()
def reset_adapters(model: nn.Module, seed: int) -> None:
    """A uniform in ±1/√in, B zero: a function of seed and name alone, on any number of ranks."""
    for name, layer in adapted_layers(model).items():
        key = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        bound = layer.in_features**-0.5
        drawn = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        local(layer.lora_A).copy_(drawn[own_rows(layer.lora_A)])
        local(layer.lora_B).zero_()


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add (α/r)·B·A to each frozen weight and set B to zero: the outputs stay.

    A bf16 weight is rounded stochastically: to nearest, all that is smaller than half a unit in the
    last place would go, most of what a small learning rate has learned. Sharded, a rank needs all
    of A and its own rows of B alone.
    """
    for number, layer in enumerate(adapted_layers(model).values()):
        own_B = local(layer.lora_B)
        low = own_B.float() @ whole(layer.lora_A).float()
        add_on_average(layer.weight, layer.lora_scale * low, number)
        own_B.zero_()
