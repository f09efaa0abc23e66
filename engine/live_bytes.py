"""Bytes of tensors alive at any moment, counted as operations allocate and Python frees.

Works on real tensors and on fake ones, whose storages have a size and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what operations inside the block allocate; `now` is alive, `peak` was the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, options)):
            if isinstance(value, Tensor):
                self._known.add(value.untyped_storage())  # an input: not allocated here
        result = operation(*args, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self._known:
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
