"""Who is measured: our loss, the same loss by other means, and other losses over the same head.

Losses other than Eq. 3 are named, and never compared in value.

    unteach            forward and backward with seeds; `unteach-noseeds` without, `unteach-other`
                       by the dense pass that the table of triton_launch.py does not choose
    eager              both products in the input dtype, torch.topk on both, float32 Smooth-L1,
                       autograd
    compile            torch.compile of eager
    chunked            the teacher's cache as we have it; products of CHUNK_ROWS rows, torch.topk,
                       dense slopes in the workspace of the logits, both gradients by hand
    liger cce quack torch-linear-ce       what others make fast, from their packages
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from unteach.benchmarks.comparison import Make, Path, Provider, Unavailable
from unteach.benchmarks.exact import errors_of
from unteach.benchmarks.harness import Step
from unteach.benchmarks.presets import Case
from unteach.benchmarks.roofline import (
    Sizes,
    Stage,
    cross_entropy_path,
    dense_path,
    sparse_path,
)
from unteach.kernels.bitopk import bitopk_loss
from unteach.kernels.checks import choose_backend
from unteach.kernels.triton_launch import DENSE_PASS, architecture

CROSS_ENTROPY = "cross-entropy of the teacher's first choice"
# Few enough for the workspace to stay small, enough for the products to be bound by arithmetic.
CHUNK_ROWS = 2048


def _needs_gpu(case: Case, package: str) -> None:
    if not case.hidden_ND.is_cuda:
        raise Unavailable(f"{package} needs a GPU")


def differentiated(case: Case, loss: Callable[[], Tensor]) -> Step:
    """Forward and backward through autograd."""

    def step() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, (case.hidden_ND, case.head_VD))

    return step


def _unteach(case: Case, *, seeds: bool, backend: str = "auto") -> Step:
    def loss() -> Tensor:
        return bitopk_loss(
            case.hidden_ND,
            case.head_VD,
            case.teacher,
            k=case.k,
            softcap=case.softcap,
            seeds_NS=case.seeds_NS if seeds else None,
            backend=backend,
        ).loss

    return differentiated(case, loss)


def capped(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def eager_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    taught_NE: Tensor,
    taught_VE: Tensor,
    k: int,
    softcap: float | None,
) -> Tensor:
    """Eq. 3 from full logits; the soft cap is applied to gathered logits only, which is cheaper."""
    with torch.no_grad():
        theirs = taught_NE @ taught_VE.t()
    ours = hidden_ND @ head_VD.t()
    total = torch.zeros((), device=hidden_ND.device)
    for logits in (theirs, ours.detach()):
        ids = logits.topk(k, dim=1).indices
        z_s = capped(ours.gather(1, ids).float(), softcap)
        z_t = capped(theirs.gather(1, ids).float(), softcap)
        total = total + smooth_l1_loss(z_s, z_t, reduction="sum")
    return total / hidden_ND.shape[0]


def _eager(case: Case, *, compiled: bool) -> Step:
    loss: Any = eager_loss
    if compiled:
        torch.compiler.reset()  # after several shapes it would give up and run eager
        loss = torch.compile(eager_loss, dynamic=False)
    taught = case.teacher.hidden_NE, case.teacher.head_VE
    return differentiated(
        case, lambda: loss(case.hidden_ND, case.head_VD, *taught, case.k, case.softcap)
    )


def _chunked(case: Case) -> Step:
    """Dense gradients as good as they get: nothing is made twice, dL/dhead in float32."""
    hidden, head = case.hidden_ND.detach(), case.head_VD.detach()
    n, vocab, step = len(hidden), len(head), min(CHUNK_ROWS, len(hidden))

    def run() -> tuple[Tensor, ...]:
        workspace = hidden.new_empty(step, vocab)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            z = torch.mm(hidden[rows], head.t(), out=workspace[: rows.stop - start])
            ids, ours, theirs = _both_sides(case, rows, z)
            total += smooth_l1_loss(ours, theirs, reduction="sum")
            slopes = (ours - theirs).clamp(-1, 1) / n
            if case.softcap is not None:
                slopes = slopes * (1 - (ours / case.softcap) ** 2)
            z.zero_().scatter_add_(1, ids, slopes.to(z.dtype))
            torch.mm(z, head, out=grad_hidden[rows])
            _add_product(grad_head, z.t(), hidden[rows])
        return total / n, grad_hidden, grad_head.to(head.dtype)

    return run


def _both_sides(case: Case, rows: slice, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of both sets one after the other, and final float32 logits of both sides there."""
    teacher, k = case.teacher, case.k
    assert teacher.ids_NM is not None and teacher.logits_NM is not None
    listed = teacher.ids_NM[rows, :k]
    found = z.topk(k, dim=1).indices
    gathered = teacher.head_VE[found] @ teacher.hidden_NE[rows, :, None]
    answers = capped(gathered.squeeze(2).float(), case.softcap)
    ids = torch.cat((listed, found), 1)
    ours = capped(z.gather(1, ids).float(), case.softcap)
    return ids, ours, torch.cat((teacher.logits_NM[rows, :k].float(), answers), 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _needs_no_cap(case: Case, name: str) -> None:
    """A peer that has no soft cap would be timed at less work than the others do."""
    if case.softcap is not None:
        raise Unavailable(f"{name} has no soft cap")


def liger(case: Case, *, beta: float) -> Step:
    """Jensen-Shannon divergence of student and teacher; KL of the teacher at beta 0."""
    _needs_gpu(case, "liger-kernel")
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Unavailable("liger-kernel is not installed") from error
    _needs_no_cap(case, "liger")
    jsd: Any = LigerFusedLinearJSD(jsd_beta=beta)
    taught = case.teacher.hidden_NE, case.teacher.head_VE
    return differentiated(case, lambda: jsd(case.hidden_ND, case.head_VD, *taught, None))


def _cce(case: Case) -> Step:
    _needs_gpu(case, "cut-cross-entropy")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable("cut-cross-entropy is not installed") from error
    given = case.hidden_ND, case.head_VD, case.labels_N
    return differentiated(case, lambda: linear_cross_entropy(*given, softcap=case.softcap))


def _quack(case: Case) -> Step:
    _needs_gpu(case, "quack-kernels")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise Unavailable("quack-kernels is not installed") from error
    _needs_no_cap(case, "quack")
    given = case.hidden_ND, case.head_VD, case.labels_N
    return differentiated(case, lambda: chunked_linear_cross_entropy(*given))


def _torch_linear_ce(case: Case) -> Step:
    loss: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if loss is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    _needs_no_cap(case, "torch-linear-ce")
    given = case.hidden_ND, case.head_VD, case.labels_N
    return differentiated(case, lambda: loss(*given, options=options()))


def _chunked_path(sizes: Sizes) -> list[Stage]:
    return dense_path(sizes, products=1, passes=1, gathered=sizes.k)


def _other_pass(case: Case, *, backend: str) -> Step:
    device = case.hidden_ND.device
    if choose_backend(backend, case.hidden_ND) == "torch":
        raise Unavailable("backend torch has one dense pass")
    chip, step = architecture(device), _unteach(case, seeds=True, backend=backend)

    def run() -> tuple[Tensor, ...]:
        chosen = DENSE_PASS[chip]
        DENSE_PASS[chip] = _other(chosen)
        try:
            return step()
        finally:
            DENSE_PASS[chip] = chosen

    return run


def _other(dense_pass: str) -> str:
    return "fused" if dense_pass == "product" else "product"


def our_dense_pass(backend: str, device: torch.device, *, seeds: bool, other: bool = False) -> str:
    """How our kernels come by the student's logits of 16 bits here.

    Raises:
        ValueError: a backend that cannot serve this device.
    """
    if choose_backend(backend, torch.empty(0, device=device)) == "torch":
        return "tiles in cache"
    if not seeds:
        return "fused, running list"
    chosen = DENSE_PASS[architecture(device)]
    name = _other(chosen) if other else chosen
    return {
        "fused": "fused, appends above a threshold",
        "product": "products into a workspace, one filter",
    }[name]


def providers(device: torch.device, backend: str = "auto") -> dict[str, Provider]:
    """Every provider by name, ours on the given backend."""
    unteach = partial(_unteach, backend=backend)
    full, in_chunks = "logits in memory", f"chunks of {CHUNK_ROWS} rows"

    def ours(seeds: bool) -> Provider:
        dense_pass = our_dense_pass(backend, device, seeds=seeds)
        return same(dense_pass, partial(unteach, seeds=seeds), partial(sparse_path, seeds=seeds))

    def same(dense_pass: str, make: Make, path: Path) -> Provider:
        return Provider("eq. 3", dense_pass, make, path, errors_of)

    return {
        "unteach": ours(seeds=True),
        "unteach-noseeds": ours(seeds=False),
        "unteach-other": same(
            our_dense_pass(backend, device, seeds=True, other=True),
            partial(_other_pass, backend=backend),
            partial(sparse_path, seeds=True),
        ),
        # backward of two gathers: two dense tensors zeroed, then added up
        "eager": same(
            full, partial(_eager, compiled=False), partial(dense_path, products=2, passes=5)
        ),
        "compile": same(
            full, partial(_eager, compiled=True), partial(dense_path, products=2, passes=1)
        ),
        "chunked": same(in_chunks, _chunked, _chunked_path),
        "liger": Provider(
            "JSD over the vocabulary", "chunks", partial(liger, beta=0.5), _peer_path(4)
        ),
        **peers(),
    }


def peers() -> dict[str, Provider]:
    """Cross-entropy of label ids, as others make it fast."""
    return {
        "cce": Provider(CROSS_ENTROPY, "fused", _cce, _peer_path(4)),
        "quack": Provider(CROSS_ENTROPY, "chunks", _quack, _peer_path(3)),
        "torch-linear-ce": Provider(CROSS_ENTROPY, "chunks", _torch_linear_ce, _peer_path(3)),
    }


def _peer_path(products: int) -> Path:
    return partial(cross_entropy_path, products=products)
