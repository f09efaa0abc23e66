from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import Linear, logprob
from unteach.kernels.linear_logprob import linear_logprob, linear_logprob_reference


def wide(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return x.detach().double().numpy()


def grads(*leaves: Tensor | None) -> list[Tensor]:
    found = [leaf.grad for leaf in leaves if leaf is not None]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("op", [linear_logprob, linear_logprob_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.6}])
# one tile; five; two blocks of rows; D no multiple of 8
@pytest.mark.parametrize(("n", "d", "v"), [(1, 8, 40), (5, 33, 5003), (520, 3, 2100)])
def test_value_and_gradients_match_the_oracle(
    op: Any, dtype: torch.dtype, options: dict[str, float], n: int, d: int, v: int
) -> None:
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    head = torch.randn(v, d).to(dtype).requires_grad_()
    bias = torch.randn(v).requires_grad_() if options else None
    labels = torch.randint(v, (n,)).to(torch.int32)
    if n > 4:
        labels[:4] = torch.tensor([-100, v, v - 1, 0])
    upstream = torch.randn(n)
    logp = op(hidden, head, labels, bias_V=bias, **options)
    (logp * upstream).sum().backward()
    side = Linear(wide(hidden), wide(head), None if bias is None else wide(bias), **options)
    wanted, dz = logprob(side, labels.tolist(), wide(upstream))
    np.testing.assert_allclose(wide(logp), wanted, atol=2e-5)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    for grad, exact in zip(grads(hidden, head, bias), side.gradients(dz), strict=False):
        bound = (2**-8 if half else 2e-5) * np.abs(exact).max()
        np.testing.assert_allclose(wide(grad), exact, atol=bound)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_ignored_rows_are_dropped_rows(broken: float) -> None:
    hidden, head = torch.randn(6, 8), torch.randn(50, 8)
    labels = torch.tensor([3, -100, 7, 50, 49, -1])
    kept = torch.tensor([0, 2, 4])
    hidden[1] = broken
    results = []
    for h, y in ((hidden, labels), (hidden[kept], labels[kept])):
        leaves = h.clone().requires_grad_(), head.clone().requires_grad_()
        logp = linear_logprob(*leaves, y)
        logp.sum().backward()
        results.append((logp.detach(), *grads(*leaves)))
    (logp, dh, dw), wanted = results
    assert torch.equal(logp[kept], wanted[0])
    assert logp[[1, 3, 5]].tolist() == [0, 0, 0]
    assert not dh[[1, 3, 5]].any()
    assert torch.equal(dh[kept], wanted[1])
    assert torch.equal(dw, wanted[2])


def test_a_broken_row_is_nan_and_alone() -> None:
    hidden, head = torch.randn(6, 8), torch.randn(5003, 8)
    hidden[2, 0], hidden[4, 0] = torch.nan, torch.inf
    logp = linear_logprob(hidden, head, torch.arange(6))
    assert logp.isnan().tolist() == [False, False, True, False, True, False]


def test_large_logits_and_banned_ids() -> None:
    hidden, head = 100 * torch.randn(5, 8), torch.randn(2100, 8)
    bias = torch.zeros(2100)
    bias[:2060] = -torch.inf  # the first two tiles whole
    labels = torch.arange(2060, 2065)
    side = Linear(wide(hidden), wide(head[2060:]))
    wanted, _ = logprob(side, (labels - 2060).tolist(), np.zeros(5))
    got = linear_logprob(hidden, head, labels, bias_V=bias)
    np.testing.assert_allclose(wide(got), wanted, rtol=1e-5, atol=1e-3)


def test_the_slope_of_a_confident_label_is_no_noise_of_the_log_sum() -> None:
    # multiples of 1/16 make logits that float32 holds: only the log-sum can be rounded
    hidden, head = 4 * torch.randn(6, 64).mul(4).round(), torch.randn(500, 64).mul(4).round() / 4
    logits = (hidden @ head.t()).sort(dim=1, descending=True)
    assert logits.values[:, 0].max() > 300
    assert (logits.values[:, 0] - logits.values[:, 1]).min() > 1
    slopes = []
    for op, cast in ((linear_logprob, torch.float32), (linear_logprob_reference, torch.float64)):
        leaf = hidden.detach().to(cast).requires_grad_()
        op(leaf, head.to(cast), logits.indices[:, 0]).sum().backward()
        slopes.append(wide(grads(leaf)[0]))
    np.testing.assert_allclose(slopes[0], slopes[1], atol=4e-5 * np.abs(slopes[1]).max())


def test_frozen_head_no_grad_and_second_backward() -> None:
    hidden, head = torch.randn(5, 8).requires_grad_(), torch.randn(60, 8)
    before = hidden.detach().clone()
    labels = torch.arange(5)
    total = linear_logprob(hidden, head, labels).sum()
    total.backward(retain_graph=True)
    once = grads(hidden)[0].clone()
    total.backward()
    assert torch.equal(grads(hidden)[0], 2 * once)
    assert torch.equal(hidden.detach(), before)
    with torch.no_grad():
        assert not linear_logprob(hidden, head, labels).requires_grad


def test_memory_is_independent_of_rows_times_vocabulary() -> None:
    hidden, head = torch.randn(600, 4).requires_grad_(), torch.randn(30_000, 4).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprob(hidden, head, torch.randint(30_000, (600,))).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 600 * 30_000 * 4 / 4


def test_autocast_changes_no_bit() -> None:
    hidden, head, labels = torch.randn(5, 8), torch.randn(60, 8), torch.arange(5)
    results = []
    for enabled in (False, True):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logp = linear_logprob(*leaves, labels)
            logp.sum().backward()
        results.append((logp, *grads(*leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows_and_all_ignored() -> None:
    for n in (0, 3):
        hidden, head = torch.randn(n, 8).requires_grad_(), torch.randn(60, 8).requires_grad_()
        logp = linear_logprob(hidden, head, torch.full((n,), -100))
        logp.sum().backward()
        assert logp.tolist() == [0.0] * n
        assert not grads(hidden, head)[1].any()


H, W, Y = torch.zeros(4, 8), torch.zeros(50, 8), torch.zeros(4).long()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W, Y[:3]), {}, "labels_N.*4 rows"),
        ((H, W, Y[None]), {}, r"labels_N.*\(1, 4\)"),
        ((H, W, Y.float()), {}, "labels_N must hold integers"),
        ((H, W[:, :7], Y), {}, "width 8.*width 7"),
        ((H, W, Y), {"scale": 0}, "scale"),
        ((H, W, Y), {"softcap": 1e39}, "softcap.*float32.*got 1e[+]39"),
        ((H, W, Y), {"backend": "none"}, "backend"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(*arguments, **options)
