"""The optimiser's kernel against its equations and torch's operations; TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unteach.engine.train import lean_adamw
from unteach.engine.train.lean_adamw import LeanAdamW, _salt, noise
from unteach.kernels.adamw_triton import adamw_triton
from unteach.kernels.triton_launch import ADAMW_BLOCK

SIZES = (1, ADAMW_BLOCK - 1, ADAMW_BLOCK, 2 * ADAMW_BLOCK + 5)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser takes the kernel, as it does where its tensors are on a GPU."""
    monkeypatch.setattr(lean_adamw, "choose_backend", lambda *_: "triton")


def trained(
    steps: range, dtype: torch.dtype, state: torch.dtype, *, size: int = SIZES[-1], lr: float = 0.01
) -> tuple[LeanAdamW, Tensor]:
    torch.manual_seed(0)
    parameter = torch.randn(size).to(dtype).requires_grad_()
    options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "state_dtype": state, "seed": 5}
    lean = LeanAdamW([{"params": [parameter], "weight_decay": 0.5}], **options)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(size, generator=generator).to(dtype)
        lean.step()
    return lean, parameter.detach()


def tensors_of(lean: LeanAdamW, parameter: Tensor) -> list[Tensor]:
    (state,) = lean.state.values()
    return [parameter, state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_adamw_by_its_formula(size: int) -> None:
    torch.manual_seed(0)
    p, m, v = torch.randn(size).double(), torch.zeros(size).double(), torch.zeros(size).double()
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(step)
        g = torch.randn(size, generator=generator).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        down = (v / (1 - 0.999**step)).sqrt() + 1e-8
        p = p * (1 - 0.01 * 0.5) - 0.01 * m / (1 - 0.9**step) / down
    lean, got = trained(range(1, 5), FP32, FP32, size=size)
    for one, wanted in zip(tensors_of(lean, got), (p, m, v), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.usefixtures("by_kernel")
def test_without_memory_a_small_gradient_behind_a_large_one_counts() -> None:
    """β = 0: both moments are the gradient's own, so each step is lr, whatever came before."""
    parameter = torch.zeros(3, requires_grad=True)
    options = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 1e-12, "state_dtype": FP32, "seed": 5}
    lean = LeanAdamW([{"params": [parameter], "weight_decay": 0.0}], **options)
    for g in (1.0, 1e-4):
        parameter.grad = torch.full((3,), g)
        lean.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -1.0))


@pytest.mark.parametrize(("dtype", "state"), [(BF16, BF16), (BF16, FP32), (FP32, BF16)])
def test_rounded_as_torchs_operations_round(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, state: torch.dtype
) -> None:
    """The same noise: bit for bit, but where float32 sums differ in their last place."""
    one_step = range(3, 4)
    wanted = tensors_of(*trained(one_step, dtype, state))
    monkeypatch.setattr(lean_adamw, "choose_backend", lambda *_: "triton")
    got = tensors_of(*trained(one_step, dtype, state))
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        if mine.dtype == BF16:
            apart = mine != theirs
            assert float(apart.float().mean()) < 0.002
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=0)
        else:
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("first", [0, 4321, 2**31 - 700, 2**32 - 3])
def test_noise_of_an_element_is_that_of_its_place(first: int) -> None:
    """Values half a unit above 1: whether one goes up shows the highest bit of what was drawn."""
    size, step, salt = 2 * ADAMW_BLOCK, torch.tensor(7.0), _salt(3, 2)
    p, m, v = (torch.ones(size, dtype=BF16) for _ in range(3))
    options = {"lr": 0.0, "eps": 1e-8, "weight_decay": 0.0, "betas": (0.5, 0.9)}
    g = torch.full((size,), 1 + 2**-7, dtype=BF16)  # 1 + 0.5 (g - 1) = 1 + 2^-8
    adamw_triton((p, m, v, g), step, None, **options, place=(first, salt))
    up = noise(size, first, salt, step)[1] >= 2**15
    assert torch.equal(m.float(), torch.where(up, 1 + 2**-7, 1.0))
    assert 0.4 < float(up.float().mean()) < 0.6
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_step_found_infinite_changes_nothing(dtype: torch.dtype) -> None:
    lean, parameter = trained(range(2), dtype, dtype)
    before = [t.clone() for t in tensors_of(lean, parameter)]
    (leaf,) = lean.state
    leaf.grad = torch.full_like(parameter, torch.nan)
    lean.found_inf = torch.ones(())
    lean.step()
    assert all(map(torch.equal, before, tensors_of(lean, parameter)))
    lean.found_inf = torch.zeros(())
    leaf.grad = torch.ones_like(parameter)
    lean.step()
    assert not any(map(torch.equal, before, tensors_of(lean, parameter)))


@pytest.mark.usefixtures("by_kernel")
def test_what_is_not_finite_stays_so() -> None:
    lean, parameter = trained(range(1), BF16, BF16, size=3)
    (leaf,) = lean.state
    leaf.grad = torch.tensor([torch.nan, torch.inf, 1.0]).bfloat16()
    lean.step()
    assert parameter.isnan().tolist() == [True, True, False]


@pytest.mark.usefixtures("by_kernel")
def test_updates_below_half_a_unit_are_kept_on_average() -> None:
    torch.manual_seed(0)
    parameter = torch.full((4096,), 1.0, dtype=BF16, requires_grad=True)
    options = {"lr": 1e-4, "betas": (0.0, 0.95), "eps": 1e-8, "state_dtype": BF16, "seed": 0}
    lean = LeanAdamW([{"params": [parameter], "weight_decay": 0.0}], **options)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        lean.step()
    moved = 1 - float(parameter.detach().double().mean())
    assert moved == pytest.approx(20 * 1e-4, rel=0.05)
