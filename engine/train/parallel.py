"""Who computes what: process group, device mesh, FSDP2 sharding and activation checkpointing.

Launched by torchrun the model is sharded; in a single process the same code runs unsharded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from unteach.engine.config import ParallelConfig
from unteach.engine.errors import InputError
from unteach.engine.model import DTYPES, PreTrainedModel, blocks

# Rank 0 evaluates while the others wait at a barrier.
WAIT = timedelta(hours=12)
LOSS_METHOD = "supervised_loss"


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        mesh: replicate × shard dimensions; None in a single process.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    def reduced(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; the input is left alone."""
        if self.mesh is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.mesh is not None:
            dist.barrier()


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one, and this rank's own card under torchrun."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"run.device is {name}: choose auto, cpu or cuda.")
    if name == "cpu" or not torch.cuda.is_available():
        if name == "cuda":
            raise InputError("run.device is cuda, but torch sees no CUDA device: set it to auto.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device_name: str, replicate: int) -> Iterator[World]:
    """Join the process group that torchrun describes, or stand alone without one.

    Raises:
        InputError: the number of processes is no multiple of `replicate`.
    """
    device = pick_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % replicate:
        raise InputError(
            f"parallel.replicate is {replicate}, which does not divide {size} processes: start a "
            f"multiple of {replicate}, or set parallel.replicate=1."
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(0, 1, device, None)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        mesh = (
            init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
            if replicate == 1
            else init_device_mesh(
                device.type,
                (replicate, size // replicate),
                mesh_dim_names=("replicate", "shard"),
            )
        )
        yield World(dist.get_rank(), size, device, mesh)
    finally:
        dist.destroy_process_group()


def shard_model(model: PreTrainedModel, config: ParallelConfig, world: World) -> None:
    """Activation checkpointing, then one FSDP2 unit per block, then the root with what is left.

    The loss runs as a registered forward method of the root, so that embedding and head are whole
    exactly while it needs them.
    """
    layers = blocks(model)
    every = {"off": 0, "full": 1}.get(str(config.checkpointing), config.checkpointing)
    assert isinstance(every, int)
    for index in range(len(layers)):
        if every and index % every == 0:
            layers[index] = checkpoint_wrapper(layers[index])
    if world.mesh is None:
        return
    dtype = DTYPES[config.dtype]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in layers:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, LOSS_METHOD)


@contextmanager
def compute_dtype(config: ParallelConfig, world: World) -> Iterator[None]:
    """Autocast in a single process; under FSDP2 its mixed precision policy does the casting."""
    enabled = world.mesh is None and config.dtype == "bfloat16"
    with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=enabled):
        yield


def sync_gradients(model: nn.Module, world: World, *, last: bool) -> None:
    """Reduce gradients over ranks on the last micro-batch of a step only."""
    if world.mesh is not None:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
