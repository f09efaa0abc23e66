"""`bitopk_loss` by the kernels; run under TRITON_INTERPRET=1 (test_triton.py does)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_bitopk import (
    FORMS,
    VARIANTS,
    assert_broken_rows_with_empty_lists,
    assert_default_dtype_changes_no_bit,
    assert_matches_oracle,
    assert_same_bits,
    close,
    expected,
    make_problem,
    make_teacher,
    run,
    seed_kinds,
)
from unteach.kernels.bitopk import HiddenTeacher, SparseTeacher, bitopk_loss

TRITON = {"backend": "triton"}
CASES = [("cached", variant) for variant in VARIANTS]
CASES += [(form, variant) for form in FORMS if form != "cached" for variant in ("plain", "all")]


@pytest.mark.parametrize(("form", "variant"), CASES)
def test_value_and_gradients_match_the_oracle(form: str, variant: str) -> None:
    problem = make_problem(form, **VARIANTS[variant])
    got = assert_matches_oracle(problem, **TRITON)
    assert got.output.student_ids_NS.dtype == torch.int32


# K = 1, K = V, one row, three tiles, D no multiple of 8
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("hidden", (3, 8, 40, 1)),
        ("ids", (2, 8, 40, 40)),
        ("cached", (1, 33, 300, 7)),
        ("logits", (3, 9, 300, 12)),
        ("sparse", (3, 140, 129, 3)),
    ],
)
def test_shapes(form: str, shape: tuple[int, int, int, int]) -> None:
    problem = make_problem(form, shape, alpha=0.7, center=True, gate=0.6)
    assert_matches_oracle(problem, **TRITON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["ids", "logits"])
def test_dtypes(dtype: torch.dtype, form: str) -> None:
    problem = make_problem(form, (4, 24, 150, 5), dtype=dtype, softcap=6.0, bias=True)
    assert_matches_oracle(problem, **TRITON)


@pytest.mark.parametrize("teacher_vocab", [45, 80])
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_only_ids_that_both_vocabularies_have(form: str, teacher_vocab: int) -> None:
    problem = make_problem(form, teacher_vocab=teacher_vocab, alpha=0.7)
    assert_matches_oracle(problem, **TRITON)


@pytest.mark.parametrize("form", ["hidden", "sparse"])
def test_weights_and_normalizer(form: str) -> None:
    weight = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.0, 0.3, 1.0])
    problem = make_problem(form, weight_N=weight, normalizer=torch.tensor(3), center=True)
    problem.hidden[1] = torch.nan  # an ignored row may hold anything
    clean = replace(problem, hidden=problem.hidden.nan_to_num())
    wanted, got = expected(clean), run(problem, make_teacher(clean), **TRITON)
    close(got.output.loss, np.array(wanted.loss), 2e-5)
    close(got.hidden, wanted.hidden, 2e-5)
    close(got.head, wanted.head, 2e-5)
    assert not got.output.row_loss_N[[1, 4]].any()
    assert bool((got.output.student_ids_NS[[1, 4]] == -1).all())
    assert got.output.coverage_N[[1, 4]].tolist() == [1, 1]


def test_all_rows_ignored() -> None:
    options = {"weight_N": torch.zeros(7), "normalizer": torch.tensor(0.0)}
    got = run(make_problem("ids", **options), **TRITON)
    assert got.output.loss == 0
    assert not got.hidden.any()
    assert not got.head.any()


@pytest.mark.parametrize("form", ["hidden", "cached"])
def test_seeds_change_no_bit(form: str) -> None:
    options = {"alpha": 0.7, "center": True, "gate": 0.7, "softcap": 9.0}
    problem = make_problem(form, (5, 40, 200, 6), **options)
    plain = run(problem, **TRITON)
    for seeds in seed_kinds(plain.output.student_ids_NS.long(), 200).values():
        got = run(problem, seeds_NS=seeds, **TRITON)
        kept = replace(got, output=got.output._replace(fallback_rows=plain.output.fallback_rows))
        assert_same_bits(kept, plain)


@pytest.mark.parametrize(("form", "dtype"), [("logits", torch.float16), ("sparse", torch.bfloat16)])
def test_the_default_dtype_changes_no_bit(form: str, dtype: torch.dtype) -> None:
    assert_default_dtype_changes_no_bit(form, dtype, **TRITON)


def test_a_broken_row_is_nan_even_where_the_list_is_empty() -> None:
    assert_broken_rows_with_empty_lists(**TRITON)


def test_numbers_of_numpy_are_floats_too() -> None:
    given = {"alpha": 0.5, "beta": 2.0, "gate": 0.5, "softcap": 8.0, "scale": 0.5, "center": True}
    problem = make_problem("hidden", (4, 24, 150, 5), **given)
    scalars = {n: np.float32(v) if isinstance(v, float) else v for n, v in problem.options.items()}
    assert_same_bits(run(replace(problem, options=scalars), **TRITON), run(problem, **TRITON))


def test_running_twice_changes_no_bit() -> None:
    problem = make_problem("cached", gate=0.5)
    assert_same_bits(run(problem, **TRITON), run(problem, **TRITON), spare=True)


def test_batch_changes_no_bit_of_a_row() -> None:
    options = {"alpha": 0.7, "center": True, "gate": 0.7, "softcap": 9.0, "normalizer": 2.0}
    problem = make_problem("ids", (12, 11, 150, 6), **options)
    whole = run(problem, **TRITON)
    rows = torch.tensor([11, 0, 7])
    side = replace(problem.teacher, hidden=problem.teacher.hidden[rows.numpy()])
    part = run(replace(problem, hidden=problem.hidden[rows], teacher=side), **TRITON)
    assert torch.equal(part.output.row_loss_N, whole.output.row_loss_N[rows])
    assert torch.equal(part.hidden, whole.hidden[rows])


def test_next_seeds_are_the_best_ids() -> None:
    problem = make_problem("ids", (4, 32, 250, 8))
    ids = run(problem, **TRITON).output.student_ids_NS
    assert torch.equal(ids, run(problem).output.student_ids_NS)
    warm = run(problem, seeds_NS=ids, **TRITON).output
    assert torch.equal(warm.student_ids_NS[:, :8], ids[:, :8])
    assert warm.fallback_rows == 0


def test_repeated_and_foreign_teacher_ids() -> None:
    problem = make_problem("cached", (4, 16, 50, 4))
    ids = torch.tensor([[3, 3, 9, 3, 9, 1], [-1, 7, 99, 7, 8, 8], [-100] * 6, [5, 2, 5, 2, 1, 0]])
    logits = torch.randn(4, 6)
    side = problem.teacher
    hidden, head = (torch.from_numpy(x).float() for x in (side.hidden, side.head))
    teachers: dict[str, Any] = {
        "sparse": SparseTeacher(ids.int(), logits),
        "cached": HiddenTeacher(hidden, head, ids, logits),
        "ids": HiddenTeacher(hidden, head, ids),
    }
    for form, teacher in teachers.items():
        for options in ({"alpha": 0.7, "center": True, "gate": 0.8}, {"alpha": 0.0}):
            case = replace(problem, form=form, options={"k": 4, **options})
            assert_matches_oracle(case, teacher, **TRITON)


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_all_equal_logits(form: str) -> None:
    problem = make_problem(form, (3, 8, 150, 6))
    problem.head[:] = problem.head[:1].clone()
    problem.teacher.head[:] = problem.teacher.head[:1].copy()
    got = assert_matches_oracle(problem, **TRITON)
    assert got.output.student_ids_NS[:, :6].tolist() == [list(range(6))] * 3


@pytest.mark.parametrize("form", ["hidden", "cached", "logits"])
@pytest.mark.parametrize("where", ["hidden", "teacher"])
def test_a_broken_row_makes_the_loss_nan_and_names_itself(form: str, where: str) -> None:
    problem = make_problem(form, (4, 16, 150, 5))
    clean = run(problem, **TRITON)
    teacher = make_teacher(problem)
    if where == "hidden":
        problem.hidden[2, 3] = torch.nan
    elif isinstance(teacher, HiddenTeacher):
        teacher.hidden_NE[2, 3] = torch.inf
    else:
        teacher.logits_NV[2] = torch.nan  # type: ignore[union-attr]
    got = run(problem, teacher, **TRITON)
    assert got.output.loss.isnan()
    assert got.output.row_loss_N.isnan().tolist() == [False, False, True, False]
    rest = torch.tensor([0, 1, 3])
    assert torch.equal(got.output.row_loss_N[rest], clean.output.row_loss_N[rest])
    assert torch.equal(got.hidden[rest], clean.hidden[rest])


@pytest.mark.parametrize("form", ["hidden", "sparse"])
def test_no_rows(form: str) -> None:
    for alpha in (1.0, 0.0):
        got = run(make_problem(form, (0, 16, 61, 5), alpha=alpha, center=True), **TRITON)
        assert got.output.loss == 0
        assert got.hidden.shape == (0, 16)
        assert not got.head.any()
        assert got.output.student_ids_NS.shape == (0, 10 if alpha else 0)


def test_two_losses_on_one_tensor_and_a_second_backward() -> None:
    problem = make_problem("cached")
    teacher = make_teacher(problem)
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    kept = problem.hidden.clone(), problem.head.clone()
    one = bitopk_loss(hidden, head, teacher, k=5, **TRITON).loss
    two = bitopk_loss(hidden, head, teacher, k=5, alpha=0.3, center=True, **TRITON).loss
    (one + two).backward(retain_graph=True)
    assert hidden.grad is not None
    assert head.grad is not None
    once = hidden.grad.clone(), head.grad.clone()
    (one + two).backward()  # nothing saved was scaled in place
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(head.grad, 2 * once[1])
    assert torch.equal(hidden.detach(), kept[0])
    assert torch.equal(head.detach(), kept[1])


def test_a_loss_scale_is_applied_before_rounding() -> None:
    problem = make_problem("cached", dtype=torch.float16, normalizer=1e8)
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    loss = bitopk_loss(hidden, head, make_teacher(problem), **problem.options, **TRITON).loss
    (loss * 2.0**24).backward()
    wanted = expected(problem)
    assert hidden.grad is not None
    assert head.grad is not None
    close(hidden.grad, wanted.hidden * 2.0**24, 2**-10)
    close(head.grad, wanted.head * 2.0**24, 2**-9)


def test_views_of_larger_tensors() -> None:
    problem = make_problem("cached", (4, 16, 90, 5))
    teacher = make_teacher(problem)
    plain = run(problem, teacher, **TRITON)
    hidden = torch.cat((problem.hidden, problem.hidden), 1).requires_grad_()
    head = problem.head.t().contiguous().requires_grad_()
    output = bitopk_loss(hidden[:, :16], head.t(), teacher, k=5, **TRITON)
    output.loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert torch.equal(output.loss, plain.output.loss)
    assert torch.equal(hidden.grad[:, :16], plain.hidden)
    assert torch.equal(head.grad.t(), plain.head)


def test_nothing_is_computed_for_who_wants_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> Tensor:
        raise AssertionError("a gradient was computed")

    problem = make_problem("cached")
    teacher, wanted = make_teacher(problem), run(problem, **TRITON)
    monkeypatch.setattr("unteach.kernels.sparse_grad_triton.head_grad_triton", forbidden)
    hidden = problem.hidden.clone().requires_grad_()
    bitopk_loss(hidden, problem.head, teacher, k=5, **TRITON).loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, wanted.hidden)
    monkeypatch.setattr("unteach.kernels.bitopk_triton.hidden_grad_triton", forbidden)
    with torch.no_grad():
        output = bitopk_loss(hidden, problem.head, teacher, k=5, **TRITON)
    assert torch.equal(output.loss, wanted.output.loss)


def test_agrees_with_the_torch_backend() -> None:
    problem = make_problem("hidden", **VARIANTS["all"])
    one, two = run(problem, **TRITON), run(problem, backend="torch")
    assert torch.equal(one.output.student_ids_NS[:, :5], two.output.student_ids_NS[:, :5])
    torch.testing.assert_close(one.output.loss, two.output.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.hidden, two.hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.head, two.head, rtol=1e-4, atol=1e-6)


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [x for x in indices if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert not masks, f"{name} by a mask"
        assert not name.startswith(self.WAITS), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_the_host_never_waits(form: str) -> None:
    weight = torch.tensor([1.0, 0.0, 2.0])
    problem = make_problem(form, (3, 8, 60, 4), **{**VARIANTS["all"], "weight_N": weight})
    teacher, seeds = make_teacher(problem), torch.randint(60, (3, 8))
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.head, problem.bias)]
    with NoSync():
        output = bitopk_loss(
            *leaves[:2], teacher, bias_V=leaves[2], seeds_NS=seeds, **problem.options, **TRITON
        )
        output.loss.backward()
    with NoSync(), pytest.raises(AssertionError, match="nonzero"):
        bitopk_loss(*leaves[:2], teacher, **problem.options, backend="torch")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("ids", {"dtype": torch.float64}, "'triton' cannot serve.*float64; 'torch' can"),
        ("hidden", {"shape": (2, 8, 200, 129)}, "k is 129, the kernels hold 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(
    form: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_problem(form, **options), **TRITON)
