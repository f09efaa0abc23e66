"""The student's own last top ids, kept beside the run: a guess that makes the next pass fast.

Only speed depends on them. The cache is immutable, so they live in a file of their own, keyed by
cache row; where a row has none yet, the cache's ids of the unprompted teacher serve.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unteach.engine.errors import InputError
from unteach.engine.files import unwritable


class SeedFile:
    """int32 [rows, slots] on disk; 0 is "none yet", id + 1 otherwise.

    Raises:
        InputError: the disk has no room for all of it.
    """

    def __init__(self, path: Path, rows: int, slots: int) -> None:
        size = rows * slots * 4
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size != size:
            _make_zeros(path, size)
        self._ids = np.memmap(path, dtype=np.int32, mode="r+", shape=(rows, slots))
        self._late: list[tuple[Tensor, Tensor, torch.cuda.Event | None]] = []

    def read(self, row_N: Tensor, first_ids_NS: Tensor | None) -> Tensor:
        """int32 [N, slots] seeds; -1 where nothing is known.

        Args:
            row_N: int64 cache rows, on the CPU.
            first_ids_NS: ids of rows that were never written, any number of columns.
        """
        stored = torch.from_numpy(self._ids[row_N.numpy()] - 1)
        if first_ids_NS is None:
            return stored
        width = min(first_ids_NS.shape[1], stored.shape[1])
        first = torch.full_like(stored, -1)
        first[:, :width] = first_ids_NS[:, :width].cpu()
        return torch.where(stored[:, :1] < 0, first, stored)

    def write(self, row_N: Tensor, ids_NS: Tensor) -> None:
        """Remember the ids that this step's pass ended with; from a GPU, one call later.

        Rows that the pass left out (weight 0, or a rank that only keeps step) keep what they have,
        and so do all where the loss looks at no top of the student's own (alpha 0: no columns).
        """
        width = min(ids_NS.shape[1], self._ids.shape[1])
        if not width:
            return
        ids_NW = ids_NS[:, :width].to("cpu", torch.int32, non_blocking=True)
        copied = torch.cuda.Event() if ids_NS.is_cuda else None
        if copied is not None:
            copied.record()
        self._late.append((row_N, ids_NW, copied))
        while len(self._late) > (copied is not None):
            rows, ids, event = self._late.pop(0)
            if event is not None:
                event.synchronize()  # of the call before: there is nothing left to wait for
            found = ids[:, 0] >= 0
            self._ids[rows[found].numpy(), : ids.shape[1]] = ids[found].numpy() + 1


def _make_zeros(path: Path, size: int) -> None:
    """All blocks at once: a disk that is full at a later write would be a SIGBUS, not an error."""
    try:
        with path.open("wb") as stream:
            if size and hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(stream.fileno(), 0, size)
            stream.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise InputError(unwritable(path, error)) from error
