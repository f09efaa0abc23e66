"""README tables of what a training step holds: measured by bench_step, foretold by bench_plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def memory_block(rows: Sequence[Row]) -> str:
    """Peak memory of a whole training step by each provider's last row, time by its last several.

    A row of a single step has no spread, so it tells of memory alone.
    """
    last = {row["provider"]: row for row in rows}
    timed = {row["provider"]: row for row in rows if row["min_ms"] < row["max_ms"]}
    row = next(iter(last.values()))
    lines = [
        "| | peak, MiB | above weights, gradients and AdamW state, MiB | less than eager "
        "| less than eager that recomputes alike | seconds a step (least to most) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in sorted(last.items(), key=lambda item: item[1]["above_state_mib"]):
        above = found["above_state_mib"]
        steps, alike = timed.get(name), last.get(name.replace("unteach", "eager"))
        ends = [f"{steps[key] / 1e3:.1f}" for key in ("min_ms", "max_ms")] if steps else []
        cells = (
            f"{found['peak_mib']:.0f}",
            f"{above:.0f}",
            f"{last['eager']['above_state_mib'] / above:.1f}×",
            f"{alike['above_state_mib'] / above:.1f}×" if alike and alike is not found else "",
            " to ".join(ends),
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    used = (*last.values(), *timed.values())
    commits = ", ".join(f"`{each}`" for each in dict.fromkeys(row["commit"] for row in used))
    lines += [
        "",
        f"{row['preset']}, {row['sequences']} sequences of {row['tokens']} tokens, {row['dtype']}, "
        f"on {row['device']} (threads: {row['threads']}), torch {row['versions']['torch']}, "
        f"commits {commits}, each in a process of its own, by `python -m "
        f"unteach.benchmarks.bench_step --preset {row['preset']}`, which has glibc give back large "
        "blocks at once (`MALLOC_MMAP_THRESHOLD_=1048576`), so that resident memory follows the "
        "tensors; times are of earlier rows without that. `eager`: [B, T, V] logits of "
        "the student and of a teacher in memory; `open-unlearning`: cross-entropy and KL to a "
        "reference model in memory. The second model's weights stand in the second column. "
        "`-elementwise`, `-selective`, `-checkpointing`: with `parallel.checkpointing` at "
        "`elementwise`, `selective` and `full`.",
    ]
    return "\n".join(lines)


def plan_block(rows: Sequence[Row]) -> str:
    """What the plan foretold of a step and what it took, the last row of each mode."""
    last = {(row["checkpointing"], row["pack_tokens"]): row for row in rows}
    row = next(iter(last.values()))
    lines = [
        "| `parallel.checkpointing` | planned, MiB | tensors alive, MiB | resident, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for found in last.values():
        planned = found["planned_mib"]
        cells = [f"{planned:.0f}"]
        for key in ("live_mib", "resident_mib"):
            cells.append(f"{found[key]:.0f} (plan {planned / found[key] - 1:+.1%})")
        packed = f", packed by {found['pack_tokens']}" if found["pack_tokens"] else ""
        lines.append(f"| `{found['checkpointing']}`{packed} | {' | '.join(cells)} |")
    lines += [
        "",
        f"What `unteach plan` foretells for a step of the {row['model']} model, all parameters "
        f"trained, {row['shape'][0]} rows of {row['shape'][1]} tokens, against the bytes of "
        "tensors at its fullest moment and the resident memory above that of the process before "
        f"the model was loaded, which also holds what is no tensor (large blocks given back at "
        "once: `MALLOC_MMAP_THRESHOLD_=1048576`); torch "
        f"{row['versions']['torch']}, commit `{row['commit']}`, each "
        "in a process of its own, by `python -m unteach.benchmarks.bench_plan`.",
    ]
    return "\n".join(lines)
