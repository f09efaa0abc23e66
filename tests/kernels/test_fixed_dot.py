from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unteach.kernels.fixed_dot import gather_dot, slice_pairs, tree_sum_


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # more pairs than one slice takes, of a width that is odd on most levels of the tree
    width = 717
    count = 2 * slice_pairs(width, torch.device("cpu")) + 37
    hidden, head = torch.randn(60, width), torch.randn(501, width)
    return hidden, head, torch.randint(60, (count,)), torch.randint(501, (count,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_is_the_same_bits_in_any_batch(
    pairs: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    hidden, head, rows, ids = pairs
    whole = gather_dot(hidden, head, rows, ids, dtype)
    for count in (1, 2, 3, 17, 64, 1000):
        some = torch.randperm(len(rows))[:count]
        assert torch.equal(gather_dot(hidden, head, rows[some], ids[some], dtype), whole[some])


def test_dot_is_the_same_bits_with_any_thread_count_and_layout(
    pairs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    hidden, head, rows, ids = pairs
    whole = gather_dot(hidden, head, rows, ids, torch.float32)
    views = hidden.t().contiguous().t(), head.repeat(1, 2)[:, :717]
    strided = gather_dot(*views, rows, ids, torch.float32)
    torch.set_num_threads(2)
    try:
        threaded = gather_dot(hidden, head, rows, ids, torch.float32)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(threaded, whole)
    assert torch.equal(strided, whole)


def test_dot_follows_the_documented_order(pairs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, head, rows, ids = (x[:50] if x.dim() == 1 else x for x in pairs)
    terms = (hidden[rows] * head[ids]).tolist()
    single = torch.tensor(0.0).add  # rounds to float32 after each addition
    for row, value in zip(terms, gather_dot(hidden, head, rows, ids, torch.float32), strict=True):
        level = [single(x) for x in row]
        while len(level) > 1:
            half, last = len(level) // 2, len(level)
            middle = level[half : last - half]
            level = [level[i] + level[last - half + i] for i in range(half)] + middle
        assert torch.equal(level[0], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_widened_before_the_product(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(5, 40).to(dtype), torch.randn(30, 40).to(dtype)
    rows, ids = torch.arange(5).repeat_interleave(30), torch.arange(30).repeat(5)
    got = gather_dot(hidden, head, rows, ids, torch.float32)
    assert torch.equal(got, gather_dot(hidden.float(), head.float(), rows, ids, torch.float32))
    torch.testing.assert_close(got.view(5, 30), hidden.float() @ head.float().t())


def test_sum_of_no_columns_is_zero() -> None:
    assert torch.equal(tree_sum_(torch.zeros(3, 0)), torch.zeros(3))
