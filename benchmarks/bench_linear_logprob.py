"""Label log-probabilities of hidden · headᵀ, forward and backward, beside full logits and peers.

Serves SFT, GA, NPO, SimNPO, FLAT and MOLLM. All providers here compute the same cross-entropy.

    python -m unteach.benchmarks.bench_linear_logprob --preset smollm2-135m --tokens 512
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unteach.benchmarks.comparison import Errors, Provider
from unteach.benchmarks.exact import differences, raw_logits, soft_capped
from unteach.benchmarks.harness import Step
from unteach.benchmarks.presets import Case
from unteach.benchmarks.providers import capped, differentiated, peers
from unteach.benchmarks.roofline import Sizes, Stage, cross_entropy_path, product
from unteach.benchmarks.sweep import run
from unteach.kernels.linear_logprob import linear_logprob


def _unteach(case: Case, *, backend: str) -> Step:
    def loss() -> Tensor:
        given = case.hidden_ND, case.head_VD, case.labels_N
        return -linear_logprob(*given, softcap=case.softcap, backend=backend).mean()

    return differentiated(case, loss)


def _eager(case: Case) -> Step:
    def loss() -> Tensor:
        logits = capped(case.hidden_ND @ case.head_VD.t(), case.softcap)
        return cross_entropy(logits.float(), case.labels_N)

    return differentiated(case, loss)


def _eager_path(sizes: Sizes) -> list[Stage]:
    logits = sizes.rows * sizes.vocab
    # float32 logits written and read twice, their slopes written, rounded and read by both products
    passes = Stage(0, logits * (4 * 4 + 2 * sizes.item))
    return [*product(sizes), passes, *product(sizes, 2)]


def errors_of(found: tuple[Tensor, ...], case: Case) -> Errors:
    """How far the mean cross-entropy and both gradients are from float64."""
    z, cap_slope = soft_capped(raw_logits(case.hidden_ND, case.head_VD), case.softcap)
    rows = torch.arange(len(z), device=z.device)
    loss = (z.logsumexp(1) - z[rows, case.labels_N]).mean()
    slopes = z.softmax(1)
    slopes[rows, case.labels_N] -= 1
    return differences(found, case, float(loss), slopes * cap_slope / len(z))


def providers(device: torch.device, backend: str = "auto") -> dict[str, Provider]:
    """Every provider by name."""
    ours = partial(_unteach, backend="torch" if backend == "auto" else backend)
    tiles = partial(cross_entropy_path, products=4)  # the logits are made again for their slopes
    found: dict[str, Provider] = {
        "unteach": Provider("cross-entropy", "tiles", ours, tiles, errors_of),
        "eager": Provider("cross-entropy", "logits in memory", _eager, _eager_path, errors_of),
    }
    for name, peer in peers().items():
        found[name] = replace(peer, loss="cross-entropy", check=errors_of)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows."""
    run("bench_linear_logprob", __doc__, providers, argv)


if __name__ == "__main__":
    main()
