"""How many tokens a model can read: beyond them its positions mean nothing, and nothing says so."""

from __future__ import annotations

from collections.abc import Iterable

from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedModel


def check_lengths(model: PreTrainedModel, tokens: Iterable[tuple[str, int]]) -> None:
    """Refuse records that are longer than the model's positions reach.

    Args:
        tokens: id of each record, and how many tokens of its context and response are read.
    Raises:
        InputError: names the longest of those that do not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    record, longest = max(tokens, key=lambda each: each[1], default=("", 0))
    if limit is not None and longest > limit:
        raise InputError(
            f"Record {record!r} has {longest} tokens to read, prompt and response, and the model "
            f"reads at most {limit}: shorten the record or its intention's demos, or leave it out."
        )
