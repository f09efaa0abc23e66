"""Providers side by side in one process: held against the truth, then memory, then time.

A provider makes a step: no arguments, returns tensors (of a loss: value, dL/dhidden, dL/dhead). One
that cannot run here raises Unavailable, and its row says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unteach.benchmarks.harness import (
    Step,
    allocated_bytes,
    extra_mib,
    interleaved_ms,
    spread,
)
from unteach.benchmarks.presets import Case
from unteach.benchmarks.roofline import Peaks, Sizes, Stage, floor_ms

Make = Callable[[Case], Step]
Path = Callable[[Sizes], list[Stage]]

# Rows that are held against float64.
CHECKED_ROWS = 16
# What ours must keep, relative to float64 on the same rounded inputs.
LOSS_TOLERANCE, GRAD_TOLERANCE = 2e-4, 2.0**-8
MEASURED = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "min_ms",
    "extra_mib",
    "tflops",
    "floor_ms",
    "share_of_roofline",
    "loss_error",
    "grad_error",
)


class Unavailable(Exception):
    """Why a provider cannot run here, in one line."""


@dataclass(frozen=True)
class Errors:
    """Largest deviation over the largest true value; of the gradients the worse one."""

    loss: float
    grad: float = 0.0


@dataclass(frozen=True)
class Provider:
    """One line of a comparison.

    Attributes:
        loss: what it computes.
        dense_pass: how it comes by the student's logits.
        path: the stages whose floor is its roofline.
        check: how far its tensors are from the truth; None where it computes something else.
    """

    loss: str
    dense_pass: str
    make: Make
    path: Path
    check: Callable[[tuple[Tensor, ...], Case], Errors] | None = None

    @property
    def same_loss(self) -> bool:
        return self.check is not None


def prepare(name: str, provider: Provider, case: Case) -> tuple[Step, Errors | None]:
    """Make a provider's step, hold it against float64, and let it run once.

    Raises:
        Unavailable: it cannot run here.
        AssertionError: ours is wrong.
    """
    ours = name.startswith("unteach")
    try:
        step = provider.make(case)
        errors = None
        if provider.check is not None:
            few = case.first_rows(min(CHECKED_ROWS, case.sizes.rows))
            errors = provider.check(provider.make(few)(), few)
        step()
    except Unavailable:
        raise
    except Exception as error:  # another project's failure is a result, not our end
        if ours:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise Unavailable(f"{type(error).__name__}: {reason}") from error
    if ours and errors is not None:
        right = errors.loss <= LOSS_TOLERANCE and errors.grad <= GRAD_TOLERANCE
        assert right, f"{name} is wrong: {errors}"
    return step, errors


def measure(
    case: Case, chosen: dict[str, Provider], *, rounds: int, peaks: Peaks
) -> list[dict[str, Any]]:
    """One row a provider: correctness, extra memory, then time in interleaved rounds."""
    device = case.hidden_ND.device
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, provider in chosen.items():
        row: dict[str, Any] = {
            "provider": name,
            "loss": provider.loss,
            "same_loss": provider.same_loss,
            "dense_pass": provider.dense_pass,
            **dict.fromkeys(MEASURED),
        }
        rows[name] = row
        before = allocated_bytes(device)
        try:
            step, errors = prepare(name, provider, case)
        except Unavailable as reason:
            row["skipped"] = str(reason)
            continue
        if errors is not None:
            row["loss_error"], row["grad_error"] = errors.loss, errors.grad
        row["extra_mib"] = extra_mib(step, device, allocated_bytes(device) - before)
        steps[name] = step
    for name, times in interleaved_ms(steps, rounds, device).items():
        stages = chosen[name].path(case.sizes)
        floor = floor_ms(stages, peaks)
        row = rows[name]
        row |= spread(times)
        row["tflops"] = sum(stage.flops for stage in stages) / row["median_ms"] / 1e9
        row["floor_ms"] = floor
        row["share_of_roofline"] = None if floor is None else floor / row["median_ms"]
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What the terminal shows of the rows of one case."""
    lines = [f"{'provider':<17}{'median ms':>11}{'best ms':>10}{'extra MiB':>11}{'roofline':>10}"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['provider']:<17}skipped: {row['skipped']}")
            continue
        share = row["share_of_roofline"]
        lines.append(
            f"{row['provider']:<17}{row['median_ms']:>11.2f}{row['min_ms']:>10.2f}"
            f"{row['extra_mib']:>11.1f}{'' if share is None else f'{share:.0%}':>10}"
            + ("" if row["same_loss"] else f"  {row['loss']}")
        )
    return "\n".join(lines)
