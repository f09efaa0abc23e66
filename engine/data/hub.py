"""Tables of hub data sets through `datasets`: pinned to a commit, cached or streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from unteach.engine.data.benchmarks import Part, Source
from unteach.engine.data.rows import Row
from unteach.engine.errors import InputError


def commit_of(repo: str, revision: str | None) -> str | None:
    """The commit that a branch, a tag or (None) `main` is at; a commit is itself.

    None where the hub does not answer or must not be asked: a branch's name pins nothing.
    """
    from huggingface_hub import HfApi, constants

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    if constants.is_offline_mode():
        return None
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=10).sha
    # Whatever the hub or the way to it does wrong: loading comes next, finds the cache or says so.
    except Exception:
        return None


def hub_rows(
    source: Source, repo: str, part: Part, revision: str | None, *, streaming: bool
) -> Iterator[Row]:
    """The rows of one part, under the first of its split names that the data set has.

    Raises:
        InputError: the hub and the cache cannot give it; says which file to put where.
    """
    for split in (part.split, *part.others):
        table = _open(source, repo, part, split, revision, streaming)
        if table is None:
            continue
        try:
            for row in table:
                yield dict(row)
        except Exception as error:  # a stream that breaks off raises what its transport raises
            raise InputError(unreachable(source, repo, _reason(error))) from error
        return
    if not part.optional:
        raise InputError(unreachable(source, repo, f"it has no split {part.split}"))


def unreachable(source: Source, repo: str, reason: str) -> str:
    """One sentence: what failed, and which files would do instead."""
    files = "; ".join(
        f"{part.name}.jsonl ({', '.join(part.columns)})"
        for part in source.parts
        if not part.optional
    )
    return (
        f"{source.name} cannot be had from the hub as {repo} ({reason}): put {files} into a folder "
        "and set data.path to it."
    )


def _open(
    source: Source, repo: str, part: Part, split: str, revision: str | None, streaming: bool
) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            repo, part.config, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:  # hub, cache and parser each raise their own kinds
        if isinstance(error, ValueError) and "split" in str(error).lower():
            return None
        raise InputError(unreachable(source, repo, _reason(error))) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
