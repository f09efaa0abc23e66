"""Exact top-K of hidden · headᵀ, forward only, beside torch.topk over full logits and over chunks.

`mm` is the product alone: what a search adds to it is the price of the selection.

python -m unteach.benchmarks.bench_linear_topk --preset smollm2-135m --tokens 512 --k 32
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from unteach.benchmarks.comparison import Make, Path, Provider
from unteach.benchmarks.exact import topk_errors_of
from unteach.benchmarks.harness import Step
from unteach.benchmarks.presets import Case
from unteach.benchmarks.providers import CHUNK_ROWS, our_dense_pass
from unteach.benchmarks.roofline import Sizes, Stage, product, topk_path
from unteach.benchmarks.sweep import run
from unteach.kernels.linear_topk import linear_topk


def _unteach(case: Case, *, seeds: bool, backend: str) -> Step:
    given = case.hidden_ND.detach(), case.head_VD.detach(), case.k
    seeds_NS = case.seeds_NS if seeds else None
    return lambda: linear_topk(*given, seeds_NS=seeds_NS, backend=backend)


def _torch(case: Case, *, chunk_rows: int | None) -> Step:
    hidden, head = case.hidden_ND.detach(), case.head_VD.detach()

    def step() -> tuple[Tensor, ...]:
        blocks = hidden.split(chunk_rows or max(len(hidden), 1))
        found = [(block @ head.t()).topk(case.k, dim=1) for block in blocks]
        return torch.cat([each.values for each in found]), torch.cat(
            [each.indices for each in found]
        )

    return step


def _product(case: Case) -> Step:
    hidden, head = case.hidden_ND.detach(), case.head_VD.detach()
    return lambda: (hidden @ head.t(),)


def _read_once(sizes: Sizes) -> list[Stage]:
    return [*product(sizes), Stage(0, sizes.rows * sizes.vocab * sizes.item)]


def providers(device: torch.device, backend: str = "auto") -> dict[str, Provider]:
    """Every provider by name, ours on the given backend."""

    def named(dense_pass: str, make: Make, path: Path) -> Provider:
        return Provider("top-K", dense_pass, make, path, topk_errors_of)

    def ours(seeds: bool) -> Provider:
        make = partial(_unteach, seeds=seeds, backend=backend)
        dense_pass = our_dense_pass(backend, device, seeds=seeds)
        return named(dense_pass, make, partial(topk_path, seeds=seeds))

    in_chunks = f"chunks of {CHUNK_ROWS} rows"
    return {
        "unteach": ours(seeds=True),
        "unteach-noseeds": ours(seeds=False),
        "torch": named("logits in memory", partial(_torch, chunk_rows=None), _read_once),
        "chunked": named(in_chunks, partial(_torch, chunk_rows=CHUNK_ROWS), _read_once),
        "mm": Provider("the product alone", "logits in memory", _product, product),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows."""
    run("bench_linear_topk", __doc__, providers, argv)


if __name__ == "__main__":
    main()
