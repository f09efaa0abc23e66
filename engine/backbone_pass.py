"""One pass through a model's backbone, whatever its transformers calls the KV cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def backbone_pass(body: nn.Module, past: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
    """[B, T, D] after the final norm, and the KV cache (None without use_cache).

    Args:
        body: everything below the head.
        past: keys and values of the tokens before these; it is written to.
        inputs: input_ids, position_ids, attention_mask, use_cache.
    """
    name = _cache_name(body)
    output = body(**{name: past}, **inputs)
    hidden_BTD = output.last_hidden_state
    assert isinstance(hidden_BTD, Tensor)
    return hidden_BTD, getattr(output, name)


def _cache_name(body: nn.Module) -> str:
    """transformers 5.24 renamed the cache, and a model folder's own code may not have followed.

    An argument of the other name would be swallowed by **kwargs, and the past with it.
    """
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
