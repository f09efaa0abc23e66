"""The questions that choose a learning rate, which are never those of the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unteach.engine.data.records import Record, Split


@dataclass(frozen=True)
class Tuning:
    """What chose the learning rates: how many questions of which split."""

    split: Split
    questions: int

    def sentence(self) -> str:
        """Where the rates come from, for the page."""
        why = "" if self.split == "tune" else ", because no record is of split `tune`"
        return (
            f"Learning rates were chosen by Overall on {self.questions} questions of split "
            f"`{self.split}`{why}; no test question was asked. Rates that led alike were "
            "tried with further seeds."
        )


def tuning_split(records: Sequence[Record]) -> Split:
    """`tune` where a record has it; else the training questions serve."""
    return "tune" if any(record.split == "tune" for record in records) else "train"


def tuning_records(records: Sequence[Record]) -> list[Record]:
    """Questions to choose a learning rate by, as test records; test questions never do."""
    split = tuning_split(records)
    chosen = [r for r in records if r.split == split and r.form == "qa" and r.golds]
    scored = [
        r
        for r in chosen
        if not (r.goal == "neighbor" and not r.options)
        and not (r.goal == "attack" and not r.prefix)
    ]
    return [record.model_copy(update={"split": "test"}) for record in scored]
