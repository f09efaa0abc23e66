from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import Linear
from unteach.kernels import gather_linear as module
from unteach.kernels.gather_linear import gather_linear, gather_linear_reference
from unteach.kernels.linear_topk import linear_topk


def wide(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return x.detach().double().numpy()


@pytest.mark.parametrize("op", [gather_linear, gather_linear_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.6}])
@pytest.mark.parametrize(("n", "d", "v", "u"), [(1, 8, 40, 1), (6, 33, 61, 9), (4, 5, 30, 0)])
def test_value_and_gradients_match_the_oracle(
    op: Any, dtype: torch.dtype, options: dict[str, float], n: int, d: int, v: int, u: int
) -> None:
    check_against_oracle(op, dtype, options, (n, d, v, u), 2**-8)


def check_against_oracle(
    op: Any,
    dtype: torch.dtype,
    options: dict[str, float],
    shape: tuple[int, int, int, int],
    half_tolerance: float,
) -> None:
    n, d, v, u = shape
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    head = torch.randn(v, d).to(dtype).requires_grad_()
    bias = torch.randn(v).requires_grad_() if options else None
    ids = torch.randint(v, (n, u))
    if u > 3:
        ids[:, 1] = ids[:, 0]  # twice the same id: both slots carry gradient
        ids[0, 2], ids[1, 2], ids[2, 2] = -1, v, -100
    upstream = torch.randn(n, u)
    logits = op(hidden, head, ids, bias_V=bias, **options)
    (logits * upstream).sum().backward()

    side = Linear(wide(hidden), wide(head), None if bias is None else wide(bias), **options)
    z, dz = side.final(), np.zeros((n, v))
    wanted = np.zeros((n, u))
    for r in range(n):
        for slot, token in enumerate(ids[r].tolist()):
            if 0 <= token < v:
                wanted[r, slot] = z[r, token]
                dz[r, token] += upstream[r, slot].item()
    tolerance = half_tolerance if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(wide(logits), wanted, atol=2e-5)
    leaves = (hidden, head) if bias is None else (hidden, head, bias)
    for leaf, grad in zip(leaves, side.gradients(dz), strict=False):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        bound = tolerance * max(1.0, np.abs(grad).max(initial=0))
        np.testing.assert_allclose(wide(leaf.grad), grad, atol=bound)


def test_values_are_the_bits_of_the_search() -> None:
    hidden, head = torch.randn(20, 40), torch.randn(3000, 40)
    logits, ids = linear_topk(hidden, head, 9, softcap=8.0)
    assert torch.equal(gather_linear(hidden, head, ids.int(), softcap=8.0), logits)
    assert torch.equal(
        gather_linear(hidden[3:4], head, ids[3:4, 5:6], softcap=8.0), logits[3:4, 5:6]
    )


def test_frozen_sides_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> Tensor:
        raise AssertionError("a gradient was computed")

    hidden, head = torch.randn(4, 8).requires_grad_(), torch.randn(30, 8)
    monkeypatch.setattr(module, "head_grad", forbidden)
    gather_linear(hidden, head, torch.zeros(4, 2).long()).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, 2 * head[:1].repeat(4, 1))


def test_two_backwards_and_untouched_inputs() -> None:
    hidden, head = torch.randn(4, 8).requires_grad_(), torch.randn(30, 8).requires_grad_()
    before = hidden.detach().clone(), head.detach().clone()
    ids = torch.randint(30, (4, 5))
    total = gather_linear(hidden, head, ids, softcap=2.0).sum()
    total.backward(retain_graph=True)
    assert hidden.grad is not None
    assert head.grad is not None
    once = hidden.grad.clone(), head.grad.clone()
    total.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(head.grad, 2 * once[1])
    assert torch.equal(hidden.detach(), before[0])
    assert torch.equal(head.detach(), before[1])


def test_no_rows() -> None:
    hidden, head = torch.randn(0, 8).requires_grad_(), torch.randn(30, 8).requires_grad_()
    gather_linear(hidden, head, torch.zeros(0, 3).long()).sum().backward()
    assert head.grad is not None
    assert not head.grad.any()


H, W, IDS = torch.zeros(4, 8), torch.zeros(50, 8), torch.zeros(4, 6).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W, IDS[:3]), {}, "ids_NU.*4 rows"),
        ((H, W, IDS[0]), {}, "ids_NU.*2 dimension"),
        ((H, W, IDS.float()), {}, "ids_NU must hold integers"),
        ((H, W.double(), IDS), {}, "float64"),
        ((H, W, IDS), {"softcap": 0}, "softcap"),
        ((H, W, IDS), {"backend": "none"}, "backend"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gather_linear(*arguments, **options)
