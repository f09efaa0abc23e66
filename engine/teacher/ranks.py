"""Work that all ranks share: what one rank finds wrong, every rank raises, so that none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from unteach.engine.errors import InputError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a launcher."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(work: Callable[[], T]) -> list[T]:
    """Do work on every rank and give every rank all results, by rank.

    Raises:
        InputError: the lowest rank's, on all of them.
    """
    if not dist.is_initialized():
        return [work()]
    outcome: tuple[Any, str | None]
    try:
        outcome = (work(), None)
    except InputError as error:
        outcome = (None, str(error))
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for _, sentence in outcomes:
        if sentence is not None:
            raise InputError(sentence)
    return [result for result, _ in outcomes]


def first_rank(work: Callable[[], T]) -> T:
    """Do work on rank 0 alone while the others wait, and give every rank its result.

    Raises:
        InputError: rank 0's, on all ranks.
    """
    rank, _ = rank_and_world()
    result = together(lambda: work() if rank == 0 else None)[0]
    return result  # type: ignore[return-value]
