"""What every benchmark shares: time, memory, rows as JSON lines, a clean process a measurement."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unteach.engine.checkout import checkout_commit

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# More than the last-level cache of any GPU in use (H200: 50 MB, B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
SHORT_COMMIT = 7  # characters of a commit that name it
MMAP_THRESHOLD = 2**20  # bytes; from this size on glibc maps a block, and unmaps it when freed

Step = Callable[[], tuple[Tensor, ...]]


def versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The card, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_process(module: str, arguments: list[str]) -> dict[str, Any]:
    """Run a measurement in a process of its own; its last line of output is a JSON object.

    Its allocator hands large tensors back as they are freed: resident memory follows the tensors,
    not what glibc keeps of them for later.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"skipped": reason}
    row = json.loads(lines[-1])
    assert isinstance(row, dict)
    return {**row, "mmap_threshold": MMAP_THRESHOLD}


def interleaved_ms(
    steps: Mapping[str, Step], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time every step once a round, in a new order each round; what a step returns is dropped.

    A GPU is timed by events behind a write that empties its L2; a CPU by the clock.
    """
    names = list(steps)
    flush = None
    if device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        turn = index % max(len(names), 1)
        for name in (*names[turn:], *names[:turn]):
            times[name].append(_once_ms(steps[name], flush))
    return times


def _once_ms(step: Step, flush: Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and best, milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
    return {
        "median_ms": statistics.median(times),
        "p20_ms": fifths[0],
        "p80_ms": fifths[-1],
        "min_ms": min(times),
    }


def extra_mib(step: Step, device: torch.device, kept_bytes: int = 0) -> float:
    """Peak memory of one step beside its inputs and what it hands back (loss and gradients).

    On a GPU what lies allocated before the step counts as input, less `kept_bytes`: workspaces that
    a provider keeps from step to step. On a CPU it is the running sum of the profiler's
    allocations, which sees every tensor and no workspace of a BLAS library.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before + kept_bytes
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            kept = step()
        peak = _peak_of(profile)
    handed_back = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in kept}
    return (peak - sum(storage.nbytes() for storage in handed_back.values())) / 2**20


def _peak_of(profile: torch.profiler.profile) -> int:
    """Largest running sum of what was allocated less what was freed, in order of time."""
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def allocated_bytes(device: torch.device) -> int:
    """What tensors on a GPU take; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def append_rows(
    name: str, rows: list[dict[str, Any]], device: torch.device, folder: Path = RESULTS
) -> Path:
    """Add rows to <folder>/<name>.jsonl, each with device, versions and commit."""
    common = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": (checkout_commit() or "")[:SHORT_COMMIT] or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"benchmark": name, **row, **common}) + "\n")
    return path
