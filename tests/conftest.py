"""Seeds, uninitialised memory made visible, and GPU tests skipped and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

EMPTY = torch.empty
EMPTY_LIKE = torch.empty_like


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or the largest integer, wherever nothing has been written yet."""
    if tensor.is_meta:
        return tensor
    plain = tensor.detach()  # a leaf that wants gradients takes nothing in place
    if tensor.is_floating_point():
        plain.fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64):
        plain.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel forgets to write cannot pass for zero."""

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        return poisoned(EMPTY(*size, **options))

    def empty_like(like: torch.Tensor, **options: Any) -> torch.Tensor:
        return poisoned(EMPTY_LIKE(like, **options))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # Two spinning OpenMP teams on shared cores are slower than one thread each.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, needed in (("gpu", 1), ("distributed", 2)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "CUDA" in str(r.longrepr)]
    terminalreporter.write_line(f"{len(skipped)} GPU tests skipped")
