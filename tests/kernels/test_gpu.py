"""The kernels as they run on a GPU: real sizes, against float64 of the same rounded inputs.

`pytest -m gpu` runs these alone. Without a GPU they are skipped and counted; what they compile is
then covered by the interpreter and by ahead-of-time compilation (test_triton.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.train.lean_adamw import LeanAdamW
from unteach.kernels.bitopk import (
    HiddenTeacher,
    LogitsTeacher,
    SparseTeacher,
    bitopk_loss,
    bitopk_loss_reference,
)
from unteach.kernels.gather_linear import gather_linear, gather_linear_reference
from unteach.kernels.linear_kl import linear_kl, linear_kl_reference
from unteach.kernels.linear_logprob import linear_logprob, linear_logprob_reference
from unteach.kernels.linear_topk import linear_topk, linear_topk_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Rows, width, vocabulary: SmolLM2's head; one that no power of two or tile divides.
SIZES = [(512, 576, 49152), (333, 200, 50021)]
# Of the largest true value. A gradient is rounded to its input's dtype once.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2.0**-8}
DTYPES = list(TOLERANCE)
K = 32


def operands(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, d, v = size
    hidden_ND = torch.randn(n, d, device=DEVICE).to(dtype).requires_grad_()
    return hidden_ND, (0.1 * torch.randn(v, d, device=DEVICE)).to(dtype).requires_grad_()


def exact(hidden_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    hidden_ND, head_VD = hidden_ND.detach().double(), head_VD.detach().double()
    return hidden_ND.requires_grad_(), head_VD.requires_grad_()


def assert_near(got: Tensor, true: Tensor, tolerance: float) -> None:
    got, true = got.detach().double(), true.detach().double()
    assert float((got - true).abs().max()) <= tolerance * float(true.abs().max())


def assert_same_gradients(got: Tensor, mine: Any, true: Tensor, theirs: Any, dtype: Any) -> None:
    """Values near each other, and what one random weight a row sends back to both operands."""
    assert_near(got, true, TOLERANCE[torch.float32])
    slope = torch.randn_like(true)
    for one, other in zip(
        torch.autograd.grad(got, mine, slope.to(got.dtype)),
        torch.autograd.grad(true, theirs, slope),
        strict=True,
    ):
        assert_near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_topk_is_exact_whatever_the_seeds(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    hidden_ND, head_VD = operands(size, dtype)
    logits_NK, ids_NK = linear_topk(hidden_ND, head_VD, K)
    true_NK, _ = linear_topk_reference(*exact(hidden_ND, head_VD), K)
    assert_near(logits_NK, true_NK, 1e-5)
    stale_NS = torch.randint(-1, size[2] + 5, (size[0], 2 * K), device=DEVICE)
    for seeds_NS in (ids_NK, stale_NS):
        again_NK, same_NK = linear_topk(hidden_ND, head_VD, K, seeds_NS=seeds_NS)
        assert torch.equal(again_NK, logits_NK) and torch.equal(same_NK, ids_NK)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gathered_logits_and_their_gradients(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    mine = operands(size, dtype)
    theirs = exact(*mine)
    ids_NU = torch.randint(0, size[2], (size[0], 2 * K), device=DEVICE)
    got, true = gather_linear(*mine, ids_NU), gather_linear_reference(*theirs, ids_NU)
    assert_same_gradients(got, mine, true, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_and_divergences(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    mine, reference = operands(size, dtype), [x.detach() for x in operands(size, dtype)]
    theirs = exact(*mine)
    labels_N = torch.randint(0, size[2], (size[0],), device=DEVICE)
    got, true = linear_logprob(*mine, labels_N), linear_logprob_reference(*theirs, labels_N)
    assert_same_gradients(got, mine, true, theirs, dtype)
    got = linear_kl(*mine, *reference)
    true = linear_kl_reference(*theirs, *(x.double() for x in reference))
    assert_same_gradients(got, mine, true, theirs, dtype)


def teachers(size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Every form of a teacher that is a blurred copy of the student's own weights."""
    hidden_NE, head_VE = (x.detach() for x in operands(size, dtype))
    logits_NV = hidden_NE.float() @ head_VE.float().T
    top_NM, ids_NM = logits_NV.topk(2 * K)
    return {
        "online": HiddenTeacher(hidden_NE, head_VE),
        "cached": HiddenTeacher(hidden_NE, head_VE, ids_NM.int()),
        "logits": LogitsTeacher(logits_NV),
        "sparse": SparseTeacher(ids_NM, top_NM),
    }


@pytest.mark.parametrize("form", ["online", "cached", "logits", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_whatever_the_seeds(
    size: tuple[int, int, int], dtype: torch.dtype, form: str
) -> None:
    teacher = teachers(size, dtype)[form]
    mine = operands(size, dtype)
    theirs = exact(*mine)
    options: dict[str, Any] = {"k": K, "center": True, "gate": 0.5, "beta": 8.0}
    true = bitopk_loss_reference(*theirs, teacher, **options).loss
    wanted = torch.autograd.grad(true, theirs)
    first = bitopk_loss(*mine, teacher, **options)
    assert_near(first.loss, true, TOLERANCE[torch.float32])
    grads = torch.autograd.grad(first.loss, mine)
    for got, exactly in zip(grads, wanted, strict=True):
        assert_near(got, exactly, TOLERANCE[dtype])
    stale_NS = torch.randint(-1, size[2] + 5, (size[0], 2 * K), device=DEVICE)
    for seeds_NS in (first.student_ids_NS, stale_NS):
        again = bitopk_loss(*mine, teacher, seeds_NS=seeds_NS, **options)
        assert torch.equal(again.loss, first.loss)
        for got, before in zip(torch.autograd.grad(again.loss, mine), grads, strict=True):
            assert torch.equal(got, before)


def test_no_tensor_of_the_whole_vocabulary_is_made() -> None:
    size = (2048, 576, 49152)
    mine = operands(size, torch.bfloat16)
    teacher = teachers(size, torch.bfloat16)["cached"]
    torch.autograd.grad(bitopk_loss(*mine, teacher, k=K).loss, mine)  # builds the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(bitopk_loss(*mine, teacher, k=K).loss, mine)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    logits_in_bf16 = 2 * size[0] * size[2]
    assert extra < logits_in_bf16 / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_optimiser_updates_as_on_the_cpu(dtype: torch.dtype) -> None:
    """The same noise on both, so bfloat16 weights part where a float32 sum rounds otherwise."""
    updated = []
    for device in ("cpu", DEVICE):
        generator = torch.Generator().manual_seed(1)
        parameter = torch.randn(100_003, generator=generator).to(device, dtype).requires_grad_()
        optimizer = LeanAdamW(
            [{"params": [parameter]}],
            lr=0.01,
            betas=(0.9, 0.95),
            eps=1e-8,
            state_dtype=torch.float32,
            seed=5,
        )
        for _ in range(3):
            gradient = torch.randn(100_003, generator=generator)
            parameter.grad = gradient.to(device, dtype)
            optimizer.step()
        updated.append(parameter.detach().cpu())
    apart = updated[0] != updated[1]
    if dtype == torch.bfloat16:
        assert float(apart.float().mean()) < 0.01
    torch.testing.assert_close(
        updated[1], updated[0], rtol=2**-6 if dtype == torch.bfloat16 else 2e-5, atol=1e-6
    )
