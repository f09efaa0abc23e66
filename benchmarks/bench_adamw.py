"""One optimiser update of a large tensor, ours beside torch's fused AdamW.

`unteach` rounds bf16 parameters and moments stochastically, as `optim.state` says; `torch-bfloat16`
keeps them in bf16 too but rounds to nearest, which loses small updates; `torch-float32` needs twice
the memory. The floor is every tensor read once, all but the gradient written once.

    python -m unteach.benchmarks.bench_adamw --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unteach.benchmarks.harness import RESULTS, Step, append_rows, interleaved_ms, spread
from unteach.benchmarks.roofline import peaks_of
from unteach.engine.train.lean_adamw import LeanAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}


def _step(
    elements: int, device: torch.device, dtype: torch.dtype, state: torch.dtype | None
) -> Step:
    """`state` None: torch's own, with moments of the parameters' dtype."""
    torch.manual_seed(0)
    parameter = torch.randn(elements, device=device, dtype=dtype).requires_grad_()
    parameter.grad = torch.randn_like(parameter)
    optimizer: torch.optim.Optimizer
    if state is None:
        optimizer = torch.optim.AdamW([parameter], **OPTIONS, fused=True)
    else:
        optimizer = LeanAdamW([{"params": [parameter]}], **OPTIONS, state_dtype=state, seed=0)

    def step() -> tuple[torch.Tensor, ...]:
        optimizer.step()
        return ()

    return step


# name → dtype of parameters, dtype of moments (None: torch's), bytes an element at least
BF16, FP32 = torch.bfloat16, torch.float32
PROVIDERS = {
    "unteach": (BF16, BF16, 14),
    "unteach-float32-moments": (BF16, FP32, 22),
    "torch-bfloat16": (BF16, None, 14),
    "torch-float32": (FP32, None, 28),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every provider in turns, print a line each, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, help="cpu: 4 million, cuda: 400 million")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    elements = options.elements or (400_000_000 if options.device == "cuda" else 4_000_000)
    make = partial(_step, elements, device)
    steps = {name: make(dtype, state) for name, (dtype, state, _) in PROVIDERS.items()}
    interleaved_ms(steps, 2, device)  # first steps allocate, and compile kernels
    times = interleaved_ms(steps, options.rounds, device)
    bandwidth = peaks_of(device, BF16).bytes_per_s
    rows = []
    for name, (_, _, size) in PROVIDERS.items():
        taken = spread(times[name])
        floor_ms = 1e3 * size * elements / bandwidth if bandwidth else None
        about = {"provider": name, "elements": elements, "rounds": options.rounds}
        rows.append({**about, **taken, "floor_ms": floor_ms})
        floor = f"{floor_ms / taken['median_ms']:.0%} of the floor's speed" if floor_ms else ""
        print(f"{name:<24}{taken['median_ms']:>10.2f} ms  {floor}".rstrip())
    print(f"appended to {append_rows('bench_adamw', rows, device, options.results)}")


if __name__ == "__main__":
    main()
