"""What every benchmark shares: rows as JSON lines, versions, a clean process a measurement."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, None outside a checkout."""
    here = str(Path(__file__).resolve().parent)
    done = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


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
    """Run a measurement in a process of its own; its last line of output is a JSON object."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"skipped": reason}
    row = json.loads(lines[-1])
    assert isinstance(row, dict)
    return row


def append_rows(name: str, rows: list[dict[str, Any]], device: torch.device) -> Path:
    """Add rows to results/<name>.jsonl, each with device, versions and commit."""
    common = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"benchmark": name, **row, **common}) + "\n")
    return path
