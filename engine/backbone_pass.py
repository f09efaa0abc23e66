"""One pass through a model's backbone, whatever its transformers calls the KV cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from unteach.engine.errors import InputError


def backbone_pass(body: nn.Module, past: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
    """[B, T, D] after the final norm, and the KV cache (None without use_cache).

    Args:
        body: everything below the head.
        past: keys and values of the tokens before these; it is written to.
        inputs: input_ids, position_ids, attention_mask, use_cache.
    Raises:
        InputError: a cache is asked for, and the model hands none out.
    """
    name = _cache_name(body)
    output = body(**{name: past}, **inputs)
    hidden_BTD = output.last_hidden_state
    assert isinstance(hidden_BTD, Tensor)
    written = getattr(output, name, None)  # RecurrentGemma keeps its state to itself
    if written is None and inputs.get("use_cache"):
        raise InputError(
            f"{type(body).__name__} hands out no KV cache, and prompts are shared and answers made "
            "with one: choose a model of another type."
        )
    return hidden_BTD, written


def _cache_name(body: nn.Module) -> str:
    """transformers 5.24 renamed the cache, and a model folder's own code may not have followed.

    An argument of the other name would be swallowed by **kwargs, and the past with it.
    """
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
