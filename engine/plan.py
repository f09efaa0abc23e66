"""What a training step takes, in bytes by item, before anything is loaded: from config alone.

The largest step of a run is walked through with fake tensors, which have sizes and no memory; what
is alive at its fullest moment is counted. Weights, moments and gathered units are arithmetic.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unteach.engine.config import Config, override
from unteach.engine.data.prepare import prepared
from unteach.engine.data.records import GOALS, Record, read_records, train_split
from unteach.engine.data.sampler import Stream, rank_batches, share_contexts
from unteach.engine.data.tokens import Batch, Example, collate, response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.live_bytes import LiveBytes
from unteach.engine.model import (
    DTYPES,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    blocks,
    empty_model,
    head_weight,
    hidden_states,
    load_tokenizer,
    resolve_model,
    skip_masks,
)
from unteach.engine.run import with_additions
from unteach.engine.train.lean_adamw import SLICE
from unteach.engine.train.methods import find_method, settle
from unteach.engine.train.optim import choose_trainable
from unteach.engine.train.parallel import forward_dtype
from unteach.engine.train.recompute import checkpoint_blocks
from unteach.kernels.candidate_pool import pool_capacity
from unteach.kernels.topk_filter import TILE_ELEMENTS, tile_width

MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 256}  # a scale for 256 codes
PAIR_BYTES = 12  # row, id and slope
COPIES = 2.5  # what ranking and choosing copy: measured 2.4 and 2.8 times at 49152 and 258 ids
SWITCHES = (
    ("parallel.checkpointing=elementwise", "norms and activations are computed twice"),
    ("parallel.checkpointing=selective", "every second product is computed twice"),
    ("parallel.checkpointing=full", "every block runs forward twice: a third more time"),
    ("optim.accumulation=2", "micro-batches of half the size"),
    ("optim.accumulation=4", "micro-batches of a quarter of the size"),
    ("optim.state=bfloat16", "moments of 8 bits precision, rounded stochastically"),
    ("model.dtype=bfloat16", "weights of 8 bits precision, rounded stochastically"),
    ("optim.state=8bit", "moments in blocks of 256; needs torchao"),
    ("optim.lora_rank=16", "adapters train in place of weights, at some ten times the rate"),
    ("parallel.cpu_offload=true", "state in host memory: every step moves it to the GPU and back"),
)


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank in the training stage.

    Attributes:
        items: name → bytes; they are not all alive at once.
        peak: bytes of the fullest moment.
    """

    items: dict[str, int]
    peak: int


def plan(config: Config, gpus: int) -> Plan:
    """What the largest training step of a config takes on each of `gpus` ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        path = resolve_model(config.model.path, Path(scratch))
        tokenizer = load_tokenizer(path, config.model)
        batch = largest_batch(config, gpus, tokenizer)
        return plan_batch(config, gpus, path, batch)


def plan_batch(config: Config, gpus: int, path: str, batch: Batch) -> Plan:
    """The same for a micro-batch that is already known."""
    sharded = gpus > 1 or config.parallel.cpu_offload
    parts = gpus // config.parallel.replicate if sharded else 1
    compute = forward_dtype(DTYPES[config.model.dtype], config.parallel)
    method = find_method(config.method.name)
    goals = len(method.terms) if method.combine else 1  # gradients that are kept apart
    probes = method.own_rate and config.method.own_rate_every is not None
    model = empty_model(path, config.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_parameters(model, DTYPES[config.model.dtype], torch.device("cpu"))
        choose_trainable(model, config.optim)
        stored = DTYPES[config.model.dtype].itemsize
        every = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        units = _unit_bytes(model, compute.itemsize) if sharded else 0
        head_elements = head_weight(model).numel()
        checkpoint_blocks(blocks(model), config.parallel.checkpointing)
        if config.model.attention == "sdpa" and batch.place_BT is None and not len(batch.prefix_P):
            skip_masks(model)
        if sharded:
            _replace_parameters(model, compute, torch.device("cpu"))
        rows = len(batch.position_N)
        workspace = _workspace(rows, config.method.k, head_weight(model).shape[0])
        live = _step_bytes(config, model, batch, workspace, reduced=sharded)
        probe = workspace + _probe_bytes(config, model, batch, reduced=sharded) if probes else 0
    gradient = math.ceil(trained * stored / parts)
    items = {
        "weights": math.ceil(every * stored / parts),
        "gradients": goals * gradient,
        "optimiser": math.ceil(2 * trained * MOMENT_BYTES[config.optim.state] / parts),
        "activations": live.activations,
        "whole units": units,
        "head workspace": workspace + rows * 2 * config.method.k * PAIR_BYTES,
        **_teacher_bytes(config, model, rows, head_elements),
    }
    lean = config.optim.state != "float32" or config.model.dtype != "float32"
    update = gradient + max(8 * 4 * SLICE if lean else 0, probe + units if probes else 0)
    update += 2 * gradient if probes else 0  # the parameters before the step and after it
    held = items["weights"] + items["optimiser"] + items["teacher head"] + items["teacher rows"]
    if config.parallel.cpu_offload:
        held = items["teacher head"] + items["teacher rows"]
        gradient = update = 0
    # Without FSDP2 the pass that was counted has one goal's gradient in it.
    step = live.peak + units + (goals if sharded else goals - 1) * gradient
    return Plan(items, held + max(step, update))


def largest_batch(config: Config, gpus: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The micro-batch of the longest records that `data.mix` can bring together in a step."""
    config = settle(config)
    method = find_method(config.method.name)
    path = prepared(config.data, Path(config.run.folder))
    if not path.is_file():
        raise InputError(f"{path} is not there yet: `unteach teach` with this recipe makes it.")
    known, _, opened = with_additions(config.data, read_records(path))
    known = [r for r in known if r.id not in opened or method.takes_open(r.goal, config.teacher)]
    records = train_split(known, anchors=config.data.anchors, form=config.data.form)
    chosen: list[Example] = []
    for goal in GOALS:
        rows = [_example(config, tokenizer, r) for r in records if r.goal == goal]
        rows.sort(key=lambda e: len(e.context) + len(e.response), reverse=True)
        count = config.data.mix.get(goal, 0)
        chosen += (rows * math.ceil(count / max(len(rows), 1)))[:count] if rows else []
    plain = config.parallel.checkpointing == "off" and not config.parallel.compile
    if gpus == 1 and plain and config.data.pack_tokens is None:
        chosen = list(share_contexts([Stream(tuple(chosen), len(chosen))])[0].examples)
    first_only = config.method.positions == "first"
    batches = [
        collate(part, first_only=first_only, pack_tokens=config.data.pack_tokens)
        for rank in range(gpus)
        for part in rank_batches(chosen, rank, gpus, config.optim.accumulation)
        if part
    ]
    return max(batches, key=lambda b: b.tokens_BT.numel())


def remedies(config: Config, gpus: int, limit: int) -> tuple[list[str], Plan]:
    """The cheapest switches that make a config fit into `limit` bytes, or all that help."""
    chosen: list[str] = []
    best = plan(config, gpus)
    for setting, _ in SWITCHES:
        if best.peak <= limit:
            break
        tried = plan(override(config, [*chosen, setting]), gpus)
        if tried.peak < best.peak:
            name = setting.partition("=")[0]
            chosen = [s for s in chosen if not s.startswith(f"{name}=")] + [setting]
            best = tried
    for setting in list(chosen):
        fewer = [s for s in chosen if s != setting]
        tried = plan(override(config, fewer), gpus)
        if tried.peak <= limit:
            chosen, best = fewer, tried
    return chosen, best


@dataclass(frozen=True)
class _Live:
    peak: int  # gradients included, where they are not reduced away
    activations: int  # kept from the forward pass for the backward pass


def _workspace(rows: int, k: int, vocab: int) -> int:
    """One tile, its peaks and one pool of candidates, as topk_filter.py cuts them, and copies."""
    tile, pool = tile_width(k, vocab), pool_capacity(k)
    block = min(rows, max(1, TILE_ELEMENTS // max(tile, pool)))
    return math.ceil(COPIES * block * (4 * tile + tile // 2 + 8 * min(pool, vocab)))


def _step_bytes(
    config: Config, model: PreTrainedModel, batch: Batch, workspace: int, *, reduced: bool
) -> _Live:
    """One forward and backward pass, counted."""
    if reduced:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)
    model.eval()
    slots = 2 * config.method.k
    mixed = not reduced and config.parallel.dtype == "bfloat16"
    with LiveBytes() as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        hidden_BTD = hidden_states(model, batch.tokens_BT, batch.prefix_P, batch.place_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.position_N]
        activations = live.now
        weight_VD = head_weight(model).to(hidden_ND.dtype)
        loss: Tensor = _HeadStandIn.apply(hidden_ND, weight_VD, slots, workspace)
        loss.backward()
    return _Live(live.peak, activations)


def _probe_bytes(config: Config, model: PreTrainedModel, batch: Batch, *, reduced: bool) -> int:
    """One forward pass of which nothing is kept, as an own rate's probe makes it."""
    mixed = not reduced and config.parallel.dtype == "bfloat16"
    with (
        LiveBytes() as live,
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed),
    ):
        hidden_states(model, batch.tokens_BT, batch.prefix_P, batch.place_BT)
    return int(live.peak)


def _replace_parameters(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """New parameters of the same shapes; called inside the fake mode, they take no memory.

    `Module.to` cannot swap fake tensors.
    """
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    model.tie_weights()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _HeadStandIn(torch.autograd.Function):
    """Allocates what the fused loss allocates."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, head_VD: Tensor, slots: int, workspace: int
    ) -> Tensor:
        context.head = head_VD
        context.gradient = torch.zeros(hidden_ND.shape, dtype=torch.float32)
        context.pairs = torch.zeros(len(hidden_ND), slots * PAIR_BYTES, dtype=torch.uint8)
        torch.zeros(workspace, dtype=torch.uint8)
        context.dtype = hidden_ND.dtype
        return hidden_ND.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        wants = context.needs_input_grad[1]
        head = torch.zeros_like(context.head) if wants else None
        gradient = context.gradient.to(context.dtype)
        del context.gradient, context.pairs
        return gradient, head, None, None


def _unit_bytes(model: PreTrainedModel, itemsize: int) -> int:
    """Two whole blocks, the root and the head, and what one has yet to reduce in float32."""
    block = max(sum(p.numel() for p in layer.parameters()) for layer in blocks(model))
    head = head_weight(model).numel()
    return (2 * block + head) * itemsize + max(block, head) * 4


def _teacher_bytes(
    config: Config, model: PreTrainedModel, rows: int, head_elements: int
) -> dict[str, int]:
    """The frozen head, and the rows of this micro-batch and of the one on its way."""
    if not find_method(config.method.name).reads_teacher:
        return {"teacher head": 0, "teacher rows": 0}
    size = DTYPES[config.teacher.dtype].itemsize
    width = head_weight(model).shape[1]
    vocab = head_elements // width
    ids = 8 * config.teacher.top  # an id and its logit
    row = {
        "hidden": width * size + ids,
        "logits": vocab * DTYPES[config.teacher.logits_dtype].itemsize + 4 * config.teacher.top,
        "topk": ids,
    }[config.teacher.form]
    head = head_elements * size if config.teacher.form == "hidden" else 0
    return {"teacher head": head, "teacher rows": 2 * rows * row}


def _example(config: Config, tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    """A record as the student may see it at its longest."""
    context = tuple(student_context(tokenizer, record))
    kind = config.teacher.response[record.goal]
    if kind == "teacher" or record.unanswered:
        response: Sequence[int] = [0] * (config.teacher.max_new_tokens + 1)
    else:
        answer = record.answer if kind != "refusal" else config.teacher.refusal
        response = response_tokens(tokenizer, answer or "", prefix=record.prefix)
    return Example(record.id, record.goal, context, tuple(response), 0)


def lines(config: Config, gpus: int, limit: int) -> Iterator[str]:
    """What `unteach plan` prints: the items, the peak, and which switches make it fit."""
    made = plan(config, gpus)
    for name, size in made.items.items():
        yield f"{name:<16}{size / 2**30:10.3f} GiB"
    yield f"{'peak of a step':<16}{made.peak / 2**30:10.3f} GiB on each of {gpus}"
    if made.peak <= limit:
        yield f"It fits into {limit / 2**30:g} GiB."
        return
    chosen, best = remedies(config, gpus, limit)
    why = dict(SWITCHES)
    for setting in chosen:
        yield f"--set {setting:<36} {why[setting]}"
    verdict = "fits into" if best.peak <= limit else "still does not fit into"
    yield f"With these it takes {best.peak / 2**30:.3f} GiB and {verdict} {limit / 2**30:g} GiB."
