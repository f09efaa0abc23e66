"""What stands before every question of an evaluation: nothing, or the intentions (in context)."""

from __future__ import annotations

from dataclasses import dataclass

from unteach.engine.data.records import Goal, Record
from unteach.engine.errors import InputError
from unteach.engine.inference import Tokens
from unteach.engine.model import PreTrainedTokenizerBase
from unteach.engine.teacher.intentions import (
    Intention,
    Intentions,
    Routing,
    intention_for,
    teacher_context,
)


@dataclass(frozen=True)
class Told:
    """The in-context rows of a comparison: a model that is prompted instead of trained.

    Attributes:
        routing: `oracle` tells a question its goal's intention, `ensemble` all of them, `none`
            asks as the student is asked.
    """

    routing: Routing = "none"
    intentions: Intentions | None = None

    def check(self) -> None:
        """Refuse what cannot be scored in context.

        Raises:
            InputError: there is no intention, or one that makes the model think aloud.
        """
        if self.intentions is None:
            raise InputError(
                f"The in-context row {self.routing} needs intentions: set teacher.intentions to "
                "a YAML file of them, or leave the row out of --methods."
            )
        for goal in ("forget", "general", "neighbor", "attack"):
            intention = self.intention(goal)
            if intention is not None and intention.reasoning != "off":
                raise InputError(
                    f"The in-context row {self.routing} is not made for intentions that think "
                    f"aloud, and that of goal {goal} does: set its reasoning to off, or leave the "
                    "row out of --methods."
                )

    def intention(self, goal: Goal) -> Intention | None:
        """What a question of this goal is told."""
        return intention_for(self.intentions, goal, self.routing)

    def context(
        self, tokenizer: PreTrainedTokenizerBase, record: Record, prefix: str | None
    ) -> Tokens:
        """What the model reads of a record, with this prefix on the open assistant turn."""
        asked = record.model_copy(update={"prefix": prefix})
        return teacher_context(tokenizer, asked, self.intention(record.goal))

    def preface(self) -> str:
        """What stands before a plain text such as an MMLU prompt: the general goal's system."""
        intention = self.intention("general")
        return f"{intention.system}\n\n" if intention is not None and intention.system else ""


NOTHING = Told()
