"""Adversarial prefixes from a file: what `unteach prefixes` found, or one a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unteach.engine.data.records import normalized
from unteach.engine.errors import InputError

MAX_BYTES = 2**20


def read_prefixes(path: Path, *, for_training: bool = False) -> list[str]:
    """The distinct prefixes of a file in its order, trailing spaces stripped.

    Args:
        for_training: refuse those of a search on test questions, which training must not see.
    Raises:
        InputError: the file cannot be read, or has no prefix.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Prefixes {path} cannot be read: {error}.") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is over {MAX_BYTES} bytes: a file of prefixes is a short list.")
    if text.lstrip().startswith("{"):
        texts = _searched(path, text, for_training)
    else:
        texts = text.split("\n")
    found: dict[str, str] = {}
    for each in texts:
        if normalized(each):
            found.setdefault(normalized(each), each.rstrip())
    if not found:
        raise InputError(f"{path} holds no prefix: write one a line, or run `unteach prefixes`.")
    return list(found.values())


def _searched(path: Path, text: str, for_training: bool) -> list[str]:
    """The prefixes of a `prefixes.json`, best first."""
    try:
        tree: Any = json.loads(text)
        kind, texts = tree["kind"], [row["prefix"] for row in tree["best"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is no prefixes.json of `unteach prefixes` ({error!r}): write one prefix a "
            "line, or search again."
        ) from error
    if not all(isinstance(each, str) for each in texts):
        raise InputError(f"{path} has a prefix that is no text: run `unteach prefixes` again.")
    if for_training and kind == "question":
        raise InputError(
            f"{path} was searched on the test questions themselves (--per-question) and may not be "
            "trained on: search without it."
        )
    # A prefix stands on one line of the chat in either form of the file.
    return [" ".join(each.split()) for each in texts]
