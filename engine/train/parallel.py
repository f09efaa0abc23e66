"""Who computes what: process group, device mesh, FSDP2 sharding, weights read shard by shard.

Launched by torchrun, or by anything that sets what it sets, the model is sharded; in a single
process the same code runs unsharded.
"""

from __future__ import annotations

import os
import time
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from unteach.engine.config import ParallelConfig
from unteach.engine.device import pick_device
from unteach.engine.errors import InputError
from unteach.engine.model import DTYPES, PreTrainedModel, blocks
from unteach.engine.train.recompute import checkpoint_blocks

# Rank 0 evaluates while the others wait at a barrier.
WAIT = timedelta(hours=12)
# Gloo's threads outlive the group, for DTensor's caches keep its mesh. A finished process aborted
# once on its way out; a likely cause is one that lets go of the last collective after Python ended.
SETTLE_S = 0.1
LOSS_METHOD = "supervised_loss"
HEAD_METHOD = "enter_head"
WRAPPED = "_checkpoint_wrapped_module."


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


@contextmanager
def joined(device_name: str, replicate: int) -> Iterator[World]:
    """Join the process group that the launcher describes, or stand alone without one.

    Raises:
        InputError: the number of processes is no multiple of `replicate`, the launcher has not
            said all that joining takes, or one of the others has ended early.
    """
    device = pick_device(device_name)
    size = _processes(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in _joining(device) if name not in os.environ]
    if size > 1 and missing:
        raise InputError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} must be set too: start with "
            "torchrun, or have the launcher set them for every process."
        )
    if size % replicate:
        raise InputError(
            f"parallel.replicate is {replicate}, which does not divide {size} processes: start a "
            f"multiple of {replicate}, or set parallel.replicate=1."
        )
    if missing:
        yield World(0, 1, device, None)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Flags, offloaded gradients and asynchronous checkpoints are reduced between hosts.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
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
    except Exception as error:
        if not peer_lost(error):
            raise
        raise InputError(
            "Another process of this run has ended early and may have said why: once that is "
            "mended, the same command goes on."
        ) from error
    finally:
        time.sleep(SETTLE_S)
        dist.destroy_process_group()


def peer_lost(error: BaseException) -> bool:
    """Whether this process waited for another one that has ended."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _processes(text: str) -> int:
    """WORLD_SIZE as a number."""
    if not text.strip().isdecimal() or not int(text):
        raise InputError(
            f"WORLD_SIZE is {text!r}, which is no number of processes: start with torchrun, or "
            "unset it for a single process."
        )
    return int(text)


def _joining(device: torch.device) -> tuple[str, ...]:
    """What torchrun sets and `env://` reads, and where there are several cards, which to take."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    several = device.type == "cuda" and torch.cuda.device_count() > 1
    return (*names, "LOCAL_RANK") if several else names


def check_parallel(config: ParallelConfig, world: World) -> None:
    """Refuse what this device or launcher cannot do, before anything is loaded.

    Raises:
        InputError: CPU offload without CUDA or without FSDP2.
    """
    if config.cpu_offload and world.device.type != "cuda":
        raise InputError(
            "parallel.cpu_offload moves state from a GPU to host memory, and this run is on a CPU, "
            "where all of it already is: set parallel.cpu_offload=false."
        )
    if config.cpu_offload and world.mesh is None:
        raise InputError(
            "parallel.cpu_offload is FSDP2's, which a single process without a launcher does not "
            "use: start with `torchrun --nproc-per-node 1 -m unteach.recipes.cli …`."
        )


def shard_model(model: PreTrainedModel, config: ParallelConfig, world: World) -> None:
    """Activation checkpointing, compilation, one FSDP2 unit per block, the root with the rest.

    An untied embedding and head are units of their own: the head is whole from `enter_head` until
    its gradient is reduced, the embedding while it is looked up. Tied, their one weight belongs to
    the root, which is whole all step. The loss runs as a registered forward method of the root.
    """
    layers = blocks(model)
    checkpoint_blocks(layers, config.checkpointing)
    if config.compile:
        for block in layers:
            block.compile()
    if world.mesh is None:
        return
    compute = forward_dtype(model.dtype, config)
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    for block in layers:
        fully_shard(block, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embedding.weight:
        fully_shard(embedding, **options)
        # FSDP2 warns of writing into what a unit returns as a view; nothing writes into this one.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .FSDPLinear. returned a")
        # The loss reads the weight after this method: it stays whole until the backward pass.
        setattr(head, HEAD_METHOD, types.MethodType(_pass_through, head))
        fully_shard(head, reshard_after_forward=False, **options)
        register_fsdp_forward_method(head, HEAD_METHOD)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, LOSS_METHOD)


def enter_head(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """The same hidden states; from here on the head's weight is whole on this rank."""
    head = model.get_output_embeddings()
    return getattr(head, HEAD_METHOD)(hidden_ND) if hasattr(head, HEAD_METHOD) else hidden_ND


def _pass_through(head: nn.Module, hidden_ND: Tensor) -> Tensor:
    return hidden_ND


def load_shards(
    model: PreTrainedModel, files: Mapping[str, Path], config: ParallelConfig, world: World
) -> None:
    """Give an empty, sharded model its weights: every rank reads its own rows of each tensor.

    A file is closed after each tensor, so that no more of it stays in memory than that.

    Raises:
        InputError: a file cannot be read, or holds a tensor of another shape.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if config.cpu_offload else world.device)
    for prefix, module in model.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            setattr(module, name, buffers[f"{prefix}.{name}"].to(world.device))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        name = name.replace(WRAPPED, "")
        if name not in files:  # an adapter, which has its values from elsewhere
            continue
        try:
            with safe_open(files[name], framework="pt") as tensors, torch.no_grad():
                stored = tensors.get_slice(name)
                if stored.get_shape() != list(parameter.shape):
                    raise SafetensorError(
                        f"{name} is {stored.get_shape()} and not {list(parameter.shape)}"
                    )
                parameter.to_local().copy_(stored[own_rows(parameter)])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{files[name]} cannot be loaded: {error}.") from error


def forward_dtype(weights: torch.dtype, config: ParallelConfig) -> torch.dtype:
    """What the forward computes in on any number of ranks: never wider than the weights."""
    return DTYPES[config.dtype] if weights == torch.float32 else weights


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


def own_rows(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of a sharded parameter lies on this rank; all of it where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank; writing to it writes to the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
