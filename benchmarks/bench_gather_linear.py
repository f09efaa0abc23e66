"""Logits at chosen ids, forward and backward, beside full logits and gathered rows of the head.

The ids are the teacher's top 2K; what is differentiated is half the mean square of these logits.

    python -m unteach.benchmarks.bench_gather_linear --preset smollm2-135m --tokens 512 --k 32
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from unteach.benchmarks.comparison import Errors, Make, Path, Provider
from unteach.benchmarks.exact import differences, raw_logits, soft_capped
from unteach.benchmarks.harness import Step
from unteach.benchmarks.presets import Case
from unteach.benchmarks.providers import capped, differentiated
from unteach.benchmarks.roofline import Sizes, Stage, gather_path, product
from unteach.benchmarks.sweep import run
from unteach.kernels.gather_linear import gather_linear

Gather = Callable[[Case, Tensor], Tensor]


def _ids(case: Case) -> Tensor:
    assert case.teacher.ids_NM is not None
    return case.teacher.ids_NM.long()


def _step(case: Case, *, gather: Gather) -> Step:
    ids_NU = _ids(case)
    return differentiated(
        case, lambda: gather(case, ids_NU).float().square().sum() / (2 * len(ids_NU))
    )


def _unteach(case: Case, ids_NU: Tensor, *, backend: str) -> Tensor:
    given = case.hidden_ND, case.head_VD, ids_NU
    return gather_linear(*given, softcap=case.softcap, backend=backend)


def _eager(case: Case, ids_NU: Tensor) -> Tensor:
    return capped((case.hidden_ND @ case.head_VD.t()).gather(1, ids_NU).float(), case.softcap)


def _rows(case: Case, ids_NU: Tensor) -> Tensor:
    dots = case.head_VD[ids_NU] @ case.hidden_ND[:, :, None]
    return capped(dots.squeeze(2).float(), case.softcap)


def _eager_path(sizes: Sizes) -> list[Stage]:
    # the dense gradient of the gather: zeroed, then added up
    slopes = Stage(0, 2 * sizes.rows * sizes.vocab * sizes.item)
    return [*product(sizes), slopes, *product(sizes, 2)]


def _rows_path(sizes: Sizes) -> list[Stage]:
    # [N, U, D] rows written and read forward; read, and their gradients written and read, backward
    copies = Stage(0, 5 * sizes.rows * sizes.seeds * sizes.width * sizes.item)
    return [*gather_path(sizes), copies]


def errors_of(found: tuple[Tensor, ...], case: Case) -> Errors:
    """How far the loss and both gradients are from float64."""
    ids_NU = _ids(case)
    z, cap_slope = soft_capped(raw_logits(case.hidden_ND, case.head_VD), case.softcap)
    chosen = z.gather(1, ids_NU) / len(z)
    slopes = torch.zeros_like(z).scatter_add_(1, ids_NU, chosen) * cap_slope
    loss = float((chosen * z.gather(1, ids_NU)).sum() / 2)
    return differences(found, case, loss, slopes)


def providers(device: torch.device, backend: str = "auto") -> dict[str, Provider]:
    """Every provider by name, ours on the given backend."""

    def named(dense_pass: str, gather: Gather, path: Path) -> Provider:
        make: Make = partial(_step, gather=gather)
        return Provider("half the mean square", dense_pass, make, path, errors_of)

    return {
        "unteach": named("none", partial(_unteach, backend=backend), gather_path),
        "eager": named("logits in memory", _eager, _eager_path),
        "rows": named("rows of the head in memory", _rows, _rows_path),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows."""
    run("bench_gather_linear", __doc__, providers, argv)


if __name__ == "__main__":
    main()
