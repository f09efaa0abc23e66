"""Teacher rows of the next step, on their way to the GPU while this one computes.

The cache is memory-mapped: reading it waits for the disk, and copying it waits for the stream
unless it comes from pinned memory. On a CPU there is nobody to work meanwhile, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from unteach.engine.teacher.cache import CacheRows, TeacherCache

ON_DEVICE = ("hidden_NE", "logits_NV", "top_ids_NM", "top_logits_NM")  # the host reads the others


class ReadAhead(TeacherCache):
    """A cache that has the rows announced to it on the device when they are asked for."""

    def __init__(self, cache: TeacherCache, device: torch.device) -> None:
        super().__init__(cache.folder, cache.manifest)
        self.device = device
        self._coming: dict[bytes, CacheRows] = {}

    def announce(self, batches: Iterable[Tensor]) -> None:
        """Start to bring the rows that coming micro-batches will ask for."""
        if self.device.type != "cuda":
            return
        for row_N in batches:
            rows = super().rows(row_N)
            moved = {}
            for name in ON_DEVICE:
                value = getattr(rows, name)
                if value is not None:
                    moved[name] = value.pin_memory().to(self.device, non_blocking=True)
            self._coming[row_N.numpy().tobytes()] = replace(rows, **moved)

    def rows(self, row_N: Tensor) -> CacheRows:
        """The rows that were announced, or any others read at once."""
        coming = self._coming.pop(row_N.numpy().tobytes(), None)
        return super().rows(row_N) if coming is None else coming
