"""The command line of a kernel's benchmark: one comparison for every combination of the lists."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from unteach.benchmarks.comparison import Provider, measure, table
from unteach.benchmarks.harness import RESULTS, append_rows
from unteach.benchmarks.presets import PRESETS, SYNTHETIC, Case, make_case
from unteach.benchmarks.roofline import peaks_of

Providers = Callable[[torch.device, str], dict[str, Provider]]


def numbers(text: str) -> list[int]:
    """A comma list of whole numbers."""
    return [int(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    """A comma list of numbers from 0 to 1."""
    found = [float(part) for part in text.split(",")]
    if not all(0 <= share <= 1 for share in found):
        raise ValueError(text)
    return found


def arguments(about: str, providers: Providers, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="smollm2-135m")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--tokens", type=numbers, default=[512], help="comma list")
    add("--k", type=numbers, default=[32], help="comma list")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="cpu: float32, cuda: bfloat16")
    add("--inputs", default="gaussian", help="comma list of gaussian, zipf, or a file")
    add("--overlap", type=shares, default=[0.6], help="comma list: share of top K in both sets")
    add("--drift", type=float, default=0.5, help="logits the student moved since its seeds")
    add("--rounds", type=int, help="cpu: 9, cuda: 25")
    add("--threads", type=int, default=1)
    add("--providers", help="comma list; all without it")
    add("--backend", default="auto", help="of our own kernels")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--save-hidden", type=Path, help="write real hidden states to this file, and stop")
    add("--rows", type=int, default=1024, help="how many of them")
    options = parser.parse_args(argv)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.rounds = options.rounds or (25 if gpu else 9)
    try:
        known = providers(torch.device(options.device), options.backend)
    except ValueError as error:
        parser.error(str(error))
    names = options.providers.split(",") if options.providers else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--providers: no {unknown[0]}; there are {', '.join(known)}")
    options.providers = {name: known[name] for name in names}
    return options


def run(name: str, about: str, providers: Providers, argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows to <results>/<name>.jsonl."""
    options = arguments(about, providers, argv)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler prints two lines a use
    if options.save_hidden:
        from unteach.benchmarks.real_hidden import save_hidden

        print(save_hidden(options.save_hidden, options.rows))
        return
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    peaks = peaks_of(device, dtype)
    common = {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": options.rounds,
        "peak_tflops": peaks.flops_per_s and peaks.flops_per_s / 1e12,
        "peak_gb_per_s": peaks.bytes_per_s and peaks.bytes_per_s / 1e9,
    }
    lists = options.inputs.split(","), options.overlap, options.tokens, options.k
    for inputs, overlap, tokens, k in itertools.product(*lists):
        about_case, case = _case(options, inputs, overlap, tokens, k)
        rows = measure(case, options.providers, rounds=options.rounds, peaks=peaks)
        print("\n" + ", ".join(f"{key} {value}" for key, value in about_case.items()))
        print(table(rows), flush=True)
        rows = [{**about_case, **row, **common} for row in rows]
        path = append_rows(name, rows, device, options.results)
        print(f"appended to {path}")


def _case(
    options: argparse.Namespace, inputs: str, overlap: float, tokens: int, k: int
) -> tuple[dict[str, str | int | float], Case]:
    """What a row says of the case, and the case."""
    try:
        case = make_case(
            PRESETS[options.preset],
            tokens=tokens,
            k=k,
            dtype=getattr(torch, options.dtype),
            device=torch.device(options.device),
            inputs=inputs,
            overlap=overlap,
            drift=options.drift,
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    return {
        "preset": options.preset,
        "tokens": tokens,
        "k": k,
        "dtype": options.dtype,
        "inputs": inputs if inputs in SYNTHETIC else f"real ({Path(inputs).stem})",
        "overlap": round(case.sizes.overlap, 3),
        "drift": options.drift,
    }, case
