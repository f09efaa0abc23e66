"""The Triton backend: its kernels in the interpreter, and their compilation without a GPU.

Both need a process of their own: whether a kernel is interpreted is settled when it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unteach.kernels.bitopk import SparseTeacher, bitopk_loss
from unteach.kernels.checks import choose_backend
from unteach.kernels.gather_linear import gather_linear
from unteach.kernels.linear_kl import linear_kl
from unteach.kernels.linear_logprob import linear_logprob
from unteach.kernels.linear_topk import linear_topk
from unteach.kernels.triton_launch import (
    ARCHITECTURES,
    extract_tile,
    have_triton,
    kept_width,
    split_count,
)

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
H, W, IDS = torch.zeros(2, 8), torch.zeros(50, 8), torch.zeros(2, 6).long()

needs_triton = pytest.mark.skipif(not have_triton(), reason="triton is not installed")


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
@pytest.mark.parametrize("path", sorted(HERE.glob("interpreted_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    done = process("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout


@needs_triton
def test_one_build_of_each_kernel_and_architecture() -> None:
    done = process("-m", "unteach.benchmarks.aot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{11 * len(ARCHITECTURES)} passed, 0 failed"


@needs_triton
def test_builds_refuse_the_interpreter() -> None:
    done = process("-m", "unteach.benchmarks.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_import_without_triton() -> None:
    """The ops work where triton cannot be imported, and say so when it is asked for."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from unteach.kernels.bitopk import SparseTeacher, bitopk_loss
from unteach.kernels import triton_launch
triton_launch._installed = lambda: False
h, w = torch.zeros(2, 8), torch.zeros(50, 8)
teacher = SparseTeacher(torch.zeros(2, 6).long(), torch.zeros(2, 6))
print(float(bitopk_loss(h, w, teacher, k=5).loss))
try:
    bitopk_loss(h, w, teacher, k=5, backend="triton")
except ValueError as error:
    print(error)
"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed; 'torch' can" in done.stdout


def test_ops_without_kernels_say_so() -> None:
    with pytest.raises(ValueError, match=r"linear_logprob has no kernels.*'torch' can"):
        linear_logprob(H, W, IDS[:, 0], backend="triton")
    with pytest.raises(ValueError, match=r"linear_kl has no kernels.*'torch' can"):
        linear_kl(H, W, H, W, backend="triton")


@pytest.mark.parametrize(
    "op",
    [
        lambda: linear_topk(H, W, 3, backend="triton"),
        lambda: gather_linear(H, W, IDS, backend="triton"),
        lambda: bitopk_loss(H, W, SparseTeacher(IDS, IDS.float()), k=5, backend="triton"),
    ],
)
@needs_triton
def test_tensors_on_a_cpu_need_the_interpreter(op: Any) -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot serve.*CUDA device.*'torch' can"):
        op()


def test_auto_takes_torch_on_a_cpu() -> None:
    assert choose_backend("auto", H) == "torch"
    assert choose_backend("torch", H) == "torch"


def test_tables_have_a_configuration_for_every_k() -> None:
    for architecture in ("interpreter", *ARCHITECTURES):
        for k in range(1, 129):
            kept = kept_width(k)
            assert kept >= max(16, 2 * k)
            assert kept & (kept - 1) == 0
            tile = extract_tile(architecture, kept)
            assert min(tile.block_n, tile.block_v, tile.depth(4)) >= 16
    for blocks in (0, 1, 64, 10_000):
        for tiles in (1, 3, 1000):
            splits = split_count(blocks, tiles)
            assert splits & (splits - 1) == 0
            assert 1 <= splits <= min(16, tiles)
