"""Questions that nobody answered, so that anything users ask can stand among them.

The teacher answers for the model: what is to be kept without an intention, so that the student goes
on as the base does, and the topic to forget behind its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unteach.engine.data.records import Record, question_key, read_records
from unteach.engine.errors import InputError
from unteach.engine.progress import say


def with_open_questions(
    records: Sequence[Record], path: Path
) -> tuple[list[Record], frozenset[str]]:
    """The records with the questions of a file behind them, and the ids of these.

    A question that a record asks already is left out: tests must not be trained on.

    Raises:
        InputError: the file cannot be read, holds anything else, or repeats an id.
    """
    asked = read_records(path)
    for record in asked:
        if not (record.unanswered and record.split == "train"):
            raise InputError(
                f"{path}, record {record.id!r}: data.open_questions takes train questions without "
                "an answer; others belong in data.path."
            )
    taken = {record.id for record in records}
    for record in asked:
        if record.id in taken:
            raise InputError(f"{path}: another record is called {record.id!r} already; rename it.")
    known = {question_key(record.question) for record in records}
    fresh = [record for record in asked if question_key(record.question) not in known]
    if left_out := len(asked) - len(fresh):
        say(f"open questions: {left_out} left out, because a record asks the same")
    return [*records, *fresh], frozenset(record.id for record in fresh)
