from __future__ import annotations

import numpy as np
import pytest
import torch

from unteach.kernels import fixed_dot
from unteach.kernels.sparse_grad import Pairs, bias_grad, head_grad, hidden_grad


def make_pairs(rows: int, vocab: int, per_row: int) -> Pairs:
    # squared uniform: a few hot ids with long segments, most with one pair or none
    ids = (torch.rand(rows, per_row) ** 4 * vocab).long()
    index = torch.arange(rows).repeat_interleave(per_row)
    return Pairs(index.int(), ids.flatten().int(), torch.randn(rows * per_row))


@pytest.mark.parametrize("slice_elements", [1 << 19, 64])
def test_gradients_match_a_plain_loop(monkeypatch: pytest.MonkeyPatch, slice_elements: int) -> None:
    # 64 elements a slice: segments straddle slices, and chunks of touched ids end anywhere
    monkeypatch.setattr(fixed_dot, "SLICE_ELEMENTS", slice_elements)
    pairs, width = make_pairs(23, 90, 7), 9
    hidden, head = torch.randn(23, width), torch.randn(90, width)
    dh, dw, db = np.zeros((23, width)), np.zeros((90, width)), np.zeros(90)
    for r, i, c in zip(pairs.rows_P, pairs.ids_P, pairs.slopes_P.double(), strict=True):
        dh[r] += 0.5 * c.item() * head[i].double().numpy()
        dw[i] += 0.5 * c.item() * hidden[r].double().numpy()
        db[i] += c.item()
    np.testing.assert_allclose(hidden_grad(pairs, head, 23, 0.5), dh, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head_grad(pairs, hidden, 90, 0.5), dw, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bias_grad(pairs, torch.zeros(90)), db, rtol=1e-5, atol=1e-5)


def test_slices_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, hidden = make_pairs(64, 50, 20), torch.randn(64, 33)
    whole = head_grad(pairs, hidden, 50, 1.0), hidden_grad(pairs, torch.randn(50, 33), 64, 1.0)
    torch.manual_seed(0)
    pairs, hidden = make_pairs(64, 50, 20), torch.randn(64, 33)
    monkeypatch.setattr(fixed_dot, "SLICE_ELEMENTS", 100)
    sliced = head_grad(pairs, hidden, 50, 1.0), hidden_grad(pairs, torch.randn(50, 33), 64, 1.0)
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])


def test_half_gradients_are_summed_wide_and_rounded_once() -> None:
    # 4096 + 1 + 1 ... : bf16 sums would stay at 4096
    pairs = Pairs(torch.arange(513), torch.zeros(513, dtype=torch.int64), torch.ones(513))
    hidden = torch.ones(513, 2, dtype=torch.bfloat16)
    hidden[0] = 4096
    assert head_grad(pairs, hidden, 3, 1.0)[0].tolist() == [4608, 4608]


def test_no_pairs_give_zeros() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    pairs = Pairs(none, none, torch.zeros(0))
    assert torch.equal(head_grad(pairs, torch.zeros(0, 4), 5, 1.0), torch.zeros(5, 4))
    assert torch.equal(hidden_grad(pairs, torch.zeros(5, 4), 0, 1.0), torch.zeros(0, 4))
