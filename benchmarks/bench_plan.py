"""What `unteach plan` foretells for a training step of the embedded model, and what the step takes.

Two numbers are held against the plan: bytes of tensors alive at the fullest moment, and resident
memory above that of the process before the model was loaded, libraries warm. Each mode of
recomputation runs in a process of its own, because a process's peak memory never comes down.

    python -m unteach.benchmarks.bench_plan --checkpointing off elementwise full
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unteach.benchmarks.harness import append_rows, in_process, peak_mib
from unteach.engine.config import Config, override
from unteach.engine.data.tokens import Batch, Example, collate
from unteach.engine.live_bytes import LiveBytes
from unteach.engine.model import (
    PreTrainedModel,
    head_weight,
    hidden_states,
    load_model,
    resolve_model,
)
from unteach.engine.plan import plan_batch
from unteach.engine.train.optim import adamw, choose_trainable
from unteach.engine.train.parallel import World, shard_model
from unteach.kernels.bitopk import HiddenTeacher, bitopk_loss
from unteach.kernels.linear_topk import linear_topk

ALONE = World(0, 1, torch.device("cpu"), None)


def live_peak(config: Config, path: str, batch: Batch, steps: int = 2) -> int:
    """Peak bytes of tensors in a step on real weights, the weights and moments included."""
    model = load_model(path, config.model)
    choose_trainable(model, config.optim)
    shard_model(model, config.parallel, ALONE)
    model.train()
    teacher, cached = cached_rows(model, config, batch)
    optimizer = adamw(model, config.optim)
    with LiveBytes() as live:
        for _ in range(steps):  # the second step has moments from the beginning
            live.peak = live.now
            hidden_BTD = hidden_states(model, batch.tokens_BT, batch.prefix_P, batch.place_BT)
            hidden_ND = hidden_BTD.flatten(0, 1)[batch.position_N]
            bitopk_loss(hidden_ND, head_weight(model), teacher, k=config.method.k).loss.backward()
            del hidden_BTD, hidden_ND
            optimizer.step()
            optimizer.zero_grad()
    held: list[Tensor] = [*model.parameters(), *cached]
    total: int = live.peak + sum(t.numel() * t.element_size() for t in held)
    return total


def cached_rows(
    model: PreTrainedModel, config: Config, batch: Batch
) -> tuple[HiddenTeacher, tuple[Tensor, ...]]:
    """Teacher rows of a micro-batch as the cache would hand them out, and their tensors."""
    head_VE = head_weight(model).detach().clone()
    hidden_NE = torch.randn(len(batch.position_N), head_VE.shape[1])
    logits_NM, ids_NM = linear_topk(hidden_NE, head_VE, config.teacher.top)
    kept = hidden_NE, head_VE, ids_NM, logits_NM
    return HiddenTeacher(*kept), kept


def random_batch(sequences: int, tokens: int, pack_tokens: int | None) -> Batch:
    """Random records, the second half of each supervised; packed ones differ in length."""
    torch.manual_seed(0)
    examples = []
    for index in range(sequences):
        length = tokens if pack_tokens is None else tokens * (index + 1) // sequences
        ids = tuple(torch.randint(0, 256, (length + 1,)).tolist())
        examples.append(Example(str(index), "general", ids[: length // 2], ids[length // 2 :]))
    return collate(examples, pack_tokens=pack_tokens)


def measure(config: Config, batch: Batch) -> dict[str, Any]:
    """Planned and measured peak of a step, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        small = resolve_model("tiny", Path(scratch))
        live_peak(config, small, random_batch(2, 8, None))  # loads what loads on first use
        path = resolve_model(config.model.path, Path(scratch))
        planned = plan_batch(config, 1, path, batch)
        before = peak_mib(ALONE.device)
        found = live_peak(config, path, batch)
        resident = peak_mib(ALONE.device) - before
    return {
        "model": config.model.path,
        "checkpointing": config.parallel.checkpointing,
        "pack_tokens": config.data.pack_tokens,
        "shape": list(batch.tokens_BT.shape),
        "rows": len(batch.position_N),
        "planned_mib": planned.peak / 2**20,
        "live_mib": found / 2**20,
        "resident_mib": resident,
    }


def main() -> None:
    """Measure every mode, one process each, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="model.path")
    parser.add_argument("--checkpointing", nargs="+", default=["off", "elementwise", "full"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pack", help="tokens of a packed row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        settings = [f"model.path={options.model}"]
        settings += [f"data.pack_tokens={options.pack}"] if options.pack else []
        settings += [f"parallel.checkpointing={options.checkpointing[0]}"]
        config = override(Config(), settings)
        batch = random_batch(options.sequences, options.tokens, config.data.pack_tokens)
        print(json.dumps(measure(config, batch)))
        return
    names = ("model", "sequences", "tokens", "threads", *(("pack",) if options.pack else ()))
    given = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    for mode in options.checkpointing:
        row = in_process(__spec__.name, [*given, "--here", "--checkpointing", mode])
        print(json.dumps(row), flush=True)
        if "skipped" not in row:
            append_rows("bench_plan", [row], ALONE.device)


if __name__ == "__main__":
    main()
