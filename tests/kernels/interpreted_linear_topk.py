"""`linear_topk` by the kernels; run under TRITON_INTERPRET=1 (test_triton.py does)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import Linear, top_ids
from tests.kernels.test_linear_topk import (
    OUT_OF_REACH,
    assert_same,
    blurred,
    brute_topk,
    nearly_tied,
    seed_sets,
)
from unteach.kernels import topk_triton, triton_launch
from unteach.kernels.linear_topk import linear_topk
from unteach.kernels.topk_triton import Found, order_bits, pack, search, unpack
from unteach.kernels.triton_source import TritonGiven, TritonLinear


@pytest.fixture(params=["fused", "product"])
def either_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to come by the logits of the seeded pass; products of few rows and ids."""
    monkeypatch.setitem(triton_launch.DENSE_PASS, "interpreter", request.param)
    monkeypatch.setattr(topk_triton, "PRODUCT_ROWS", 3)
    monkeypatch.setattr(topk_triton, "PRODUCT_IDS", 128)


both_passes = pytest.mark.usefixtures("either_pass")


def triton_topk(hidden: Tensor, head: Tensor, k: int, **options: object) -> tuple[Tensor, Tensor]:
    return linear_topk(hidden, head, k, backend="triton", **options)  # type: ignore[arg-type]


def pair(found: Found) -> tuple[Tensor, Tensor]:
    return found.top.raw_NK, found.top.ids_NK


def lane_scores(hidden: Tensor, head: Tensor) -> Tensor:
    """The deciding value of every id, by the order of additions that tile_keys.py promises."""
    width = hidden.shape[1]
    padded = -(-width // 128) * 128
    h, w = (torch.nn.functional.pad(x.float(), (0, padded - width)) for x in (hidden, head))
    acc = torch.zeros(h.shape[0], w.shape[0], 128)
    for start in range(0, padded, 128):
        acc = acc + h[:, None, start : start + 128] * w[None, :, start : start + 128]
    while acc.shape[2] > 1:
        acc = acc[:, :, 0::2] + acc[:, :, 1::2]
    return acc[:, :, 0]


@both_passes
def test_numbers_of_numpy_are_floats_too() -> None:
    hidden, head = torch.randn(4, 24), torch.randn(140, 24)
    wanted = triton_topk(hidden, head, 5, scale=0.5, softcap=4.0)
    assert_same(triton_topk(hidden, head, 5, scale=np.float32(0.5), softcap=np.float32(4)), wanted)


@both_passes
def test_the_default_dtype_changes_no_bit() -> None:
    hidden, head = torch.randn(4, 24).half(), torch.randn(140, 24).half()
    wanted = brute_topk(lane_scores(hidden, head), 5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert_same(triton_topk(hidden, head, 5, seeds_NS=wanted[1]), wanted)
        none = triton_topk(hidden[:0], head, 5)
    finally:
        torch.set_default_dtype(default)
    assert none[0].dtype == torch.float32


@pytest.mark.parametrize("sizes", OUT_OF_REACH[:1])
def test_norms_out_of_range_do_not_let_seeds_decide(sizes: tuple[float, float]) -> None:
    hidden, head = nearly_tied(*sizes)
    hidden, head = hidden[:1], head[:140]
    wanted = brute_topk(lane_scores(hidden, head), 3)
    for seeds in (None, brute_topk(lane_scores(hidden, head), 6)[1]):
        assert_same(triton_topk(hidden, head, 3, seeds_NS=seeds), wanted)


# One tile or three; K = 1, K no power of two, K = V; D under, over and not a multiple of a lane set
@pytest.mark.parametrize(
    ("n", "d", "v", "k"), [(1, 8, 40, 1), (7, 24, 300, 5), (3, 16, 40, 40), (16, 133, 257, 12)]
)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_values_and_ids_match_the_oracle(n: int, d: int, v: int, k: int, options: str) -> None:
    hidden, head, bias = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    extra = {} if options == "plain" else {"bias_V": bias, "softcap": 3.0, "scale": 0.7}
    vocab = v if options == "plain" or k == v else v - 3
    logits, ids = triton_topk(hidden, head, k, vocab=vocab, **extra)
    student = Linear(
        hidden.double().numpy(),
        head.double().numpy(),
        bias.double().numpy() if extra else None,
        extra.get("scale", 1.0),
        extra.get("softcap"),
    )
    assert ids.tolist() == [top_ids(row, k, vocab) for row in student.raw()]
    np.testing.assert_allclose(
        logits, np.take_along_axis(student.final(), ids.numpy(), 1), atol=3e-5
    )
    assert ids.dtype == torch.int64
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_by_exact_products(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(5, 24).to(dtype), torch.randn(300, 24).to(dtype)
    _, ids = triton_topk(hidden, head, 9)
    raw = Linear(hidden.double().numpy(), head.double().numpy()).raw()
    assert ids.tolist() == [top_ids(row, 9, 300) for row in raw]


def test_dots_have_the_order_that_is_promised() -> None:
    for width in (1, 100, 128, 300):
        hidden, head = torch.randn(3, width), torch.randn(40, width)
        every = torch.arange(40).expand(3, 40)
        got = TritonLinear.of(hidden, head, None, 1.0).at(every)
        assert torch.equal(got, lane_scores(hidden, head))


@both_passes
@pytest.mark.parametrize("kind", list(seed_sets(torch.zeros(1, 2, dtype=torch.int64), 1)))
def test_seeds_change_no_bit(kind: str) -> None:
    hidden, head = torch.randn(5, 48), torch.randn(290, 48)
    wanted = brute_topk(lane_scores(hidden, head), 8)
    assert_same(triton_topk(hidden, head, 8, seeds_NS=seed_sets(wanted[1], 290)[kind]), wanted)


@both_passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_seeds_change_no_bit_under_bias_and_scale(dtype: torch.dtype) -> None:
    hidden, head, bias = torch.randn(7, 24), torch.randn(270, 24), torch.randn(270)
    options = {"bias_V": bias, "scale": 0.6, "softcap": 4.0, "vocab": 266}
    wanted = triton_topk(hidden.to(dtype), head.to(dtype), 6, **options)
    seeds = wanted[1].flip(1).contiguous()
    seeds[2] = -1  # a row that has to do without
    assert_same(triton_topk(hidden.to(dtype), head.to(dtype), 6, seeds_NS=seeds, **options), wanted)


@both_passes
def test_good_seeds_leave_nothing_to_the_fallback() -> None:
    hidden, head = torch.randn(5, 48), torch.randn(290, 48)
    source = TritonLinear.of(hidden, head, None, 1.0)
    _, ids = brute_topk(lane_scores(hidden, head), 16)
    assert search(source, 8, 290, seeds_NS=ids).fallback == 0
    assert search(source, 8, 290, seeds_NS=ids[:, :7]).fallback == 5
    assert search(source, 8, 290).fallback == 0


@both_passes
def test_full_slots_lead_to_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(5, 48), torch.randn(290, 48)
    source, scores = TritonLinear.of(hidden, head, None, 1.0), lane_scores(hidden, head)
    seeds = scores.argsort(1)[:, :8].contiguous()  # the worst ids: every other one is above
    seeds[1] = brute_topk(scores, 8)[1][1]
    monkeypatch.setattr(topk_triton, "_SLOTS", 32)
    for splits in (1, 2):
        found = search(source, 8, 290, seeds_NS=seeds, splits=splits)
        assert_same(pair(found), brute_topk(scores, 8))
        assert found.fallback == 4


def test_splits_and_batch_change_no_bit() -> None:
    hidden, head = torch.randn(14, 20), torch.randn(300, 20)
    source = TritonLinear.of(hidden, head, None, 1.0)
    wanted = brute_topk(lane_scores(hidden, head), 7)
    for splits in (1, 2, 4):
        for seeds in (None, wanted[1]):
            assert_same(pair(search(source, 7, 300, splits=splits, seeds_NS=seeds)), wanted)
    rows = torch.tensor([13, 2])
    assert_same(triton_topk(hidden[rows], head, 7), (wanted[0][rows], wanted[1][rows]))


def few_near() -> tuple[Tensor, Tensor]:
    """Eight ids that only the order of additions tells apart, all others far below."""
    hidden, head = torch.randn(6, 96).abs(), torch.randn(1, 96) + 1e-7 * torch.randn(300, 96)
    head[torch.arange(300) % 40 != 3] -= 1
    return hidden, head


@pytest.mark.parametrize("kind", ["near", "cancelling", "crowded"])
@pytest.mark.parametrize("dense_pass", [None, "fused", "product"])
def test_rounding_of_tiles_never_decides(
    kind: str, dense_pass: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dense_pass:
        monkeypatch.setitem(triton_launch.DENSE_PASS, "interpreter", dense_pass)
    hidden, head = few_near() if kind == "near" else (x[:300] for x in blurred(kind))
    scores = lane_scores(hidden, head)
    wanted = brute_topk(scores, 5)
    found = search(
        TritonLinear.of(hidden, head, None, 1.0), 5, 300, seeds_NS=wanted[1] if dense_pass else None
    )
    assert_same(pair(found), wanted)
    assert found.fallback == {"near": 0, "crowded": 6}.get(kind, int(found.fallback))


def test_products_order_near_ids_otherwise() -> None:
    """Else the test above would show nothing."""
    hidden, head = few_near()
    wanted = brute_topk(lane_scores(hidden, head), 5)[1]
    assert not torch.equal(brute_topk(hidden @ head.t(), 5)[1], wanted)


def test_a_wider_slack_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(6, 16), torch.randn(250, 16)
    wanted = brute_topk(lane_scores(hidden, head), 6)
    source = TritonLinear.of(hidden, head, None, 1.0)
    for slack in (0.1, 0.5, 30.0):
        monkeypatch.setattr(TritonLinear, "slack", lambda self, vocab, s=slack: torch.full((6,), s))
        for seeds in (None, wanted[1]):
            assert_same(pair(search(source, 6, 250, seeds_NS=seeds)), wanted)


def test_exact_ties_go_to_the_smaller_id() -> None:
    hidden = torch.randint(-2, 3, (6, 6)).float()
    head = torch.randint(-2, 3, (300, 6)).float()
    raw = Linear(hidden.double().numpy(), head.double().numpy()).raw()
    for seeds in (None, torch.randint(300, (6, 50))):
        _, ids = triton_topk(hidden, head, 13, seeds_NS=seeds)
        assert ids.tolist() == [top_ids(row, 13, 300) for row in raw]


@pytest.mark.parametrize("kind", ["zero hidden", "zero head", "one row"])
def test_equal_logits(kind: str) -> None:
    hidden, head = torch.randn(4, 5), torch.randn(200, 5)
    if kind == "zero hidden":
        hidden[::2] = 0
    else:
        head = head.zero_() if kind == "zero head" else head[:1].repeat(200, 1)
    found = search(TritonLinear.of(hidden, head, None, 1.0), 9, 200, spare=9)
    assert_same(pair(found), brute_topk(lane_scores(hidden, head), 9))
    assert found.fallback == (0 if kind == "zero hidden" else 4)


@both_passes
def test_padding_rows_are_never_selected() -> None:
    hidden, head = torch.randn(5, 16), torch.randn(200, 16)
    head[180:] = 50 * hidden.mean(0)
    head[190:] = torch.nan
    seeds = torch.arange(175, 200).repeat(5, 1)
    got = triton_topk(hidden, head, 12, vocab=180, seeds_NS=seeds)
    assert_same(got, triton_topk(hidden, head[:180], 12))


def test_runners_up_are_the_next_best() -> None:
    hidden, head = torch.randn(4, 32), torch.randn(250, 32)
    _, ids = brute_topk(lane_scores(hidden, head), 20)
    found = search(TritonLinear.of(hidden, head, None, 1.0), 10, 250, spare=10)
    assert torch.equal(found.top.spare_NR, ids[:, 10:])


@both_passes
def test_rows_that_are_not_finite_give_nan_at_the_first_ids() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(200, 8)
    clean = triton_topk(hidden, head, 4)
    hidden[1, 3], hidden[4, 0] = torch.nan, torch.inf
    logits, ids = triton_topk(hidden, head, 4, seeds_NS=clean[1])
    assert logits[[1, 4]].isnan().all()
    assert ids[[1, 4]].tolist() == [[0, 1, 2, 3]] * 2
    rest = torch.tensor([0, 2, 3])
    assert_same((logits[rest], ids[rest]), (clean[0][rest], clean[1][rest]))


@both_passes
@pytest.mark.parametrize("bad", [1, 50, 200])
def test_nan_in_the_head_comes_first_and_ends(bad: int) -> None:
    hidden, head = torch.randn(4, 8), torch.randn(200, 8)
    broken = torch.randperm(200)[:bad].sort().values
    head[broken, 2] = torch.nan
    for seeds in (None, torch.randint(200, (4, 9))):
        logits, ids = triton_topk(hidden, head, 4, seeds_NS=seeds)
        assert ids[:, : min(4, bad)].tolist() == [broken[:4].tolist()] * 4
        assert logits[:, : min(4, bad)].isnan().all()


def test_minus_infinity_in_the_bias_bans_ids() -> None:
    hidden, head, bias = torch.randn(4, 8), torch.randn(60, 8), torch.zeros(60)
    bias[10:] = -torch.inf
    logits, ids = triton_topk(hidden, head, 12, bias_V=bias)
    assert ids[:, :10].sort().values.tolist() == [list(range(10))] * 4
    assert ids[:, 10:].tolist() == [[10, 11]] * 4
    assert bool((logits[:, 10:] == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 300).to(dtype)
    logits[1], logits[2, 250:], logits[3, 7], logits[4, ::2] = 1.0, torch.nan, torch.inf, -0.0
    wide = logits.float()
    order = wide.where(wide == wide, torch.inf)  # NaN first; no inf in its row
    wanted = brute_topk(order, 9)[1]
    found = search(TritonGiven.of(logits), 9, 300, spare=9)
    assert torch.equal(found.top.ids_NK, wanted)
    assert torch.equal(found.top.raw_NK.nan_to_num(nan=5.0), wide.gather(1, wanted).nan_to_num(5.0))
    assert found.fallback == 0


def test_keys_order_values_then_ids() -> None:
    values = torch.tensor([-torch.inf, -2.0, -1e-45, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan])
    bits = order_bits(values)
    assert bool((bits[1:] >= bits[:-1]).all())
    assert (bits.diff() == 0).tolist() == [False, False, False, True, False, False, False, False]
    assert order_bits(-values[-1:]) == bits[-1]
    keys = pack(values, torch.arange(9))
    raw, ids = unpack(keys)
    assert torch.equal(raw.nan_to_num(nan=7.0), values.nan_to_num(nan=7.0))
    assert torch.equal(ids, torch.arange(9))
    assert bool((pack(torch.ones(3), torch.tensor([0, 5, 9])).diff() < 0).all())
    assert unpack(pack(torch.ones(1), torch.tensor([-1])))[1] == -1


def test_views_stay_as_they_are() -> None:
    wide_hidden, wide_head = torch.randn(8, 40), torch.randn(16, 200)
    hidden, head = wide_hidden[::2, 3:19], wide_head.t()
    before = wide_hidden.clone(), wide_head.clone()
    got = triton_topk(hidden, head, 6)
    assert torch.equal(before[0], wide_hidden)
    assert torch.equal(before[1], wide_head)
    assert_same(got, triton_topk(hidden.contiguous(), head.contiguous(), 6))


def test_no_rows() -> None:
    logits, ids = triton_topk(torch.randn(0, 8), torch.randn(50, 8), 3)
    assert logits.shape == ids.shape == (0, 3)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'triton' cannot serve.*k is 129.*'torch' can"):
        triton_topk(torch.zeros(1, 8), torch.zeros(200, 8), 129)
    with pytest.raises(ValueError, match=r"float64; 'torch' can"):
        triton_topk(torch.zeros(1, 8).double(), torch.zeros(200, 8).double(), 9)
