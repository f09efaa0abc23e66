"""Rounding that is right on average, by noise that depends on nothing but where and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.train.lean_adamw import LeanAdamW, _salt, noise, rounded

STEP = torch.tensor(3.0)
BF16_MAX = torch.finfo(torch.bfloat16).max


def rounds(values: Tensor) -> Tensor:
    return rounded(values, noise(len(values), 0, _salt(0, 1), STEP)[0])


@pytest.mark.parametrize("value", [1.001, -3.14159, 1e-30, 7e4, 0.1])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(value: float) -> None:
    count = 200_000
    got, exact = rounds(torch.full((count,), value)).double(), float(torch.tensor(value))
    down, up = sorted(set(got.tolist()))
    nearest = torch.tensor(exact).bfloat16()
    assert down < exact < up and float(nearest) in (down, up)
    spread = (up - down) / 2 / count**0.5
    assert abs(float(got.mean()) - exact) < 4 * spread


def test_what_bf16_holds_and_what_is_not_finite_stay() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, BF16_MAX])
    full = torch.full((len(values),), 0xFFFF, dtype=torch.int32)
    for drawn in (full, full * 0):
        torch.testing.assert_close(
            rounded(values, drawn), values.bfloat16(), equal_nan=True, rtol=0, atol=0
        )
        for bits in (-1, 0x7FFFFFFF, 0x7F800001):  # sums run over, or stop short of a NaN
            odd = torch.full((4,), bits, dtype=torch.int32).view(torch.float32)
            assert rounded(odd, drawn[:4]).isnan().all()
    assert torch.equal(rounded(values[:2], full[:2]).signbit(), torch.tensor([False, True]))


def test_noise_is_uniform_and_a_function_of_place_and_time() -> None:
    count, salt = 300_000, _salt(5, 2)
    drawn = noise(count, 0, salt, STEP)
    others = [noise(count, 0, *key)[0] for key in ((_salt(6, 2), STEP), (salt, STEP + 1))]
    others.append(noise(count, 0, _salt(5, 3), STEP)[0])
    expected = count / 64
    for whole, part in zip(drawn, noise(1000, 4321, salt, STEP), strict=True):
        assert torch.equal(part, whole[4321:5321])
        assert int(whole.min()) >= 0 and int(whole.max()) < 2**16
        counts = torch.bincount(whole // 1024, minlength=64).double()
        assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5
    shifted = [x.roll(1) for x in drawn]
    independent = torch.stack([*drawn, *others, *shifted]).double().corrcoef()
    assert float((independent - torch.eye(9)).abs().max()) < 0.01


def optimizer(parameters: list[Tensor], **options: Any) -> LeanAdamW:
    defaults: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "seed": 0}
    defaults["state_dtype"] = torch.float32
    return LeanAdamW([{"params": parameters, "weight_decay": 0.5}], **{**defaults, **options})


def test_float32_is_adamw_by_its_formula() -> None:
    torch.manual_seed(1)
    parameter = torch.randn(7, 3, requires_grad=True)
    lean = optimizer([parameter])
    p, m, v = parameter.detach().double(), torch.zeros(7, 3).double(), torch.zeros(7, 3).double()
    for step in range(1, 5):
        g = torch.randn(7, 3)
        parameter.grad = g.clone()
        lean.step()
        m, v = 0.9 * m + 0.1 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        down = (v / (1 - 0.95**step)).sqrt() + 1e-8
        p = p * (1 - 0.1 * 0.5) - 0.1 * m / (1 - 0.9**step) / down
        torch.testing.assert_close(parameter.detach().double(), p, rtol=1e-5, atol=1e-6)


def test_updates_below_half_a_unit_are_kept_on_average() -> None:
    """Rounding to nearest would leave every one of these weights where it was."""
    parameter = torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    lean = optimizer([parameter], lr=1e-4, state_dtype=torch.bfloat16)
    lean.param_groups[0]["weight_decay"] = 0.0
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        lean.step()
    assert lean.state[parameter]["exp_avg"].dtype == torch.bfloat16
    moved = 1 - float(parameter.detach().double().mean())
    assert moved == pytest.approx(40 * 1e-4, rel=0.05)


def test_second_moments_decay_in_bf16() -> None:
    parameter = torch.zeros(4096, dtype=torch.bfloat16, requires_grad=True)
    lean = optimizer([parameter], betas=(0.9, 0.999), state_dtype=torch.bfloat16)
    for step in range(60):
        parameter.grad = torch.ones_like(parameter) * (step == 0)
        lean.step()
    left = float(lean.state[parameter]["exp_avg_sq"].double().mean())
    assert left == pytest.approx(0.001 * 0.999**59, rel=0.01)


def run(steps: range, lean: LeanAdamW, parameters: list[Tensor]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        lean.step()


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_resumed_is_never_stopped_bit_for_bit(moments: torch.dtype) -> None:
    def fresh() -> tuple[list[Tensor], LeanAdamW]:
        torch.manual_seed(0)
        made = [torch.randn(9, 5), torch.randn(11)]
        parameters = [p.bfloat16().requires_grad_() for p in made]
        return parameters, optimizer(parameters, state_dtype=moments)

    whole, lean = fresh()
    run(range(6), lean, whole)
    first, lean = fresh()
    run(range(3), lean, first)
    state = lean.state_dict()
    second, lean = fresh()
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value)
    lean.load_state_dict(state)
    assert all(lean.state[p]["exp_avg"].dtype == moments for p in second)
    run(range(3, 6), lean, second)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_step_found_infinite_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.randn(50).to(dtype).requires_grad_()
        lean = optimizer([parameter], state_dtype=dtype)
        run(range(2), lean, [parameter])
        before = [parameter.detach().clone(), *(t.clone() for t in lean.state[parameter].values())]
        lean.found_inf = torch.ones(())
        parameter.grad = torch.full_like(parameter, torch.nan)
        lean.step()
        after = [parameter.detach(), *lean.state[parameter].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
