"""The training loop: draw, loss, backward, step, log, save. Read top to bottom."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unteach.engine.config import Config
from unteach.engine.context_length import check_lengths
from unteach.engine.data.sampler import Stream, draw, rank_batches, share_contexts
from unteach.engine.model import (
    Head,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    empty_model,
    export_model,
    head_of,
    load_model,
    weight_files,
)
from unteach.engine.progress import progress, say
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.checkpoint import Saver, model_state, resume
from unteach.engine.train.log import FiniteGuard, StepLog, StepSums
from unteach.engine.train.lora import merge_adapters, reset_adapters
from unteach.engine.train.methods import find_method
from unteach.engine.train.optim import (
    adamw,
    choose_trainable,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from unteach.engine.train.own_rate import OwnRate
from unteach.engine.train.parallel import (
    LOSS_METHOD,
    World,
    compute_dtype,
    load_shards,
    shard_model,
    sync_gradients,
    whole,
)
from unteach.engine.train.read_ahead import ReadAhead
from unteach.engine.train.report_to import reporting
from unteach.engine.train.seeds import SeedFile
from unteach.engine.train.supervise import Part, micro_batch, rows_read, split_step, supervised_loss
from unteach.engine.train.surgery import GoalGradients
from unteach.engine.train.trunk import FrozenOutputs, Trunk, frozen_depth


@dataclass(frozen=True)
class Job:
    """One training run: what is trained on what, and where its files go.

    Attributes:
        base: resolved path of the model that training starts from.
        streams: examples, and how many of each a step takes.
        cache: teacher rows; None for methods that read labels alone.
        folder: gets train.jsonl, checkpoints/ and model/.
        fingerprint: what a checkpoint must agree on to be resumed.
        frozen: outputs of frozen blocks, taken over from an earlier training on the same examples.
    """

    title: str
    config: Config
    base: str
    tokenizer: PreTrainedTokenizerBase
    streams: tuple[Stream, ...]
    cache: TeacherCache | None
    folder: Path
    fingerprint: dict[str, Any] = field(default_factory=dict)
    frozen: FrozenOutputs | None = None


def train(job: Job, world: World) -> Path:
    """Train, or go on from the newest checkpoint, and export; returns the exported folder.

    Raises:
        InputError: a loss that is not finite, a checkpoint of another run, a full disk.
        KeyboardInterrupt: asked to stop by a signal; the last whole step is on disk.
    """
    config, method, optim = job.config, job.config.method, job.config.optim
    model, head, trainable = prepare_model(job, world)
    optimizer = adamw(model, optim, seed=config.run.seed)
    own_rate = OwnRate(config, model, optimizer, head, job.cache, world)
    start = resume(job.folder / "checkpoints", model, optimizer, trainable, job.fingerprint, world)
    saver = open_saver(job, world)
    log, guard = StepLog(job.folder / "train.jsonl", start, world), FiniteGuard(optimizer, world)
    streams, trunk = prepare_contexts(job, model, world)
    cache = ReadAhead(job.cache, world.device) if job.cache is not None else None
    passes = Passes(config, model, head, cache, open_seeds(job, head, world), trunk, world)

    with (
        stop_requests(world) as stop_asked,
        progress(job.title, optim.steps, unit="steps", done=start) as advance,
        reporting(config, job.folder, start, world.rank) as report,
    ):
        for step in range(start, optim.steps):
            parts = split_step(draw(streams, config.run.seed, step), method)

            sums, goals = StepSums(world), GoalGradients(model, method, world)
            for part in parts:
                passes.run(part, sums)
                goals.keep()
            goals.combine()

            lr = learning_rate(optim, step) * own_rate.factor
            set_learning_rate(optimizer, lr)
            norm = whole(clip_gradients(model, optim))
            guard.judge(step, sums, norm)
            own_rate.step(step, parts[-1])
            optimizer.zero_grad()
            if cache is not None and step + 1 < optim.steps:
                cache.announce(cached_rows(streams, config, world, step + 1))

            log.count(sums)
            done, note = step + 1, ""
            if done % config.run.log_every == 0 or done == optim.steps:
                guard.settle()
                line = log.write(done, sums, lr, norm)
                report(line)
                note = f"loss {line['loss']:.4f}"
            advance(1, note)
            stopping = stop_asked()
            if stopping or checkpoint_due(config, done):
                guard.settle()
                saver.save(done, model, optimizer, trainable)
            saver.poll()
            if stopping:
                saver.finish()
                raise KeyboardInterrupt

    saver.finish()
    merge_adapters(model)
    export_model(model, job.tokenizer, model_state(model), job.folder / "model", rank=world.rank)
    world.wait()
    return job.folder / "model"


@dataclass(frozen=True)
class Passes:
    """Forward and backward of a part's micro-batches: gradients add up in the parameters."""

    config: Config
    model: PreTrainedModel
    head: Head
    cache: ReadAhead | None
    seeds: SeedFile | None
    trunk: Trunk | None
    world: World

    def run(self, part: Part, sums: StepSums) -> None:
        """This rank's share of the part; its losses and counts are added to `sums`."""
        config, world = self.config, self.world
        batches = rank_batches(part.examples, world.rank, world.size, config.optim.accumulation)
        for index, chosen in enumerate(batches):
            batch = micro_batch(chosen, part, config)
            replay = self.trunk.replaying(batch) if self.trunk else nullcontext()
            batch = batch.to(world.device)
            sync_gradients(self.model, world, last=index == len(batches) - 1)
            with compute_dtype(config.parallel, world), replay:
                # A rank with nothing to supervise still takes part in every reduction.
                output = getattr(self.model, LOSS_METHOD)(
                    batch,
                    part,
                    config.method,
                    self.head,
                    self.cache,
                    self.seeds,
                    float(bool(chosen)),
                )
            # FSDP2 averages gradients over ranks; each loss is a share of the global sum.
            (output.loss * world.size).backward()
            if chosen:
                sums.add(batch, output)


def prepare_model(job: Job, world: World) -> tuple[PreTrainedModel, Head, list[str]]:
    """Choose what trains, checkpoint activations, compile, shard, load: in this order."""
    find_method(job.config.method.name)
    model, files = base_model(job, world)
    examples = (example for stream in job.streams for example in stream.examples)
    # The last token of a response is predicted and never read.
    check_lengths(model, ((e.record_id, len(e.context) + len(e.response) - 1) for e in examples))
    trainable = choose_trainable(model, job.config.optim)
    head = head_of(model, job.tokenizer)
    setattr(model, LOSS_METHOD, types.MethodType(supervised_loss, model))
    shard_model(model, job.config.parallel, world)
    if files:
        load_shards(model, files, job.config.parallel, world)
    reset_adapters(model, job.config.run.seed)
    model.eval()  # a dropout would make a resumed training another one, and the teacher had none
    return model, head, trainable


def base_model(job: Job, world: World) -> tuple[PreTrainedModel, dict[str, Path]]:
    """The whole model, or under FSDP2 an empty one and the files that its shards come from."""
    config = job.config.model
    if world.mesh is not None:
        model, files = empty_model(job.base, config), weight_files(job.base, config)
        if {name for name, _ in model.named_parameters()} <= files.keys():
            return model, files
        say("model: its files name tensors otherwise than the model, so every rank loads it whole")
    return load_model(job.base, config, device=world.device), {}


def open_saver(job: Job, world: World) -> Saver:
    """What writes this run's checkpoints."""
    return Saver(
        job.folder / "checkpoints",
        job.fingerprint,
        world,
        keep=job.config.run.keep_checkpoints,
        background=job.config.run.background_checkpoints,
    )


def open_seeds(job: Job, head: Head, world: World) -> SeedFile | None:
    """The seeds of this run's cache rows; rank 0 makes the file, all ranks share it."""
    if job.cache is None or not find_method(job.config.method.name).reads_teacher:
        return None
    shape = (job.cache.rows_total, min(2 * job.config.method.k, head.vocab))
    path = job.folder / "seeds.bin"
    if world.rank == 0:
        SeedFile(path, *shape)
    world.wait()
    return SeedFile(path, *shape)


def prepare_contexts(
    job: Job, model: PreTrainedModel, world: World
) -> tuple[tuple[Stream, ...], Trunk | None]:
    """Take out of every step what need not be computed in it: shared prompts, frozen blocks.

    Both call blocks more than once a step, or not at all: neither FSDP2's hooks nor recomputation
    nor compiled blocks expect that, so they serve a single process that uses none of them. Packed
    rows need position ids without a KV cache, so they share nothing either.
    """
    config = job.config
    plain = config.parallel.checkpointing == "off" and not config.parallel.compile
    if world.mesh is not None or not plain or config.data.pack_tokens is not None:
        return job.streams, None
    streams = share_contexts(job.streams)
    depth = frozen_depth(model) if config.optim.reuse_frozen else 0
    if not depth:
        return streams, None
    weights = (job.fingerprint.get("model"), config.model)
    return streams, Trunk(model, depth, streams, job.frozen, weights)


def cached_rows(
    streams: tuple[Stream, ...], config: Config, world: World, step: int
) -> Iterator[Tensor]:
    """The cache rows of this rank's micro-batches in a step."""
    for part in split_step(draw(streams, config.run.seed, step), config.method):
        share = rank_batches(part.examples, world.rank, world.size, config.optim.accumulation)
        for chosen in share:
            yield from rows_read(micro_batch(chosen, part, config), part)


def checkpoint_due(config: Config, done: int) -> bool:
    """Whether a checkpoint belongs behind this step; the last step is exported instead."""
    every = config.run.checkpoint_every
    return every is not None and done % every == 0 and done < config.optim.steps


@contextmanager
def stop_requests(world: World) -> Iterator[Any]:
    """Turn SIGINT and SIGTERM into a question that all ranks answer alike, asked once a step."""
    asked = torch.zeros((), dtype=torch.int32)  # on the CPU: no question to the device

    def remember(number: int, frame: object) -> None:
        nonlocal asked
        asked = torch.ones_like(asked)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(world.reduced(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
