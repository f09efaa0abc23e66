"""Heads and inputs that kernels are measured on: shapes of known models, Gaussian, Zipf or real.

A case is one problem: the student's hidden states and head (both leaves that want gradients), a
cached teacher with its top 2K ids, and the seeds that a training loop would have at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from unteach.benchmarks.roofline import Sizes
from unteach.kernels.bitopk import HiddenTeacher
from unteach.kernels.linear_topk import linear_topk

SYNTHETIC = ("gaussian", "zipf")
# Standard deviation of a synthetic row's logits.
SPREAD = 2.5
# How many logits the most frequent id of Zipf-like inputs stands above the rarest.
SKEW = 10.0
# Rows on which the teacher's distance is tuned to the wanted overlap.
TUNING_ROWS = 32


@dataclass(frozen=True)
class Preset:
    """A head: V token ids, width D, and the model's soft cap where it has one."""

    vocab: int
    width: int
    softcap: float | None = None


PRESETS = {
    "llama-3.2-3b": Preset(128256, 3072),
    "llama-3.2-1b": Preset(128256, 2048),
    "qwen2.5-3b": Preset(151936, 2048),
    "gemma-2-2b": Preset(256000, 2304, softcap=30.0),
    "smollm2-135m": Preset(49152, 576),
    "tiny": Preset(1003, 24, softcap=30.0),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One problem, on one device, in one dtype.

    Attributes:
        teacher: hidden states, a head of its own, top 2K ids and final logits, as a cache has them.
        seeds_NS: the student's top 2K ids before it drifted.
        labels_N: the teacher's first choice, for the losses that want a label.
        sizes: what the roofline counts; its `overlap` is measured.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    teacher: HiddenTeacher
    seeds_NS: Tensor
    labels_N: Tensor
    k: int
    softcap: float | None
    sizes: Sizes

    def first_rows(self, count: int) -> Case:
        """The same case with fewer rows."""
        rows = slice(0, count)
        ids_NM, logits_NM = self.teacher.ids_NM, self.teacher.logits_NM
        assert ids_NM is not None and logits_NM is not None
        teacher = HiddenTeacher(
            self.teacher.hidden_NE[rows], self.teacher.head_VE, ids_NM[rows], logits_NM[rows]
        )
        return replace(
            self,
            hidden_ND=self.hidden_ND.detach()[rows].clone().requires_grad_(),
            teacher=teacher,
            seeds_NS=self.seeds_NS[rows],
            labels_N=self.labels_N[rows],
        )


def make_case(
    preset: Preset,
    *,
    tokens: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    inputs: str = "gaussian",
    overlap: float = 0.6,
    drift: float = 0.5,
) -> Case:
    """Draw or read a case; the same arguments give the same numbers.

    Args:
        inputs: `gaussian`, `zipf`, or a safetensors file with student_hidden, teacher_hidden, head.
        overlap: share of the student's top K that the teacher's holds too, for synthetic inputs.
        drift: how far, in logits (standard deviation), the student moved since the seeds were kept.
    Raises:
        ValueError: a file that does not fit the preset or has too few rows.
    """
    generator = torch.Generator(device).manual_seed(0)
    if inputs in SYNTHETIC:
        hidden, head = _synthetic(preset, tokens, inputs, generator)
        noise = _normal(hidden.shape, generator)
        taught = hidden + _tuned(hidden, noise, head, k, overlap) * noise
    else:
        hidden, taught, head = _from_file(Path(inputs), preset, tokens, device)
    hidden, taught, head = (x.to(dtype) for x in (hidden, taught, head))
    count = min(2 * k, preset.vocab)
    # a head of its own, as training has one: the student's moves on
    head_VE = head.clone()
    logits_NM, ids_NM = linear_topk(taught, head_VE, count, softcap=preset.softcap)
    per_unit = head.float().norm(dim=1).mean()
    old = hidden + (drift / per_unit * _normal(hidden.shape, generator)).to(dtype)
    _, seeds_NS = linear_topk(old, head, count)
    _, student_NK = linear_topk(hidden, head, k)
    return Case(
        hidden_ND=hidden.requires_grad_(),
        head_VD=head.requires_grad_(),
        teacher=HiddenTeacher(taught, head_VE, ids_NM, logits_NM),
        seeds_NS=seeds_NS.to(torch.int32),
        labels_N=ids_NM[:, 0].contiguous(),
        k=k,
        softcap=preset.softcap,
        sizes=_sizes(preset, dtype, student_NK, ids_NM),
    )


def _synthetic(
    preset: Preset, tokens: int, inputs: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden states of unit variance, and a head that gives logits of SPREAD.

    Zipf-like: every hidden state shares a direction along which the head stores the logarithm of
    an id's frequency, so that few ids are hot in all rows.
    """
    vocab, width = preset.vocab, preset.width
    hidden = _normal((tokens, width), generator)
    head = _normal((vocab, width), generator).mul_(SPREAD / math.sqrt(width))
    if inputs == "zipf":
        common = _normal((width,), generator)
        common /= common.norm()
        rank = torch.randperm(vocab, generator=generator, device=generator.device)
        rarity = (rank + 1).log() / math.log(vocab)
        hidden += math.sqrt(width) * common
        head -= torch.outer(rarity * (SKEW / math.sqrt(width)), common)
    return hidden, head


def _tuned(hidden: Tensor, noise: Tensor, head: Tensor, k: int, overlap: float) -> float:
    """How much noise leaves the wanted share of the top K in place; more noise leaves less."""
    few, noise = hidden[:TUNING_ROWS], noise[:TUNING_ROWS]
    own = (few @ head.t()).topk(k, dim=1).indices
    low, high = 0.0, 8.0
    for _ in range(10):
        middle = (low + high) / 2
        other = ((few + middle * noise) @ head.t()).topk(k, dim=1).indices
        low, high = (middle, high) if _shared(own, other) > overlap else (low, middle)
    return (low + high) / 2


def _from_file(
    path: Path, preset: Preset, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    stored = load_file(path)
    hidden, taught, head = (stored[x] for x in ("student_hidden", "teacher_hidden", "head"))
    if tuple(head.shape) != (preset.vocab, preset.width):
        raise ValueError(
            f"{path.name} holds a head of shape {tuple(head.shape)}, expected "
            f"({preset.vocab}, {preset.width}): choose its preset"
        )
    if len(hidden) < tokens:
        raise ValueError(f"{path.name} holds {len(hidden)} rows, fewer than --tokens {tokens}")
    # rows of a record stand together: draw from all records
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:tokens]
    return hidden[order].to(device), taught[order].to(device), head.to(device)


def _sizes(preset: Preset, dtype: torch.dtype, student_NK: Tensor, listed_NM: Tensor) -> Sizes:
    """Count what a perfect program must gather for these rows."""
    rows, k = student_NK.shape
    shared = _shared(student_NK, listed_NM[:, :k])
    return Sizes(
        rows=rows,
        vocab=preset.vocab,
        width=preset.width,
        item=dtype.itemsize,
        k=k,
        seeds=listed_NM.shape[1],
        union=2 * k - shared * k,
        unlisted=k - _shared(student_NK, listed_NM) * k,
        overlap=shared,
    )


def _shared(ids_NK: Tensor, other_NM: Tensor) -> float:
    """Mean share of the first ids that stand among the second."""
    found = [
        (mine[:, :, None] == theirs[:, None, :]).any(2).float().mean(1)
        for mine, theirs in _slices(ids_NK, other_NM)
    ]
    return float(torch.cat(found).mean())


def _slices(ids_NK: Tensor, other_NM: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(ids_NK.split(512), other_NM.split(512), strict=True)


def _normal(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
