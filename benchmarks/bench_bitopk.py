"""The fused bidirectional top-K loss, forward and backward, beside everything else that runs here.

All providers run in one process on the same inputs, in interleaved rounds. Those that compute the
same loss are first held against float64 on a few rows; the error stands in the row. Where one
cannot run, its row says why.

    python -m unteach.benchmarks.bench_bitopk --preset smollm2-135m --tokens 512 --k 32
    python -m unteach.benchmarks.bench_bitopk --preset llama-3.2-3b --device cuda --tokens 8192
    python -m unteach.benchmarks.bench_bitopk --save-hidden FILE    then    --inputs FILE
"""

from __future__ import annotations

from collections.abc import Sequence

from unteach.benchmarks.providers import providers
from unteach.benchmarks.sweep import run


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every combination of the lists, and append the rows."""
    run("bench_bitopk", __doc__, providers, argv)


if __name__ == "__main__":
    main()
