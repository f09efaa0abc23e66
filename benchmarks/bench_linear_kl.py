"""KL of a frozen teacher over the whole vocabulary, forward and backward, beside full logits.

All providers compute the same mean over the rows; Liger's is its JSD at β = 0.

    python -m unteach.benchmarks.bench_linear_kl --preset smollm2-135m --tokens 512
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from unteach.benchmarks.comparison import Errors, Make, Path, Provider
from unteach.benchmarks.exact import differences, raw_logits, soft_capped
from unteach.benchmarks.harness import Step
from unteach.benchmarks.presets import Case
from unteach.benchmarks.providers import capped, differentiated, liger
from unteach.benchmarks.roofline import Sizes, Stage, cross_entropy_path, product
from unteach.benchmarks.sweep import run
from unteach.kernels.linear_kl import linear_kl


def _unteach(case: Case, *, backend: str) -> Step:
    given = case.hidden_ND, case.head_VD, case.teacher.hidden_NE, case.teacher.head_VE
    return differentiated(
        case, lambda: linear_kl(*given, softcap=case.softcap, backend=backend).mean()
    )


def _eager(case: Case) -> Step:
    def log_probs(hidden: Tensor, head: Tensor) -> Tensor:
        return capped(hidden @ head.t(), case.softcap).float().log_softmax(1)

    def loss() -> Tensor:
        with torch.no_grad():
            theirs = log_probs(case.teacher.hidden_NE, case.teacher.head_VE)
        ours = log_probs(case.hidden_ND, case.head_VD)
        return kl_div(ours, theirs, reduction="batchmean", log_target=True)

    return differentiated(case, loss)


def _eager_path(sizes: Sizes) -> list[Stage]:
    logits = sizes.rows * sizes.vocab
    # log-probabilities of both sides: read, widened, normalised; kl_div: exp, difference, product,
    # sum; backward: its slopes, those of log_softmax, rounded
    passes = Stage(0, logits * (2 * (sizes.item + 3 * 4) + 9 * 4 + 5 * 4 + sizes.item))
    return [*product(sizes, 2), passes, *product(sizes, 2)]


def errors_of(found: tuple[Tensor, ...], case: Case) -> Errors:
    """How far the mean KL and both gradients are from float64."""
    z_s, cap_slope = soft_capped(raw_logits(case.hidden_ND, case.head_VD), case.softcap)
    taught = raw_logits(case.teacher.hidden_NE, case.teacher.head_VE)
    z_t, _ = soft_capped(taught, case.softcap)
    p_s, p_t = z_s.softmax(1), z_t.softmax(1)
    loss = float((p_t * (p_t.log() - p_s.log())).sum() / len(z_s))
    return differences(found, case, loss, (p_s - p_t) * cap_slope / len(z_s))


def providers(device: torch.device, backend: str = "auto") -> dict[str, Provider]:
    """Every provider by name."""

    def named(dense_pass: str, make: Make, path: Path) -> Provider:
        return Provider("KL over the vocabulary", dense_pass, make, path, errors_of)

    ours = partial(_unteach, backend="torch" if backend == "auto" else backend)
    # both sides' logits forward, and again for their slopes; two gradients
    tiles = partial(cross_entropy_path, products=6)
    return {
        "unteach": named("tiles", ours, tiles),
        "eager": named("logits in memory", _eager, _eager_path),
        "liger": named("chunks", partial(liger, beta=0.0), partial(cross_entropy_path, products=4)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows."""
    run("bench_linear_kl", __doc__, providers, argv)


if __name__ == "__main__":
    main()
