from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import Linear, top_ids
from unteach.kernels.candidate_pool import CandidatePool
from unteach.kernels.fixed_dot import gather_dot
from unteach.kernels.linear_topk import linear_topk, linear_topk_reference
from unteach.kernels.logit_source import GivenSource, LinearSource
from unteach.kernels.topk_filter import exact_topk, tile_width


def exact_scores(hidden: Tensor, head: Tensor) -> Tensor:
    """The deciding value of every id."""
    n, v = hidden.shape[0], head.shape[0]
    rows, ids = torch.arange(n).repeat_interleave(v), torch.arange(v).repeat(n)
    return gather_dot(hidden, head, rows, ids, torch.float32).view(n, v)


def brute_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0])


# One tile or five (5003 = 4 · 1024 + 907); K = 1, K no power of two, K = V; D not a multiple of 8.
@pytest.mark.parametrize(
    ("n", "d", "v", "k"),
    [(1, 8, 40, 1), (7, 24, 300, 5), (3, 16, 40, 40), (9, 33, 5003, 12), (2, 4, 5003, 5003)],
)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_values_and_ids_match_the_oracle(n: int, d: int, v: int, k: int, options: str) -> None:
    hidden, head, bias = torch.randn(n, d), torch.randn(v, d), torch.randn(v)
    extra = {} if options == "plain" else {"bias_V": bias, "softcap": 3.0, "scale": 0.7}
    vocab = v if options == "plain" or k == v else v - 3
    logits, ids = linear_topk(hidden, head, k, vocab=vocab, **extra)
    student = Linear(
        hidden.double().numpy(),
        head.double().numpy(),
        bias.double().numpy() if extra else None,
        extra.get("scale", 1.0),
        extra.get("softcap"),
    )
    raw, final = student.raw(), student.final()
    assert ids.tolist() == [top_ids(row, k, vocab) for row in raw]
    np.testing.assert_allclose(logits, np.take_along_axis(final, ids.numpy(), 1), atol=2e-5)
    assert ids.dtype == torch.int64
    assert logits.dtype == torch.float32
    reference = linear_topk_reference(hidden, head, k, vocab=vocab, **extra)
    torch.testing.assert_close(logits, reference[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_select_by_exact_products(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(5, 24).to(dtype), torch.randn(2100, 24).to(dtype)
    logits, ids = linear_topk(hidden, head, 9)
    raw = Linear(hidden.double().numpy(), head.double().numpy()).raw()
    assert ids.tolist() == [top_ids(row, 9, 2100) for row in raw]
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def seed_sets(ids: Tensor, v: int) -> dict[str, Tensor | None]:
    n, k = ids.shape
    return {
        "absent": None,
        "good": ids,
        "empty": torch.zeros(n, 0, dtype=torch.int64),
        "few": ids[:, : k - 1],
        "duplicated": ids[:, :1].repeat(1, 3 * k),
        "none": torch.full((n, k), -1),
        "out of range": ids + v,
        "far out of range": torch.full((n, 2 * k), 2**40),
        "random": torch.randint(-5, v + 5, (n, 2 * k)),
        "worst": torch.arange(2 * k).repeat(n, 1),
        "some rows only": torch.where(torch.arange(n)[:, None] % 2 == 0, ids, -1),
        "int32": ids.int(),
        "int16": ids.short(),
    }


@pytest.mark.parametrize("kind", list(seed_sets(torch.zeros(1, 2, dtype=torch.int64), 1)))
def test_seeds_change_no_bit(kind: str) -> None:
    hidden, head = torch.randn(11, 48), torch.randn(5003, 48)
    plain = linear_topk(hidden, head, 10)
    assert_same(plain, brute_topk(exact_scores(hidden, head), 10))
    assert_same(linear_topk(hidden, head, 10, seeds_NS=seed_sets(plain[1], 5003)[kind]), plain)


def test_batch_and_threads_change_no_bit() -> None:
    hidden, head = torch.randn(600, 20), torch.randn(2500, 20)
    logits, ids = linear_topk(hidden, head, 7)  # two blocks of rows
    for rows in (torch.tensor([599]), torch.randperm(600)[:13], torch.arange(511, 514)):
        assert_same(linear_topk(hidden[rows], head, 7), (logits[rows], ids[rows]))
    torch.set_num_threads(2)
    try:
        assert_same(linear_topk(hidden, head, 7), (logits, ids))
    finally:
        torch.set_num_threads(1)


def blurred(kind: str) -> tuple[Tensor, Tensor]:
    """Logits whose order depends on the order of additions."""
    n, v, d = 6, 5003, 64
    if kind == "cancelling":
        # ±1e4 products cancel: the product errs by 1e-3 where neighbours differ by 1e-4
        hidden, head = torch.randn(n, d), torch.randn(v, d)
        hidden[:, ::2] = 100 + hidden[:, ::2]
        head[:, 0:32:2] += 100
        head[:, 32::2] -= 100
        return hidden, head
    # one direction, tiny differences
    head = torch.randn(1, d) + 1e-6 * torch.randn(v, d)
    return torch.randn(n, d), head


@pytest.mark.parametrize("kind", ["cancelling", "crowded"])
@pytest.mark.parametrize("seeded", [False, True])
def test_rounding_of_tiles_never_decides(kind: str, seeded: bool) -> None:
    hidden, head = blurred(kind)
    wanted = brute_topk(exact_scores(hidden, head), 17)
    seeds = wanted[1] if seeded else None
    assert_same(linear_topk(hidden, head, 17, seeds_NS=seeds), wanted)


def test_tiles_may_be_off_by_their_slack() -> None:
    """A product as wrong as its bound allows, in whichever direction hurts, changes nothing."""

    class Noisy(LinearSource):
        def take(self, rows: slice | Tensor) -> Noisy:
            return Noisy(self.hidden_ND[rows], self.head_VD, None, 1.0, self.dtype)

        def slack(self, start: int, stop: int) -> Tensor:
            return torch.full((self.rows,), 0.3)

        def tile(self, start: int, stop: int) -> Tensor:
            x = super().tile(start, stop)
            return x + 0.29 * torch.randn_like(x).sign()

    hidden, head = torch.randn(20, 16), torch.randn(5003, 16)
    wanted = brute_topk(exact_scores(hidden, head), 11)
    noisy = Noisy(hidden, head, None, 1.0, torch.float32)
    for seeds in (None, wanted[1], wanted[1].flip(1) + 1):
        top = exact_topk(noisy, 11, 5003, tile=1024, seeds_NS=seeds, spare=11)
        assert_same((top.raw_NK, top.ids_NK), wanted)


def test_lower_matmul_precision_widens_the_slack() -> None:
    source = LinearSource(torch.randn(3, 8), torch.randn(50, 8), None, 1.0, torch.float32)
    narrow = source.slack(0, 50)
    torch.set_float32_matmul_precision("medium")
    try:
        wide = source.slack(0, 50)
    finally:
        torch.set_float32_matmul_precision("highest")
    # bf16 inputs: two roundings of 2^-8 each side of the product
    norms = torch.linalg.vector_norm(source.hidden_ND, dim=1) * source.head_VD.norm(dim=1).max()
    assert bool((wide >= 2 * 2**-8 * norms).all())
    assert bool((narrow < 1e-3 * wide).all())


def test_autocast_does_not_reach_the_search() -> None:
    hidden, head = torch.randn(9, 32), torch.randn(3000, 32)
    plain = linear_topk(hidden, head, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(linear_topk(hidden, head, 8), plain)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_vocabulary(order: str) -> None:
    # ascending is the worst case of a running floor: every tile beats all before it
    line = torch.linspace(-3, 3, 9001)
    head = (line if order == "ascending" else line.flip(0))[:, None].repeat(1, 2)
    hidden = torch.rand(5, 2) + 0.1
    assert_same(linear_topk(hidden, head, 30), brute_topk(exact_scores(hidden, head), 30))


def test_exact_ties_go_to_the_smaller_id() -> None:
    hidden = torch.randint(-2, 3, (8, 6)).float()
    head = torch.randint(-2, 3, (3000, 6)).float()  # a few dozen distinct logits
    raw = Linear(hidden.double().numpy(), head.double().numpy()).raw()
    for seeds in (None, torch.randint(3000, (8, 50))):
        _, ids = linear_topk(hidden, head, 33, seeds_NS=seeds)
        assert ids.tolist() == [top_ids(row, 33, 3000) for row in raw]


# One side's squares over- or underflow float32; the logits do not.
OUT_OF_REACH = [(1e12, 1e-24), (1e-24, 1e12), (1e-15, 1e20), (1e20, 1e-15)]


def nearly_tied(hidden_size: float, head_size: float) -> tuple[Tensor, Tensor]:
    """Logits so close that rounding a product decides their order."""
    head = torch.randn(1, 64) + 1e-6 * torch.randn(1500, 64)
    return hidden_size * torch.randn(8, 64), head_size * head


@pytest.mark.parametrize("sizes", OUT_OF_REACH)
def test_norms_out_of_range_do_not_let_seeds_decide(sizes: tuple[float, float]) -> None:
    hidden, head = nearly_tied(*sizes)
    wanted = brute_topk(exact_scores(hidden, head), 17)
    good = brute_topk(exact_scores(hidden, head), 34)[1]
    for seeds in (None, good, torch.randint(1500, (8, 40))):
        assert_same(linear_topk(hidden, head, 17, seeds_NS=seeds), wanted)


@pytest.mark.parametrize("kind", ["zero hidden", "zero head", "one row", "given"])
def test_equal_logits_overflow_into_the_exhaustive_search(kind: str) -> None:
    hidden, head = torch.randn(70, 5), torch.randn(2500, 5)
    if kind == "zero hidden":
        hidden[::2] = 0
    elif kind == "zero head":
        head.zero_()
    else:
        head = head[:1].repeat(2500, 1)
    source = LinearSource(hidden, head, None, 1.0, torch.float32)
    if kind == "given":
        source = GivenSource(torch.ones(70, 2500), torch.float32)
    top = exact_topk(source, 9, 2500, tile=tile_width(9, 2500), spare=9)
    equal = slice(0, 70, 2) if kind == "zero hidden" else slice(0, 70)
    assert torch.equal(top.ids_NK[equal], torch.arange(9).repeat(70, 1)[equal])
    assert top.fallback == (35 if kind == "zero hidden" else 70)
    if kind == "zero hidden":
        wanted = brute_topk(exact_scores(hidden, head), 9)
        assert_same((top.raw_NK, top.ids_NK), wanted)


def test_exhaustive_search_alone_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(70, 12), torch.randn(3000, 12)
    head[1000:1400] = head[2000:2400]
    wanted = brute_topk(exact_scores(hidden, head), 25)
    monkeypatch.setattr(CandidatePool, "_crowded", lambda self, hits: ~self.lost_N)
    assert_same(linear_topk(hidden, head, 25), wanted)


def test_padding_rows_are_never_selected() -> None:
    hidden, head = torch.randn(6, 16), torch.randn(300, 16)
    head[280:] = 50 * hidden.mean(0)
    head[290:] = torch.nan
    seeds = torch.arange(275, 300).repeat(6, 1)
    got = linear_topk(hidden, head, 12, vocab=280, seeds_NS=seeds)
    assert_same(got, linear_topk(hidden, head[:280], 12))


def test_runners_up_are_the_next_best() -> None:
    hidden, head = torch.randn(9, 32), torch.randn(2000, 32)
    source = LinearSource(hidden, head, None, 1.0, torch.float32)
    _, ids = brute_topk(exact_scores(hidden, head), 40)
    cold = exact_topk(source, 20, 2000, tile=2048, spare=20)
    assert torch.equal(cold.spare_NR, ids[:, 20:])
    # good seeds leave little in the pool; the seeds themselves then come next
    warm = exact_topk(source, 20, 2000, tile=2048, spare=20, seeds_NS=ids)
    assert torch.equal(warm.spare_NR.sort().values, ids[:, 20:].sort().values)
    for top in (cold, exact_topk(source, 20, 2000, tile=512, spare=30, seeds_NS=ids[:, 5:])):
        both = torch.cat((top.ids_NK, top.spare_NR), 1)
        both = torch.where(both < 0, 10_000 + torch.arange(both.shape[1]), both)
        assert all(len(set(row)) == len(row) for row in both.tolist())


def test_rows_that_are_not_finite_give_nan_at_the_first_ids() -> None:
    hidden, head = torch.randn(6, 8), torch.randn(3000, 8)
    clean = linear_topk(hidden, head, 4)
    hidden[1, 3], hidden[4, 0] = torch.nan, torch.inf
    logits, ids = linear_topk(hidden, head, 4, seeds_NS=clean[1])
    assert logits[[1, 4]].isnan().all()
    assert ids[[1, 4]].tolist() == [[0, 1, 2, 3]] * 2
    rest = torch.tensor([0, 2, 3, 5])
    assert_same((logits[rest], ids[rest]), (clean[0][rest], clean[1][rest]))


@pytest.mark.parametrize("bad", [1, 1500, 3000])
def test_nan_in_the_head_comes_first_and_ends(bad: int) -> None:
    hidden, head = torch.randn(6, 8), torch.randn(3000, 8)
    broken = torch.randperm(3000)[:bad].sort().values
    head[broken, 2] = torch.nan
    for seeds in (None, torch.randint(3000, (6, 9))):
        logits, ids = linear_topk(hidden, head, 4, seeds_NS=seeds)
        assert ids[:, : min(4, bad)].tolist() == [broken[:4].tolist()] * 6
        assert logits[:, : min(4, bad)].isnan().all()


def test_minus_infinity_in_the_bias_bans_ids() -> None:
    hidden, head, bias = torch.randn(5, 8), torch.randn(60, 8), torch.zeros(60)
    bias[10:] = -torch.inf
    logits, ids = linear_topk(hidden, head, 12, bias_V=bias)
    assert ids[:, :10].sort().values.tolist() == [list(range(10))] * 5
    assert ids[:, 10:].tolist() == [[10, 11]] * 5
    assert bool((logits[:, 10:] == -torch.inf).all())


def test_no_rows() -> None:
    logits, ids = linear_topk(torch.randn(0, 8), torch.randn(50, 8), 3)
    assert logits.shape == ids.shape == (0, 3)


def test_inputs_may_be_views_and_stay_as_they_are() -> None:
    wide_hidden, wide_head, bias = torch.randn(12, 40), torch.randn(16, 700), torch.randn(700)
    hidden, head = wide_hidden[::2, 3:19], wide_head.t()
    before = wide_hidden.clone(), wide_head.clone(), bias.clone()
    got = linear_topk(hidden, head, 6, scale=2.0, bias_V=bias)
    assert torch.equal(before[0], wide_hidden)
    assert torch.equal(before[1], wide_head)
    assert torch.equal(before[2], bias)
    hidden, head = hidden.contiguous(), head.contiguous()
    assert_same(got, linear_topk(hidden, head, 6, scale=2.0, bias_V=bias))


def test_an_integer_of_numpy_is_an_integer() -> None:
    hidden, head = torch.randn(3, 8), torch.randn(40, 8)
    got = linear_topk(hidden, head, np.int64(4), vocab=np.int32(30))  # type: ignore[arg-type]
    assert_same(got, linear_topk(hidden, head, 4, vocab=30))


H, W = torch.zeros(4, 8), torch.zeros(50, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((H, W, 0), {}, "k must be an integer from 1 to 50.*got 0"),
        ((H, W, 51), {}, "from 1 to 50.*got 51"),
        ((H, W, 2.0), {}, "got 2.0"),
        ((H, W, 9), {"vocab": 8}, "from 1 to 8.*got 9"),
        ((H, W, 3), {"vocab": 51}, "vocab.*1 to 50, got 51"),
        ((H, W, 3), {"vocab": 0}, "vocab.*got 0"),
        ((H[0], W, 3), {}, r"hidden_ND must have two dimensions.*\(8,\)"),
        ((H, W[:, :7], 3), {}, "width 8 but head_VD has width 7"),
        ((H.bfloat16(), W, 3), {}, "bfloat16.*float32"),
        ((H.int(), W.int(), 3), {}, "int32"),
        ((H, W, 3), {"scale": 0.0}, "scale.*got 0.0"),
        ((H, W, 3), {"scale": float("nan")}, "scale.*got nan"),
        ((H, W, 3), {"softcap": -1.0}, "softcap.*got -1.0"),
        ((H, W, 3), {"bias_V": torch.zeros(49)}, r"bias_V.*\(50,\), got \(49,\)"),
        ((H, W, 3), {"seeds_NS": torch.zeros(3, 6).long()}, "seeds_NS.*4 rows"),
        ((H, W, 3), {"seeds_NS": torch.zeros(4, 6)}, "seeds_NS must hold integers"),
        ((H, W.to("meta"), 3), {}, "head_VD is on meta, expected cpu"),
        ((H, W, 3), {"backend": "cuda"}, "'auto', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_topk(*arguments, **options)
