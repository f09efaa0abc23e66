from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import oracle
from unteach.kernels import bitopk as bitopk_module
from unteach.kernels.bitopk import (
    BitopkOutput,
    HiddenTeacher,
    LogitsTeacher,
    SparseTeacher,
    bitopk_loss,
    bitopk_loss_reference,
)
from unteach.kernels.linear_topk import linear_topk
from unteach.kernels.logit_source import LinearSource

FORMS = ["hidden", "ids", "cached", "logits", "logits bf16", "sparse"]


@dataclass(frozen=True)
class Problem:
    """A student, a teacher of another width, and all that both loss and oracle are told."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    teacher: oracle.Linear
    form: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    teacher_vocab: int | None = None

    @property
    def k(self) -> int:
        return int(self.options["k"])

    @property
    def vocab(self) -> int:
        limit = self.head.shape[0]
        if self.form != "sparse" and self.teacher_vocab is not None:
            limit = min(limit, self.teacher_vocab)
        return int(self.options.get("vocab") or limit)


def make_problem(
    form: str,
    shape: tuple[int, int, int, int] = (7, 16, 61, 5),
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    teacher_vocab: int | None = None,
    **options: Any,
) -> Problem:
    n, d, v, k = shape
    v_t = teacher_vocab or v
    hidden = torch.randn(n, d).to(dtype)
    # the teacher is a blurred student, two columns wider, so that the sets overlap in part
    head_t = torch.randn(v_t, d + 2)
    head = (head_t[:v, :d] if v <= v_t else torch.cat((head_t[:, :d], torch.randn(v - v_t, d)))).to(
        dtype
    )
    hidden_t = torch.cat((hidden.float() + 0.4 * torch.randn(n, d), 0.3 * torch.randn(n, 2)), 1)
    teacher = oracle.Linear(
        hidden_t.to(dtype).double().numpy(),
        head_t.to(dtype).double().numpy(),
        torch.randn(v_t).double().numpy() if bias else None,
        options.get("scale", 1.0),
        options.get("softcap"),
    )
    student_bias = torch.randn(v) if bias else None
    return Problem(
        hidden, head, student_bias, teacher, form, {"k": k, **options}, dtype, teacher_vocab
    )


def listed(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """The teacher's own top ids and final logits, as a cache would hold them."""
    raw, final = problem.teacher.raw(), problem.teacher.final()
    vocab = min(problem.options.get("vocab") or raw.shape[1], raw.shape[1])
    found = [oracle.top_ids(row, min(count, vocab), vocab) for row in raw]
    ids = np.array(found, dtype=np.int64).reshape(raw.shape[0], min(count, vocab))
    return torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(final, ids, 1)).float()


def make_teacher(problem: Problem) -> HiddenTeacher | LogitsTeacher | SparseTeacher:
    side = problem.teacher
    hidden, head = (torch.from_numpy(x).to(problem.dtype) for x in (side.hidden, side.head))
    bias = None if side.bias is None else torch.from_numpy(side.bias).float()
    ids, logits = listed(problem, problem.k + 4)
    if problem.form == "hidden":
        return HiddenTeacher(hidden, head, bias_V=bias)
    if problem.form == "ids":
        return HiddenTeacher(hidden, head, ids, bias_V=bias)
    if problem.form == "cached":
        return HiddenTeacher(hidden, head, ids.int(), logits, bias_V=bias)
    if problem.form == "sparse":
        return SparseTeacher(ids, logits)
    full = torch.from_numpy(side.final()).float()
    return LogitsTeacher(full.bfloat16() if problem.form == "logits bf16" else full)


def expected(problem: Problem, teacher: Any = None) -> oracle.Result:
    """What the oracle says; of a listed teacher it is told what the list says."""
    options = dict(problem.options)
    student = oracle.Linear(
        problem.hidden.double().numpy(),
        problem.head.double().numpy(),
        None if problem.bias is None else problem.bias.double().numpy(),
        options.pop("scale", 1.0),
        options.pop("softcap", None),
    )
    options.pop("vocab", None)
    weight, normalizer = options.pop("weight_N", None), options.pop("normalizer", None)
    teacher = make_teacher(problem) if teacher is None else teacher
    raw, final, k = problem.teacher.raw(), problem.teacher.final(), problem.k
    if isinstance(teacher, LogitsTeacher):
        final = teacher.logits_NV.double().numpy()
        answers = oracle.full_teacher(final, final, k, problem.vocab)
    elif teacher.ids_NM is None:
        answers = oracle.full_teacher(raw, final, k, problem.vocab)
    else:
        ids = teacher.ids_NM.long().numpy()
        beside = None if isinstance(teacher, SparseTeacher) else final
        logits = teacher.logits_NM
        if logits is None:
            ids = ids[:, :k]
            inside = np.clip(ids, 0, final.shape[1] - 1)
            logits = torch.from_numpy(np.take_along_axis(final, inside, 1))
        answers = oracle.listed_teacher(ids, logits.double().numpy(), k, problem.vocab, beside)
    return oracle.bitopk(
        student,
        answers,
        alpha=options.pop("alpha", 1.0),
        beta=options.pop("beta", 1.0),
        vocab=problem.vocab,
        weight=None if weight is None else weight.double().numpy(),
        normalizer=None if normalizer is None else float(normalizer),
        **options,
    )


@dataclass(frozen=True)
class Run:
    output: BitopkOutput
    hidden: Tensor
    head: Tensor
    bias: Tensor | None


def run(
    problem: Problem,
    teacher: Any = None,
    loss: Callable[..., BitopkOutput] = bitopk_loss,
    **extra: Any,
) -> Run:
    leaves = [problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()]
    if problem.bias is not None:
        leaves.append(problem.bias.clone().requires_grad_())
    teacher = make_teacher(problem) if teacher is None else teacher
    bias = leaves[2] if problem.bias is not None else None
    output = loss(leaves[0], leaves[1], teacher, bias_V=bias, **problem.options, **extra)
    output.loss.backward()
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    return Run(output, grads[0], grads[1], grads[2] if problem.bias is not None else None)


def close(got: Tensor, wanted: oracle.Array, relative: float) -> None:
    """Largest error against the largest entry."""
    scale = max(np.abs(wanted).max(initial=0.0), 1e-3)
    error = np.abs(got.detach().double().numpy() - wanted).max(initial=0.0)
    assert error <= relative * scale, f"error {error:.3g}, largest entry {scale:.3g}"


def assert_matches_oracle(problem: Problem, teacher: Any = None, **extra: Any) -> Run:
    wanted, got = expected(problem, teacher), run(problem, teacher, **extra)
    half = problem.dtype in (torch.bfloat16, torch.float16)
    close(got.output.loss, np.array(wanted.loss), 2e-5)
    close(got.output.row_loss_N, wanted.rows, 2e-5)
    close(got.hidden, wanted.hidden, 2**-8 if half else 2e-5)
    close(got.head, wanted.head, 2**-8 if half else 2e-5)
    if got.bias is not None:
        close(got.bias, wanted.bias, 2e-5)
    np.testing.assert_allclose(got.output.coverage_N, wanted.coverage, atol=1e-6)
    weight = problem.options.get("weight_N")
    for r, ids in enumerate(wanted.student):
        if weight is None or weight[r] != 0:
            assert got.output.student_ids_NS[r, : len(ids)].tolist() == ids
    return got


def assert_same_bits(one: Run, two: Run, *, spare: bool = False) -> None:
    for a, b in zip(one.output, two.output, strict=True):
        if a.dtype == torch.int32 and not spare:
            a, b = a[:, : a.shape[1] // 2], b[:, : b.shape[1] // 2]
        assert torch.equal(a, b)
    assert torch.equal(one.hidden, two.hidden)
    assert torch.equal(one.head, two.head)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha 0": {"alpha": 0.0},
    "alpha 0.7, beta 0.5": {"alpha": 0.7, "beta": 0.5},
    "beta 0": {"beta": 0.0},
    "beta 2, scale": {"beta": 2.0, "scale": 0.6},
    "bias": {"bias": True},
    "soft cap": {"softcap": 4.0, "bias": True, "scale": 1.3, "alpha": 0.4},
    "centre": {"center": True},
    "centre alpha 0": {"center": True, "alpha": 0.0, "beta": 0.5},
    "gate": {"gate": 0.5},
    "gate wide open": {"gate": 1e-6},
    "all": {
        "center": True,
        "gate": 0.9,
        "softcap": 5.0,
        "bias": True,
        "scale": 0.8,
        "alpha": 0.7,
        "beta": 0.5,
        "normalizer": 3.5,
        "vocab": 50,
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_value_and_gradients_match_the_oracle(form: str, variant: str) -> None:
    problem = make_problem(form, **VARIANTS[variant])
    got = assert_matches_oracle(problem)
    if "alpha" in problem.options and problem.options["alpha"] == 0:
        assert got.output.student_ids_NS.shape == (7, 0)
    assert got.output.student_ids_NS.dtype == torch.int32


@pytest.mark.parametrize("form", FORMS)
# K = 1, K = V, one row, five tiles (5003 = 4·1024 + 907), D no multiple of 8
@pytest.mark.parametrize(
    "shape", [(3, 8, 40, 1), (3, 8, 40, 40), (1, 33, 300, 7), (6, 9, 5003, 12)]
)
def test_shapes(form: str, shape: tuple[int, int, int, int]) -> None:
    assert_matches_oracle(make_problem(form, shape, alpha=0.7, center=True, gate=0.6))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_reference_matches_the_oracle(form: str, variant: str) -> None:
    problem = make_problem(form, **VARIANTS[variant])
    assert_matches_oracle(problem, loss=bitopk_loss_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["hidden", "ids", "logits", "sparse"])
def test_dtypes(dtype: torch.dtype, form: str) -> None:
    problem = make_problem(form, (6, 24, 300, 9), dtype=dtype, softcap=6.0, bias=True)
    got = assert_matches_oracle(problem)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.output.loss.dtype == got.output.row_loss_N.dtype == wide


def test_teacher_may_be_of_another_dtype() -> None:
    problem = make_problem("hidden", (5, 16, 90, 6))
    side = problem.teacher
    half = HiddenTeacher(
        torch.from_numpy(side.hidden).bfloat16(), torch.from_numpy(side.head).bfloat16()
    )
    rounded = oracle.Linear(half.hidden_NE.double().numpy(), half.head_VE.double().numpy())
    assert_matches_oracle(replace(problem, teacher=rounded), half)


@pytest.mark.parametrize("teacher_vocab", [45, 80])
@pytest.mark.parametrize("form", ["hidden", "ids", "cached", "logits"])
def test_only_ids_that_both_vocabularies_have(form: str, teacher_vocab: int) -> None:
    assert_matches_oracle(make_problem(form, teacher_vocab=teacher_vocab, alpha=0.7))


@pytest.mark.parametrize("form", ["hidden", "cached", "logits", "sparse"])
def test_padding_rows_are_never_selected(form: str) -> None:
    problem = make_problem(form, (6, 16, 80, 5), vocab=70)
    problem.head[70:] = 9 * problem.hidden.mean(0)
    problem.teacher.head[70:] = 9 * problem.teacher.hidden.mean(0)
    got = assert_matches_oracle(problem, seeds_NS=torch.arange(60, 80).repeat(6, 1))
    assert int(got.output.student_ids_NS.max()) < 70
    assert not got.head[70:].any()


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_normalizer(form: str) -> None:
    weight = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.0, 0.3, 1.0])
    for normalizer in (3.0, torch.tensor(3.0), torch.tensor(3)):
        problem = make_problem(form, weight_N=weight, normalizer=normalizer, center=True)
        got = assert_matches_oracle(problem)
        assert not got.output.row_loss_N[[1, 4]].any()
        assert bool((got.output.student_ids_NS[[1, 4]] == -1).all())
        assert not got.hidden[[1, 4]].any()


def test_ignored_rows_are_dropped_rows() -> None:
    weight = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    problem = make_problem("ids", weight_N=weight, normalizer=4.0)
    problem.hidden[0], problem.teacher.hidden[2] = torch.nan, np.inf
    kept = weight.nonzero().squeeze(1)
    dropped = replace(
        problem,
        hidden=problem.hidden[kept],
        teacher=replace(problem.teacher, hidden=problem.teacher.hidden[kept.numpy()]),
        options={"k": 5},
    )
    clean = make_teacher(dropped)
    assert isinstance(clean, HiddenTeacher)
    ids = torch.zeros(7, clean.ids_NM.shape[1], dtype=torch.int64)
    ids[kept] = clean.ids_NM
    teacher = HiddenTeacher(torch.from_numpy(problem.teacher.hidden).float(), clean.head_VE, ids)
    masked, wanted = run(problem, teacher), run(dropped, clean)
    assert torch.equal(masked.output.loss, wanted.output.loss)
    assert torch.equal(masked.hidden[kept], wanted.hidden)
    assert torch.equal(masked.head, wanted.head)
    assert not masked.hidden[weight == 0].any()


def test_all_rows_ignored() -> None:
    zero = torch.tensor(0.0)
    got = run(make_problem("ids", weight_N=torch.zeros(7), normalizer=zero))
    assert got.output.loss == 0
    assert not got.hidden.any()
    assert not got.head.any()


def seed_kinds(ids: Tensor, v: int) -> dict[str, Tensor | None]:
    n, k = ids.shape
    return {
        "absent": None,
        "stale": torch.where(torch.rand(n, k) < 0.3, torch.randint(v, (n, k)), ids),
        "duplicated": ids[:, :2].repeat(1, k),
        "out of range": torch.cat((ids + v, ids - v), 1),
        "minus one": torch.full((n, 2 * k), -1),
        "random": torch.randint(v, (n, 2 * k)),
        "exact": ids,
        "uint8": (ids % 256).to(torch.uint8),
    }


@pytest.mark.parametrize("form", FORMS)
def test_seeds_change_no_bit(form: str) -> None:
    shape = (9, 40, 5003, 12)
    problem = make_problem(form, shape, alpha=0.7, center=True, gate=0.7, softcap=9.0)
    plain = run(problem)
    for seeds in seed_kinds(plain.output.student_ids_NS.long(), 5003).values():
        assert_same_bits(run(problem, seeds_NS=seeds), plain)


def assert_default_dtype_changes_no_bit(form: str, dtype: torch.dtype, **extra: Any) -> None:
    """A script that builds its model in another dtype gets the same loss, and buffers as wide."""
    problem = make_problem(form, alpha=0.7, center=True, gate=0.6)
    teacher = make_teacher(problem)
    wanted, default = run(problem, teacher, **extra), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = run(problem, teacher, **extra)
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(got.output, wanted.output, strict=True):
        assert a.dtype == b.dtype
    assert_same_bits(got, wanted, spare=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loss", [bitopk_loss, bitopk_loss_reference])
def test_the_default_dtype_changes_no_bit(
    form: str, dtype: torch.dtype, loss: Callable[..., BitopkOutput]
) -> None:
    assert_default_dtype_changes_no_bit(form, dtype, loss=loss)


@pytest.mark.parametrize("form", ["hidden", "cached", "logits"])
def test_running_twice_changes_no_bit(form: str) -> None:
    problem = make_problem(form, (40, 24, 3000, 9), gate=0.5)
    assert_same_bits(run(problem), run(problem), spare=True)


@pytest.mark.parametrize("form", FORMS)
def test_batch_and_threads_change_no_bit_of_a_row(form: str) -> None:
    options = {"alpha": 0.7, "center": True, "gate": 0.7, "softcap": 9.0, "normalizer": 2.0}
    problem = make_problem(form, (530, 11, 2100, 6), **options)  # two blocks of rows
    whole = run(problem)
    for rows in (torch.tensor([529]), torch.arange(505, 519), torch.randperm(530)[:77]):
        side = replace(problem.teacher, hidden=problem.teacher.hidden[rows.numpy()])
        part = run(replace(problem, hidden=problem.hidden[rows], teacher=side))
        assert torch.equal(part.output.row_loss_N, whole.output.row_loss_N[rows])
        assert torch.equal(part.hidden, whole.hidden[rows])
        ids = whole.output.student_ids_NS[rows]
        assert torch.equal(part.output.student_ids_NS[:, :6], ids[:, :6])
    torch.set_num_threads(2)
    try:
        assert_same_bits(run(problem), whole, spare=True)
    finally:
        torch.set_num_threads(1)


def test_next_seeds_are_the_top_ids_from_a_cold_start() -> None:
    problem = make_problem("ids", (8, 32, 1000, 10))  # one tile: nothing is overlooked
    ids = run(problem).output.student_ids_NS
    _, wanted = linear_topk(problem.hidden, problem.head, 20)
    assert torch.equal(ids.long(), wanted)
    warm = run(problem, seeds_NS=ids).output.student_ids_NS
    assert torch.equal(warm.sort().values, ids.sort().values)


def test_next_seeds_are_near_the_top_and_distinct() -> None:
    problem = make_problem("ids", (8, 32, 5003, 10))
    ids = run(problem).output.student_ids_NS.long()
    _, wanted = linear_topk(problem.hidden, problem.head, 60)
    assert torch.equal(ids[:, :10], wanted[:, :10])
    for row, near in zip(ids.tolist(), wanted.tolist(), strict=True):
        assert len(set(row)) == 20
        assert set(row) <= set(near)


def test_exact_ties_go_to_the_smaller_id() -> None:
    problem = make_problem("hidden", (9, 6, 700, 33), alpha=0.7)
    problem.hidden[:] = torch.randint(-2, 3, (9, 6))
    problem.head[:] = torch.randint(-2, 3, (700, 6))
    problem.teacher.hidden[:] = np.random.default_rng(0).integers(-2, 3, (9, 8))
    problem.teacher.head[:] = np.random.default_rng(1).integers(-2, 3, (700, 8))
    for form in ("hidden", "ids", "logits", "logits bf16", "sparse"):
        assert_matches_oracle(replace(problem, form=form))


@pytest.mark.parametrize("form", ["hidden", "ids", "logits"])
def test_all_equal_logits(form: str) -> None:
    problem = make_problem(form, (5, 8, 3000, 6))
    problem.head[:] = problem.head[:1].clone()
    problem.teacher.head[:] = problem.teacher.head[:1].copy()
    got = assert_matches_oracle(problem)
    assert int(got.output.fallback_rows) == (5 if form == "ids" else 10)
    assert got.output.student_ids_NS[:, :6].tolist() == [list(range(6))] * 5


def test_repeated_and_foreign_teacher_ids() -> None:
    problem = make_problem("cached", (4, 16, 50, 4))
    ids = torch.tensor([[3, 3, 9, 3, 9, 1], [-1, 7, 99, 7, 8, 8], [-100] * 6, [5, 2, 5, 2, 1, 0]])
    logits = torch.randn(4, 6)
    side = problem.teacher
    hidden, head = (torch.from_numpy(x).float() for x in (side.hidden, side.head))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        typed = ids.to(dtype)
        for teacher in (
            SparseTeacher(typed, logits),
            HiddenTeacher(hidden, head, typed, logits),
            HiddenTeacher(hidden, head, typed),
        ):
            form = "sparse" if isinstance(teacher, SparseTeacher) else "cached"
            for options in ({"alpha": 0.7, "center": True, "gate": 0.8}, {"alpha": 0.0}):
                case = replace(problem, form=form, options={"k": 4, **options})
                assert_matches_oracle(case, teacher)
                reference = run(case, teacher, loss=bitopk_loss_reference)
                close(reference.hidden, expected(case, teacher).hidden, 2e-5)


def test_no_dense_pass_without_the_student_term(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: LinearSource, start: int, stop: int) -> Tensor:
        raise AssertionError("a tile was computed")

    problem = make_problem("ids", alpha=0.0)
    wanted = run(problem)
    monkeypatch.setattr(LinearSource, "tile", forbidden)
    assert_same_bits(run(problem), wanted)
    with pytest.raises(AssertionError, match="a tile was computed"):
        run(replace(problem, options={"k": 5}))


def test_nothing_is_computed_for_who_wants_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem("ids", bias=True)
    teacher, wanted = make_teacher(problem), run(problem)
    assert problem.bias is not None
    hidden = problem.hidden.clone().requires_grad_()

    def forbidden(*arguments: Any) -> Tensor:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(bitopk_module, "head_grad", forbidden)
    monkeypatch.setattr(bitopk_module, "bias_grad", forbidden)
    output = bitopk_loss(hidden, problem.head, teacher, k=5, bias_V=problem.bias)
    output.loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, wanted.hidden)

    monkeypatch.setattr("unteach.kernels.bitopk_torch.hidden_grad", forbidden)
    with torch.no_grad():
        output = bitopk_loss(hidden, problem.head, teacher, k=5, bias_V=problem.bias)
    assert torch.equal(output.loss, wanted.output.loss)
    assert not output.loss.requires_grad
    plain = bitopk_loss(problem.hidden, problem.head, teacher, k=5, bias_V=problem.bias)
    assert not plain.loss.requires_grad


def test_only_the_loss_carries_gradient() -> None:
    problem = make_problem("ids")
    teacher = make_teacher(problem)
    assert isinstance(teacher, HiddenTeacher)
    parts = [x.clone().requires_grad_() for x in (teacher.hidden_NE, teacher.head_VE)]
    head = problem.head.clone().requires_grad_()
    output = bitopk_loss(problem.hidden, head, HiddenTeacher(*parts, teacher.ids_NM), k=5)
    output.loss.backward()
    assert not any(x.requires_grad for x in output[1:])
    assert parts[0].grad is None
    assert parts[1].grad is None
    assert head.grad is not None


def test_one_head_for_both_sides() -> None:
    problem = make_problem("ids", (6, 16, 90, 5))
    hidden_t = torch.randn(6, 16)
    head = problem.head.clone().requires_grad_()
    bitopk_loss(problem.hidden, head, HiddenTeacher(hidden_t, head), k=5).loss.backward()
    side = oracle.Linear(hidden_t.double().numpy(), problem.head.double().numpy())
    wanted = expected(replace(problem, teacher=side, form="hidden"))
    assert head.grad is not None
    close(head.grad, wanted.head, 2e-5)


def test_two_losses_on_one_tensor_and_a_second_backward() -> None:
    problem, other = make_problem("ids"), make_problem("ids", alpha=0.3, center=True)
    teacher = make_teacher(problem)
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    kept = problem.hidden.clone(), problem.head.clone()
    one = bitopk_loss(hidden, head, teacher, k=5).loss
    two = bitopk_loss(hidden, head, teacher, **other.options).loss
    (one + two).backward(retain_graph=True)
    first = run(problem), run(replace(problem, options=other.options))
    assert hidden.grad is not None
    assert head.grad is not None
    assert torch.equal(hidden.grad, first[1].hidden + first[0].hidden)
    torch.testing.assert_close(head.grad, first[0].head + first[1].head)
    once = hidden.grad.clone(), head.grad.clone()
    (one + two).backward()  # nothing saved was scaled in place
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(head.grad, 2 * once[1])
    assert torch.equal(hidden.detach(), kept[0])
    assert torch.equal(head.detach(), kept[1])


def test_a_loss_scale_is_applied_before_rounding() -> None:
    # fp16: slopes of 1e-8 round to zero unless the scale comes first
    problem = make_problem("ids", dtype=torch.float16, normalizer=1e8)
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    loss = bitopk_loss(hidden, head, make_teacher(problem), **problem.options).loss
    (loss * 2.0**24).backward()
    wanted = expected(problem)
    assert hidden.grad is not None
    assert head.grad is not None
    close(hidden.grad, wanted.hidden * 2.0**24, 2**-10)
    close(head.grad, wanted.head * 2.0**24, 2**-10)
    assert not run(problem).hidden.abs().max() > 1e-6


def test_views_of_larger_tensors() -> None:
    problem = make_problem("cached", (6, 16, 90, 5), bias=True)
    teacher = make_teacher(problem)
    assert isinstance(teacher, HiddenTeacher)
    plain = run(problem, teacher)

    def strided(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return torch.stack((x, x), 1)[:, 0]
        return torch.cat((x, x), 1).t().contiguous().t()[:, : x.shape[1]]

    fields = (teacher.hidden_NE, teacher.head_VE, teacher.ids_NM, teacher.logits_NM, teacher.bias_V)
    views = HiddenTeacher(*(strided(x) for x in fields))
    assert problem.bias is not None
    hidden = torch.cat((problem.hidden, problem.hidden), 1).requires_grad_()
    head = problem.head.t().contiguous().requires_grad_()
    output = bitopk_loss(
        hidden[:, :16], head.t(), views, k=5, bias_V=strided(problem.bias), seeds_NS=None
    )
    output.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert torch.equal(output.loss, plain.output.loss)
    assert torch.equal(hidden.grad[:, :16], plain.hidden)
    assert torch.equal(head.grad.t(), plain.head)


@pytest.mark.parametrize(
    ("form", "where"),  # a sparse teacher has no hidden states: its logits have a test of their own
    [(form, "hidden") for form in FORMS] + [(form, "teacher") for form in FORMS[:-1]],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_makes_the_loss_nan_and_names_itself(
    form: str, where: str, value: float
) -> None:
    problem = make_problem(form, (6, 16, 3000, 5))
    clean = run(problem)
    teacher = make_teacher(problem)
    if where == "hidden":
        problem.hidden[2, 3] = value
    elif isinstance(teacher, HiddenTeacher):
        teacher.hidden_NE[2, 3] = value
    else:
        assert isinstance(teacher, LogitsTeacher)
        teacher.logits_NV[2] = value
    got = run(problem, teacher)
    assert got.output.loss.isnan()
    assert got.output.row_loss_N.isnan().tolist() == [r == 2 for r in range(6)]
    rest = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(got.output.row_loss_N[rest], clean.output.row_loss_N[rest])
    assert torch.equal(got.hidden[rest], clean.hidden[rest])


def assert_broken_rows_with_empty_lists(**extra: Any) -> None:
    """No id to compare at is no reason to call a broken row's loss 0; an ignored row's it is."""
    none = SparseTeacher(torch.full((7, 5), -1), torch.zeros(7, 5))
    weight = torch.tensor([1.0, 1, 1, 1, 0, 1, 1])
    for alpha in (0.0, 1.0):
        problem = make_problem("sparse", alpha=alpha, weight_N=weight)
        problem.hidden[2, 3], problem.hidden[3, 0], problem.hidden[4] = (
            torch.nan,
            torch.inf,
            torch.nan,
        )
        output = run(problem, none, **extra).output
        assert output.loss.isnan()
        assert output.row_loss_N.isnan().tolist() == [r in (2, 3) for r in range(7)]
        assert not output.row_loss_N[[0, 1, 4, 5, 6]].any()


@pytest.mark.parametrize("loss", [bitopk_loss, bitopk_loss_reference])
def test_a_broken_row_is_nan_even_where_the_list_is_empty(
    loss: Callable[..., BitopkOutput],
) -> None:
    assert_broken_rows_with_empty_lists(loss=loss)


def test_a_broken_cached_logit_makes_the_loss_nan() -> None:
    problem = make_problem("sparse")
    teacher = make_teacher(problem)
    assert isinstance(teacher, SparseTeacher)
    for value in (float("nan"), float("inf"), -float("inf")):
        teacher.logits_NM[4, 0] = value
        assert run(problem, teacher).output.row_loss_N.isnan().tolist() == [
            r == 4 for r in range(7)
        ]


def test_a_broken_head_ends_in_nan() -> None:
    problem = make_problem("ids", (6, 16, 3000, 5))
    teacher = make_teacher(problem)
    problem.head[:] = torch.nan
    assert run(problem, teacher).output.row_loss_N.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalizer", [None, 3.0, 0, torch.tensor(0.0)])
def test_no_rows(form: str, normalizer: float | Tensor | None) -> None:
    for alpha in (1.0, 0.0):
        options: dict[str, Any] = {"alpha": alpha, "normalizer": normalizer, "center": True}
        got = run(make_problem(form, (0, 16, 61, 5), gate=0.5, **options))
        assert got.output.loss == 0
        assert got.hidden.shape == (0, 16)
        assert not got.head.any()
        assert got.output.student_ids_NS.shape == (0, 10 if alpha else 0)


def test_reference_with_no_rows() -> None:
    got = run(make_problem("ids", (0, 16, 61, 5)), loss=bitopk_loss_reference)
    assert got.output.loss == 0
    assert not got.head.any()


def test_autocast_changes_no_bit() -> None:
    problem = make_problem("hidden", (6, 32, 3000, 5))
    wanted = run(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(problem), wanted)


def test_gradients_are_those_of_the_value() -> None:
    problem = make_problem("ids", (3, 5, 24, 3), bias=True, dtype=torch.float64)
    teacher = make_teacher(problem)
    assert problem.bias is not None
    leaves = [problem.hidden, problem.head, problem.bias.double()]

    def value(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        return bitopk_loss(
            hidden, head, teacher, k=3, alpha=0.7, center=True, softcap=7.0, bias_V=bias
        ).loss

    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(value, leaves, fast_mode=True)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("form", ["hidden", "cached"])
def test_no_tensor_grows_with_rows_times_vocabulary(form: str) -> None:
    torch.manual_seed(0)
    n, v = 530, 6100
    hidden, head = torch.randn(n, 8).requires_grad_(), torch.randn(v, 8).requires_grad_()
    teacher = HiddenTeacher(torch.randn(n, 8), head.detach())
    if form == "cached":
        logits, ids = linear_topk(teacher.hidden_NE, teacher.head_VE, 16)
        teacher = replace(teacher, ids_NM=ids, logits_NM=logits)
    with Largest() as largest:
        bitopk_loss(hidden, head, teacher, k=16).loss.backward()
    # a tile of 512 rows by 1024 ids; [N, V] has six times as many
    assert largest.elements <= 1 << 19


H, W, IDS = torch.zeros(4, 8), torch.zeros(50, 8), torch.zeros(4, 6).long()
GOOD = HiddenTeacher(torch.zeros(4, 9), torch.zeros(50, 9), IDS)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (GOOD, {"k": 0}, "k must be an integer from 1 to 50.*got 0"),
        (GOOD, {"k": 51}, "got 51|fewer than k=51"),
        (GOOD, {"k": 7}, "6 ids a row, fewer than k=7"),
        (GOOD, {"k": True}, "got True"),
        (GOOD, {"alpha": -0.1}, "alpha.*-0.1"),
        (GOOD, {"alpha": float("nan")}, "alpha.*nan"),
        (GOOD, {"beta": -1.0}, "beta.*-1.0"),
        (GOOD, {"gate": 0.0}, "gate.*0.0"),
        # what float32 makes 0 or inf of, or of whose inverse it does
        (GOOD, {"alpha": 1e39}, "alpha.*float32.*got 1e[+]39"),
        (GOOD, {"beta": 1e-39}, "beta.*float32.*got 1e-39"),
        (GOOD, {"gate": 1e-46}, "gate.*float32.*got 1e-46"),
        (GOOD, {"softcap": 1e39}, "softcap.*float32.*got 1e[+]39"),
        (GOOD, {"scale": 1e-46}, "scale.*float32.*got 1e-46"),
        (GOOD, {"normalizer": 1e-39}, "normalizer.*float32.*got 1e-39"),
        (GOOD, {"scale": -1.0}, "scale.*-1.0"),
        (GOOD, {"softcap": 0.0}, "softcap.*0.0"),
        (GOOD, {"vocab": 51}, "vocab.*1 to 50, got 51"),
        (GOOD, {"normalizer": 0}, "normalizer.*got 0"),
        (GOOD, {"normalizer": torch.ones(1)}, r"normalizer.*\(1,\)"),
        (GOOD, {"weight_N": torch.ones(3)}, r"weight_N.*\(4,\), got \(3,\)"),
        (GOOD, {"weight_N": torch.ones(4).long()}, "weight_N.*int64"),
        (GOOD, {"bias_V": torch.ones(8)}, r"bias_V.*\(50,\)"),
        (GOOD, {"seeds_NS": IDS[:3]}, "seeds_NS.*4 rows"),
        (GOOD, {"seeds_NS": IDS.float()}, "seeds_NS.*float32"),
        (GOOD, {"backend": "fast"}, "backend.*'fast'"),
        (None, {}, "teacher must be.*NoneType"),
        (replace(GOOD, hidden_NE=torch.zeros(5, 9)), {}, "teacher.hidden_NE.*4 rows"),
        (replace(GOOD, head_VE=torch.zeros(50, 8)), {}, "teacher.hidden_NE has width 9"),
        (replace(GOOD, head_VE=torch.zeros(50, 9).double()), {}, "float64"),
        (replace(GOOD, ids_NM=IDS.float()), {}, "teacher.ids_NM.*float32"),
        (replace(GOOD, ids_NM=IDS[:2]), {}, "teacher.ids_NM.*4 rows"),
        (replace(GOOD, logits_NM=torch.zeros(4, 5)), {}, r"logits_NM.*\(4, 5\).*\(4, 6\)"),
        (replace(GOOD, logits_NM=torch.zeros(4, 6), ids_NM=None), {}, "needs teacher.ids_NM"),
        (replace(GOOD, hidden_NE=torch.zeros(4, 9, device="meta")), {}, "meta"),
        (LogitsTeacher(torch.zeros(3, 50)), {}, "teacher.logits_NV.*4 rows"),
        (LogitsTeacher(torch.zeros(4, 50).long()), {}, "teacher.logits_NV.*int64"),
        (LogitsTeacher(torch.zeros(4, 3)), {"k": 4}, "1 to 3.*got 4"),
        (SparseTeacher(IDS, torch.zeros(4, 7)), {}, r"\(4, 7\)"),
        (SparseTeacher(IDS, IDS), {}, "logits_NM must be floating point"),
    ],
)
@pytest.mark.parametrize("loss", [bitopk_loss, bitopk_loss_reference])
def test_what_does_not_fit_is_refused(
    teacher: Any, options: dict[str, Any], message: str, loss: Callable[..., BitopkOutput]
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(H, W, teacher, **{"k": 5, **options})
