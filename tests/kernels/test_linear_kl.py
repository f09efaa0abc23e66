from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import Linear, kl
from unteach.kernels.linear_kl import linear_kl, linear_kl_reference


def wide(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return x.detach().double().numpy()


def grads(*leaves: Tensor | None) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves if leaf is not None]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("op", [linear_kl, linear_kl_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.6}])
@pytest.mark.parametrize(
    ("n", "d", "e", "v", "v_r", "vocab"),
    # one tile; five; two blocks of rows and another head size; padding
    [
        (1, 8, 8, 40, 40, None),
        (4, 33, 9, 5003, 5003, None),
        (515, 3, 4, 1190, 1100, None),
        (3, 8, 8, 2100, 2500, 2080),
    ],
)
def test_value_and_gradients_match_the_oracle(
    op: Any,
    dtype: torch.dtype,
    options: dict[str, float],
    n: int,
    d: int,
    e: int,
    v: int,
    v_r: int,
    vocab: int | None,
) -> None:
    hidden = (0.5 * torch.randn(n, d)).to(dtype).requires_grad_()
    head = torch.randn(v, d).to(dtype).requires_grad_()
    bias = torch.randn(v).requires_grad_() if options else None
    reference, reference_head = (0.5 * torch.randn(n, e)).to(dtype), torch.randn(v_r, e).to(dtype)
    upstream = torch.randn(n)
    value = op(hidden, head, reference, reference_head, vocab=vocab, bias_V=bias, **options)
    (value * upstream).sum().backward()
    side = Linear(wide(hidden), wide(head), None if bias is None else wide(bias), **options)
    other = Linear(wide(reference), wide(reference_head), None, **options)
    wanted, dz = kl(side, other, vocab or min(v, v_r), wide(upstream))
    np.testing.assert_allclose(wide(value), wanted, atol=2e-6 * max(1, wanted.max()))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for grad, exact in zip(grads(hidden, head, bias), side.gradients(dz), strict=False):
        bound = (2**-8 if dtype == torch.bfloat16 else 2e-5) * np.abs(exact).max()
        np.testing.assert_allclose(wide(grad), exact, atol=bound)


def test_equal_models_have_no_divergence() -> None:
    hidden, head = 5 * torch.randn(9, 16), torch.randn(3000, 16)
    assert linear_kl(hidden, head, hidden, head).abs().max() == 0
    near = linear_kl(hidden + 1e-3 * torch.randn(9, 16), head, hidden, head)
    assert bool((near > -1e-6).all())
    assert bool((near < 1e-3).all())


@pytest.mark.parametrize("offset", [30.0, 1000.0])
@pytest.mark.parametrize("late", [False, True])
def test_an_offset_that_softmax_cannot_see_costs_no_accuracy(offset: float, late: bool) -> None:
    hidden, head = 0.5 * torch.randn(4, 32), torch.randn(2500, 32)
    reference = hidden + 0.02 * torch.randn(4, 32)
    bias = torch.full((2500,), offset)
    if late:  # the tops, from which logits are counted, rise far after the first of three tiles
        bias[:1024] -= 40
    problem = hidden, head, reference, head
    results = []
    for op, cast in ((linear_kl, torch.float32), (linear_kl_reference, torch.float64)):
        leaf, *others = (x.detach().to(cast) for x in problem)
        leaf.requires_grad_()
        value = op(leaf, *others, bias_V=bias.to(cast))
        value.sum().backward()
        results.append((wide(value), wide(grads(leaf)[0])))
    (value, slope), (wanted, exact) = results
    # float32 logits of size 1000 are themselves off by 3e-5
    np.testing.assert_allclose(value, wanted, atol=2e-6 if offset < 100 else 1e-5, rtol=2e-6)
    np.testing.assert_allclose(slope, exact, atol=3e-4 * np.abs(exact).max())


def test_a_gradient_near_agreement_is_no_noise_of_the_log_sums() -> None:
    # multiples of 1/64 make logits that float32 holds: only the log-sums can be rounded
    hidden, head = (torch.randn(n, 32).mul(4).round() / 8 for n in (6, 300))
    reference = hidden + torch.randn(6, 32).round() / 64
    bias = torch.full((300,), 1000.0)
    slopes = []
    for op, cast in ((linear_kl, torch.float32), (linear_kl_reference, torch.float64)):
        leaf, *others = (x.detach().to(cast) for x in (hidden, head, reference, head))
        leaf.requires_grad_()
        op(leaf, *others, bias_V=bias.to(cast)).sum().backward()
        slopes.append(wide(grads(leaf)[0]))
    np.testing.assert_allclose(slopes[0], slopes[1], atol=2e-5 * np.abs(slopes[1]).max())


def test_reference_gets_no_gradient_and_may_be_of_another_dtype() -> None:
    hidden, head = torch.randn(4, 8).requires_grad_(), torch.randn(50, 8)
    reference = torch.randn(4, 8).requires_grad_()
    linear_kl(hidden, head, reference, head).sum().backward()
    assert reference.grad is None
    half = reference.detach().bfloat16(), head.bfloat16()
    got = linear_kl(hidden, head, *half)
    assert torch.equal(got, linear_kl(hidden, head, half[0].float(), half[1].float()))


def test_the_reference_may_come_from_inference_mode() -> None:
    hidden, head, reference = torch.randn(4, 8), torch.randn(50, 8), torch.randn(4, 8)
    with torch.inference_mode():
        made = reference.clone(), head.clone()
    results = []
    for sides in ((reference, head), (made[0], head), made):
        leaf = hidden.clone().requires_grad_()
        value = linear_kl(leaf, head, *sides)
        value.sum().backward()
        results.append((value.detach(), *grads(leaf)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_one_head_for_both_sides() -> None:
    hidden, reference = torch.randn(4, 8), torch.randn(4, 8)
    head = torch.randn(50, 8).requires_grad_()
    linear_kl(hidden, head, reference, head).sum().backward()
    side = Linear(wide(hidden), wide(head))
    _, dz = kl(side, Linear(wide(reference), wide(head)), 50, np.ones(4))
    np.testing.assert_allclose(wide(grads(head)[0]), side.gradients(dz)[1], atol=1e-5)


def test_second_backward_untouched_inputs_and_broken_rows() -> None:
    hidden, head = torch.randn(5, 8).requires_grad_(), torch.randn(60, 8).requires_grad_()
    before = hidden.detach().clone(), head.detach().clone()
    reference = torch.randn(5, 8)
    total = linear_kl(hidden, head, reference, head.detach(), softcap=2.0).sum()
    total.backward(retain_graph=True)
    once = [grad.clone() for grad in grads(hidden, head)]
    total.backward()
    assert torch.equal(hidden.detach(), before[0])
    assert torch.equal(head.detach(), before[1])
    for grad, single in zip(grads(hidden, head), once, strict=True):
        assert torch.equal(grad, 2 * single)
    reference[3, 1] = torch.nan
    value = linear_kl(hidden, head, reference, head)
    assert value.isnan().tolist() == [False, False, False, True, False]


def test_no_rows() -> None:
    hidden, head = torch.randn(0, 8).requires_grad_(), torch.randn(60, 8).requires_grad_()
    linear_kl(hidden, head, torch.randn(0, 4), torch.randn(60, 4)).sum().backward()
    assert not grads(hidden, head)[1].any()


H, W = torch.zeros(4, 8), torch.zeros(50, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W, H[:3], W), {}, "reference_NE has 3 rows, expected 4"),
        ((H, W, H[:, :7], W), {}, "reference_NE has width 7 but reference_head_VE has width 8"),
        ((H, W, H, W[:30]), {"vocab": 31}, "vocab.*1 to 30, got 31"),
        ((H, W, H.long(), W), {}, "reference_NE must be"),
        ((H, W, H, W), {"softcap": -3.0}, "softcap"),
        ((H, W, H, W), {"backend": "none"}, "backend"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kl(*arguments, **options)
