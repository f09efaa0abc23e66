"""`gather_linear` and its gradients by the kernels; run under TRITON_INTERPRET=1."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels import test_gather_linear
from unteach.kernels.gather_linear import gather_linear
from unteach.kernels.linear_topk import linear_topk
from unteach.kernels.sparse_grad import Pairs, head_grad
from unteach.kernels.sparse_grad_triton import head_grad_triton

triton_gather = partial(gather_linear, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.6}])
@pytest.mark.parametrize(("n", "d", "v", "u"), [(1, 8, 40, 1), (6, 133, 61, 19), (4, 5, 30, 0)])
def test_value_and_gradients_match_the_oracle(
    dtype: torch.dtype, options: dict[str, float], n: int, d: int, v: int, u: int
) -> None:
    # twice the tolerance for bf16: the interpreter cuts its stores off instead of rounding them
    test_gather_linear.check_against_oracle(triton_gather, dtype, options, (n, d, v, u), 2**-7)


def test_values_are_the_bits_of_the_search() -> None:
    hidden, head = torch.randn(6, 40), torch.randn(200, 40)
    logits, ids = linear_topk(hidden, head, 9, softcap=8.0, backend="triton")
    assert torch.equal(triton_gather(hidden, head, ids.int(), softcap=8.0), logits)
    assert torch.equal(
        triton_gather(hidden[3:4], head, ids[3:4, 5:6], softcap=8.0), logits[3:4, 5:6]
    )


def test_frozen_sides_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> Tensor:
        raise AssertionError("a gradient was computed")

    hidden, head = torch.randn(4, 8).requires_grad_(), torch.randn(30, 8)
    monkeypatch.setattr(test_gather_linear.module, "head_grad", forbidden)
    triton_gather(hidden, head, torch.zeros(4, 2).long()).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, 2 * head[:1].repeat(4, 1))


# No id of several units, one, all; a unit that is full to the last pair; empty slots
@pytest.mark.parametrize("unit", [1, 3, 16, 1000])
@pytest.mark.parametrize("kind", ["random", "one id", "few ids", "empty", "all distinct"])
def test_head_gradient_by_units(unit: int, kind: str) -> None:
    n, u, v, d = 6, 8, 60, 20
    ids = {
        "random": torch.randint(-1, v, (n, u)),
        "one id": torch.full((n, u), 59),
        "few ids": torch.randint(0, 3, (n, u)),
        "empty": torch.full((n, u), -1),
        "all distinct": torch.randperm(n * u).view(n, u),
    }[kind]
    slopes = torch.randn(n, u).masked_fill(ids < 0, 0)
    rows = torch.arange(n)[:, None].expand(n, u)
    pairs = Pairs(rows.flatten(), ids.flatten(), slopes.flatten())
    hidden = torch.randn(n, d)
    got = head_grad_triton(pairs, hidden, v, 0.7, unit=unit)
    kept = ids.flatten() >= 0
    wanted = head_grad(Pairs(*(x[kept] for x in vars(pairs).values())), hidden, v, 0.7)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert torch.equal(got, head_grad_triton(pairs, hidden, v, 0.7, unit=unit))
    untouched = torch.ones(v, dtype=torch.bool)
    untouched[ids[ids >= 0]] = False
    assert not got[untouched].any()


def test_no_rows() -> None:
    hidden, head = torch.randn(0, 8).requires_grad_(), torch.randn(30, 8).requires_grad_()
    triton_gather(hidden, head, torch.zeros(0, 3).long()).sum().backward()
    assert head.grad is not None
    assert not head.grad.any()
