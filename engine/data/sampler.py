"""Which examples a step trains on: a function of seed and step, never of rank or world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from unteach.engine.data.tokens import Example


@dataclass(frozen=True)
class Stream:
    """Examples of one kind, of which every step takes `per_step`, epoch after epoch."""

    examples: tuple[Example, ...]
    per_step: int


def draw(streams: Sequence[Stream], seed: int, step: int) -> list[Example]:
    """The examples of one optimiser step, over all ranks.

    Each stream is its own endless sequence of shuffled epochs, read from where the steps before
    left off; the state is the step number alone.
    """
    chosen = []
    for index, stream in enumerate(streams):
        size = len(stream.examples)
        for place in range(step * stream.per_step, (step + 1) * stream.per_step):
            order = _epoch_order(seed, index, place // size, size)
            chosen.append(stream.examples[order[place % size]])
    return chosen


@lru_cache(maxsize=64)
def _epoch_order(seed: int, stream: int, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, stream, epoch)).permutation(size).tolist())


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
