"""What a step was like: sums kept on the device, one line of train.jsonl where the host reads."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unteach.engine.data.records import GOALS
from unteach.engine.data.tokens import Batch
from unteach.engine.errors import InputError
from unteach.engine.files import unwritable, write_atomic
from unteach.engine.train.parallel import World
from unteach.engine.train.terms import MethodOutput


class StepSums:
    """Loss, loss per goal, tokens and coverage of one step, summed over micro-batches."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loss = torch.zeros((), device=world.device)
        # per goal: sum of row losses, rows, sum of coverage
        self.goals_G3 = torch.zeros(len(GOALS), 3, device=world.device)
        self.counts_2 = torch.zeros(2, dtype=torch.int64, device=world.device)  # tokens, fallback
        self.seen: list[tuple[Batch, Tensor]] = []

    def add(self, batch: Batch, output: MethodOutput) -> None:
        """Take a micro-batch in, without asking the device for a number."""
        row_N = output.row_loss_N
        cover_N = output.coverage_N if output.coverage_N is not None else torch.ones_like(row_N)
        rows_N3 = torch.stack([row_N, torch.ones_like(row_N), cover_N], dim=1).float()
        self.loss += output.loss.detach()
        self.goals_G3.index_add_(0, batch.goal_N.to(row_N.device, non_blocking=True), rows_N3)
        self.counts_2[0] += batch.prefix_P.numel() + batch.tokens_BT.numel()
        if output.fallback_rows is not None:
            self.counts_2[1] += output.fallback_rows
        self.seen.append((batch, row_N))

    def blame(self, step: int) -> InputError:
        """The error of a step that is not finite: step, goals and records; asked on all ranks."""
        bad = [
            f"{batch.examples[owner].record_id} ({batch.examples[owner].goal})"
            for batch, row_N in self.seen
            for owner in sorted(set(batch.example_N[~torch.isfinite(row_N.cpu())].tolist()))
        ]
        if self.world.mesh is not None:
            gathered: list[Any] = [None] * self.world.size
            dist.all_gather_object(gathered, bad)
            bad = [name for names in gathered for name in names]
        if not bad:
            return InputError(
                f"Step {step + 1}: the gradient is not finite, though every loss is; that step was "
                "not taken: lower optim.lr."
            )
        return InputError(
            f"Step {step + 1}: the loss is not finite, because of records {', '.join(bad[:8])}; "
            "that step was not taken: lower optim.lr or remove those records."
        )


class FiniteGuard:
    """Keeps a loss or gradient that is NaN or infinite out of the weights, without asking the host.

    The verdict of a step stays on the device, where the optimiser reads it and leaves out that step
    and all after it. The host reads it when it reads the loss anyway, and before a checkpoint.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.optimizer, self.world = optimizer, world
        # Where the optimiser looks: a copy that it made itself would not wait for the verdict.
        self.place = optimizer.param_groups[0]["params"][0].device
        self.bad = torch.zeros((), device=world.device)  # 1 from the first bad step on
        self.unread: list[tuple[int, StepSums, Tensor]] = []

    def judge(self, step: int, sums: StepSums, norm: Tensor) -> None:
        """To be called between the gradients of a step and the optimiser.

        An optimiser that cannot leave out a step costs one question to the device a step.
        """
        finite = torch.isfinite(norm) & torch.isfinite(self.world.reduced(sums.loss))
        self.bad = torch.maximum(self.bad, (~finite).float())
        self.unread.append((step, sums, self.bad))
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = self.bad.to(self.place)  # type: ignore[attr-defined]
        else:
            self.settle()

    def settle(self) -> None:
        """Stop all ranks when a step since the last call was not finite.

        Raises:
            InputError: names the first such step, its goals and records.
        """
        if bool(self.bad):
            raise next(sums.blame(step) for step, sums, bad in self.unread if bool(bad))
        self.unread.clear()


class StepLog:
    """train.jsonl: one line a logged step, the lines after a resumed step written anew.

    Raises:
        InputError: the disk is full; a line before the last is not one of ours.
    """

    def __init__(self, path: Path, start: int, world: World) -> None:
        self.path, self.world = path, world
        self.at = time.monotonic()
        self.tokens = torch.zeros((), dtype=torch.int64, device=world.device)  # since the last line
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for step, line in _whole_lines(path) if step <= start]
            write_atomic(path, b"".join(line + b"\n" for line in kept))

    def count(self, sums: StepSums) -> None:
        """Take in the tokens of a step, logged or not, without asking the device for a number."""
        self.tokens += sums.counts_2[0]

    def write(self, step: int, sums: StepSums, lr: float, norm: Tensor) -> dict[str, Any]:
        """Append the line of a step that has just ended; returns it on every rank.

        `loss_<goal>` is the plain mean over that goal's supervised rows, one that two backward
        passes read counted twice: without weights, so these do not add up to `loss`.
        """
        world = self.world
        loss = float(world.reduced(sums.loss))
        goals = world.reduced(sums.goals_G3).tolist()
        tokens, fallback = int(world.reduced(self.tokens)), int(world.reduced(sums.counts_2[1]))
        at = time.monotonic()
        rows = sum(count for _, count, _ in goals)
        line: dict[str, Any] = {"step": step, "loss": loss}
        for goal, (total, count, _) in zip(GOALS, goals, strict=True):
            if count:
                line[f"loss_{goal}"] = total / count
        line |= {
            "lr": lr,
            "grad_norm": float(norm),
            "rows": int(rows),
            "tokens": tokens,
            "seconds": at - self.at,
            "tokens_per_second": tokens / max(at - self.at, 1e-9),
            "peak_mib": peak_mib(world.device),
            "coverage": sum(cover for _, _, cover in goals) / max(rows, 1.0),
            "fallback_rows": fallback,
        }
        self.at = at
        self.tokens.zero_()
        if world.rank == 0:
            try:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
            except OSError as error:
                raise InputError(unwritable(self.path, error)) from error
        return line


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def reset_peak(device: torch.device) -> bool:
    """Begin to measure `peak_mib` anew; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a log by their step, without a last one that a kill or a full disk cut short."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found = []
    for place, line in enumerate(lines[:-1], start=1):
        try:
            found.append((int(json.loads(line)["step"]), line))
        except (ValueError, LookupError, TypeError) as error:
            if place < len(lines) - 1:
                raise InputError(
                    f"{path}, line {place}: not a line of a training log; remove that line to go "
                    "on."
                ) from error
    return found
