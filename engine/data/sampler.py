"""Which examples a step trains on: a function of seed and step, never of rank or world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

from unteach.engine.data.tokens import Example, common_length

T = TypeVar("T")
WINDOW = 6  # batches among which like lengths are sought


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, in order and evenly spaced."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


@dataclass(frozen=True, eq=False)  # the order of an epoch is looked up by identity: no hashing
class Stream:
    """Examples of one kind, shuffled epoch after epoch, `per_step` at a time.

    Attributes:
        steps: None = part of every step, beside the other streams; a number = so many steps of
            the run belong to this stream alone, spread over all of it.
    """

    examples: tuple[Example, ...]
    per_step: int
    steps: int | None = None


def draw(streams: Sequence[Stream], seed: int, step: int) -> list[Example]:
    """The examples of one optimiser step, over all ranks.

    Each stream is its own endless sequence of shuffled epochs, read from where the steps before
    left off; the state is the step number alone.
    """
    if streams[0].steps is None:
        turns = [(index, step) for index in range(len(streams))]
    else:
        turns = [_turn(tuple(stream.steps or 0 for stream in streams), seed, step)]
    chosen = []
    for index, turn in turns:
        stream = streams[index]
        size = len(stream.examples)
        for place in range(turn * stream.per_step, (turn + 1) * stream.per_step):
            order = _epoch_order(stream, seed, index, place // size)
            chosen.append(stream.examples[order[place % size]])
    return chosen


def share_contexts(streams: Sequence[Stream]) -> tuple[Stream, ...]:
    """The same streams, their examples marked with how much of their contexts is common.

    Common among all that can meet in one step: all streams together, or each that steps alone.
    """
    if streams[0].steps is None:
        length = common_length([e.context for stream in streams for e in stream.examples])
        lengths = [length] * len(streams)
    else:
        lengths = [common_length([e.context for e in stream.examples]) for stream in streams]
    return tuple(
        replace(stream, examples=tuple(replace(e, shared=length) for e in stream.examples))
        for stream, length in zip(streams, lengths, strict=True)
    )


def rank_batches(
    examples: Sequence[Example], rank: int, size: int, accumulation: int
) -> list[list[Example]]:
    """This rank's micro-batches: its share of the step, like lengths together.

    Every rank gets `accumulation` micro-batches, empty ones included, so that all take part in
    every reduction.
    """
    by_length = sorted(examples, key=lambda e: (len(e.context) + len(e.response), e.record_id))
    mine = by_length[rank::size]
    cuts = [round(i * len(mine) / accumulation) for i in range(accumulation + 1)]
    return [mine[first:last] for first, last in pairwise(cuts)]


@lru_cache(maxsize=64)
def _epoch_order(stream: Stream, seed: int, index: int, epoch: int) -> tuple[int, ...]:
    """One shuffled pass; a stream that steps alone meets like lengths, so that little is padded."""
    rng = np.random.default_rng((seed, index, epoch))
    order = rng.permutation(len(stream.examples)).tolist()
    if stream.steps is None:
        return tuple(order)
    lengths = [len(e.context) + len(e.response) for e in stream.examples]
    window, size = WINDOW * stream.per_step, stream.per_step
    alike = [
        place
        for first in range(0, len(order), window)
        for place in sorted(order[first : first + window], key=lengths.__getitem__)
    ]
    batches = [alike[first : first + size] for first in range(0, len(alike), size)]
    whole = [batch for batch in batches if len(batch) == size]
    shuffled = [whole[i] for i in rng.permutation(len(whole))] + batches[len(whole) :]
    return tuple(place for batch in shuffled for place in batch)


def _turn(steps: tuple[int, ...], seed: int, step: int) -> tuple[int, int]:
    """Which stream a step belongs to, and how many of its steps came before."""
    owners = _owners(steps, seed)
    index = owners[step % len(owners)]
    return index, step // len(owners) * steps[index] + owners[: step % len(owners)].count(index)


@lru_cache(maxsize=8)
def _owners(steps: tuple[int, ...], seed: int) -> tuple[int, ...]:
    owners = np.repeat(np.arange(len(steps)), steps)
    return tuple(np.random.default_rng((seed, len(steps))).permutation(owners).tolist())
