"""Adversarial prefixes from a file, and training records behind them: the search feeds back.

The file is what `unteach prefixes` wrote, or a text with one prefix a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from unteach.engine.data.answers import contains_answer
from unteach.engine.data.records import Record, encodable, normalized
from unteach.engine.data.rejects import Rejects
from unteach.engine.errors import InputError, reason
from unteach.engine.progress import say

MAX_BYTES = 2**20


def read_prefixes(
    path: Path, *, for_training: bool = False, rejects: Rejects | None = None
) -> list[str]:
    """The distinct prefixes of a file in its order, trailing spaces stripped.

    Args:
        for_training: refuse those of a search on test questions, which training must not see.
        rejects: counts those that repeat another or hold no word.
    Raises:
        InputError: the file cannot be read, or has no prefix.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Prefixes {path} cannot be read: {reason(error)}.") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is over {MAX_BYTES} bytes: a file of prefixes is a short list.")
    if _is_searched(path, text):
        texts = _searched(path, text, for_training)
    else:
        texts = [line for line in text.split("\n") if line.strip()]
    found: dict[str, str] = {}
    rejects = rejects or Rejects()
    for each in texts:
        if not normalized(each):
            rejects.add("prefix without a word", each)
        elif normalized(each) in found:
            rejects.add("prefix given before", each)
        else:
            found[normalized(each)] = each.rstrip()
    if not found:
        raise InputError(f"{path} holds no prefix: write one a line, or run `unteach prefixes`.")
    return list(found.values())


def with_found_prefixes(
    records: Sequence[Record], path: Path
) -> tuple[list[Record], dict[str, str]]:
    """Train attack records once more behind the prefixes of a file, which they take in turn.

    Where the prefixes are more than the records there are as many turns as use each of them.

    Returns:
        The records with those made behind them, and which record each made one repeats, by id.
    Raises:
        InputError: a prefix belongs to a test or tune record, or there is nothing to repeat.
    """
    rejects, names = Rejects(), {record.id for record in records}
    found = read_prefixes(path, for_training=True, rejects=rejects)
    kept = {normalized(r.prefix): r for r in records if r.prefix and r.split != "train"}
    for prefix in found:
        if other := kept.get(normalized(prefix)):
            raise InputError(
                f"{path}: the prefix {prefix!r} is that of {other.split} record {other.id!r} and "
                "must not be trained on: remove it from the file."
            )
    attacks = [r for r in records if r.split == "train" and r.goal == "attack" and r.form == "qa"]
    if not attacks:
        raise InputError("data.attack_prefixes repeats train attack records, and there is none.")
    made: list[Record] = []
    repeats: dict[str, str] = {}
    turns = math.ceil(len(found) / len(attacks))
    for (number, prefix), record in zip(cycle(enumerate(found, 1)), attacks * turns, strict=False):
        name = f"{record.id}-found-{number}"
        if name in names:
            raise InputError(
                f"Record {name!r} has an id that data.attack_prefixes gives: rename it."
            )
        if normalized(prefix) == normalized(record.prefix or ""):
            rejects.add("prefix that the record has", prefix)
        elif contains_answer(prefix, record.golds):
            rejects.add("prefix that holds the answer", prefix)
        else:
            made.append(record.model_copy(update={"id": name, "prefix": prefix}))
            repeats[name] = record.id
    say(
        f"attack prefixes: {len(attacks)} train attack records behind {len(found)} prefixes of "
        f"{path.name}: {len(made)} records more (left out: {rejects})"
    )
    return [*records, *made], repeats


def _is_searched(path: Path, text: str) -> bool:
    """Whether it is a `prefixes.json`, be it damaged, and no text whose first prefix is JSON."""
    first = text.lstrip().split("\n", 1)[0]
    if not first.startswith("{") or not normalized(first) or path.suffix.lower() == ".json":
        return first.startswith("{")
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


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
    if not all(isinstance(each, str) and encodable(each) for each in texts):
        raise InputError(f"{path} has a prefix that is no text: run `unteach prefixes` again.")
    if for_training and kind == "question":
        raise InputError(
            f"{path} was searched on the test questions themselves (--per-question) and may not be "
            "trained on: search without it."
        )
    # A prefix stands on one line of the chat in either form of the file.
    return [" ".join(each.split()) for each in texts]
