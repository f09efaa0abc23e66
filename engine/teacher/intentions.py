"""What each goal's teacher is told and shown before it answers: the intentions p_k.

The teacher is the frozen model behind an intention; the student never sees one. With
`reasoning: strip` the teacher thinks aloud first, and what it thought, up to the answer marker,
becomes a part of its context: only what follows is supervised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from unteach.engine.config import TeacherConfig
from unteach.engine.data.records import GOALS, Goal, Record
from unteach.engine.data.tokens import Turn, context_tokens, student_context
from unteach.engine.errors import InputError, reason
from unteach.engine.model import PreTrainedTokenizerBase

Routing = Literal["oracle", "ensemble", "none"]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Demo = tuple[Text, Text]
PrefixDemo = tuple[Text, str, Text]


class Intention(BaseModel):
    """One goal's prompt.

    Attributes:
        demos: question and answer, shown as chat turns before the question.
        prefix_demos: question, prefix and answer; the assistant turn reads "prefix answer".
        reasoning: `strip` lets the teacher think until `marker` and keeps what follows.
        reasoning_tokens: most tokens of thinking; then the marker is put there for the teacher.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: Text | None = None
    demos: tuple[Demo, ...] = ()
    prefix_demos: tuple[PrefixDemo, ...] = ()
    reasoning: Literal["off", "strip"] = "off"
    marker: Text = "Answer:"
    reasoning_tokens: int = Field(default=128, ge=1)

    @field_validator("reasoning", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads a bare off as False

    @model_validator(mode="after")
    def _says_something(self) -> Intention:
        if self.system is None and not self.demos and not self.prefix_demos:
            raise ValueError(
                "holds neither system nor demos nor prefix_demos; write one, or leave the goal out"
            )
        return self


class Intentions(BaseModel):
    """Goal to intention; a goal left out has none and is asked as the student is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forget: Intention | None = None
    general: Intention | None = None
    neighbor: Intention | None = None
    attack: Intention | None = None

    def get(self, goal: Goal) -> Intention | None:
        """The goal's own intention."""
        chosen = getattr(self, goal)
        assert chosen is None or isinstance(chosen, Intention)
        return chosen


def load_intentions(path: Path) -> Intentions:
    """Read a YAML file that maps goals to intentions.

    Raises:
        InputError: no such file, no YAML mapping, an unknown goal or field, a goal that says
            nothing; names file, goal and field.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"Intentions file {path} cannot be read: {reason(error)}.") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no mapping of goals ({', '.join(GOALS)}) to intentions.")
    for goal, content in tree.items():
        if goal not in GOALS:
            raise InputError(f"{path}, goal {goal}: no such goal; there are {', '.join(GOALS)}.")
        if not isinstance(content, dict) or not content:
            raise InputError(
                f"{path}, goal {goal}: empty; give it system, demos or prefix_demos, or leave "
                "the goal out."
            )
    try:
        return Intentions.model_validate(tree)
    except ValidationError as error:
        raise InputError(_sentence(path, error)) from error


def without_prefix_demos(path: Path, intentions: Intentions) -> Intentions:
    """The same without demos that answer after a prefix: every record sees the plain ones.

    Raises:
        InputError: a goal that says nothing else.
    """
    plain = {}
    for goal in GOALS:
        intention = intentions.get(goal)
        if intention is not None and intention.system is None and not intention.demos:
            raise InputError(
                f"{path}, goal {goal}: has prefix_demos alone, and teacher.prefix_demos is false: "
                "write demos or system, or leave it true."
            )
        if intention is not None:
            plain[goal] = intention.model_copy(update={"prefix_demos": ()})
    return Intentions(**plain)


def intention_for(intentions: Intentions | None, goal: Goal, routing: Routing) -> Intention | None:
    """What the teacher of a record of this goal is told; None asks it as the student is asked.

    `oracle` knows the goal; `ensemble` tells every record everything: all systems, then all demos.
    """
    if intentions is None or routing == "none":
        return None
    if routing == "oracle":
        return intentions.get(goal)
    return _ensemble([each for goal in GOALS if (each := intentions.get(goal))])


def is_open(config: TeacherConfig, record: Record) -> bool:
    """Whether the model's own answer to a record, without an intention, is to stay as it is."""
    return config.response[record.goal] == "own" and record.unanswered


def intention_of(
    config: TeacherConfig, intentions: Intentions | None, record: Record
) -> Intention | None:
    """What the teacher of this record is told: nothing where it answers an open question."""
    if is_open(config, record):
        return None
    return intention_for(intentions, record.goal, config.routing)


def fingerprint(intentions: Intentions | None, routing: Routing) -> str:
    """sha256 of what every goal's teacher is told under a routing."""
    told = {goal: intention_for(intentions, goal, routing) for goal in GOALS}
    tree = {goal: each.model_dump(mode="json") if each else None for goal, each in told.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def teacher_context(
    tokenizer: PreTrainedTokenizerBase, record: Record, intention: Intention | None
) -> list[int]:
    """What the prompted teacher reads up to its opened turn, reasoning not included.

    A record with a prefix is shown `prefix_demos`, one without `demos`; an intention that has only
    one kind shows that. A passage has no chat, so the system text stands
    before it as plain text.
    """
    if intention is None:
        return student_context(tokenizer, record)
    if record.form == "passage":
        start = student_context(tokenizer, record)
        if intention.system is None:
            return start
        text = f"{intention.system}\n\n"
        return [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return context_tokens(
        tokenizer,
        record.question,
        prefix=record.prefix,
        system=intention.system,
        turns=list(_turns(intention, prefixed=bool(record.prefix))),
    )


def closed_reasoning(text: str, marker: str) -> tuple[str, bool]:
    """Generated text up to and including the first marker, and whether the teacher wrote it.

    Thinking that never came to the marker is closed with one.
    """
    place = text.find(marker)
    if place >= 0:
        return text[: place + len(marker)], True
    thought = text.rstrip()
    return (f"{thought}\n{marker}" if thought else marker), False


def reasoned_context(
    tokenizer: PreTrainedTokenizerBase, context: list[int], reasoning: str, *, prefixed: bool
) -> list[int]:
    """The teacher's context with its closed reasoning, ready for the first response token.

    The reasoning follows the prefix, on the same opened turn. The response must begin as the
    student's does: with a space after a prefix, without one else; there a line break parts marker
    and answer, or the teacher would want a space that no student should learn to begin with.
    """
    text = reasoning if prefixed else f"{reasoning}\n"
    return [*context, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _turns(intention: Intention, *, prefixed: bool) -> Iterator[Turn]:
    if intention.prefix_demos and (prefixed or not intention.demos):
        for question, prefix, answer in intention.prefix_demos:
            yield "user", question
            yield "assistant", f"{prefix.rstrip()} {answer}".lstrip()
        return
    for question, answer in intention.demos:
        yield "user", question
        yield "assistant", answer


def _ensemble(chosen: list[Intention]) -> Intention | None:
    if not chosen:
        return None
    # goals that say the same thing (a YAML anchor) say it once
    systems = list(dict.fromkeys(each.system for each in chosen if each.system))
    thinking = [each for each in chosen if each.reasoning == "strip"]
    if len({each.marker for each in thinking}) > 1:
        raise InputError(
            "Intentions with different markers cannot be concatenated: give all goals the same "
            "marker, or set teacher.routing=oracle."
        )
    return Intention(
        system="\n\n".join(systems) or None,
        demos=tuple(dict.fromkeys(demo for each in chosen for demo in each.demos)),
        prefix_demos=tuple(dict.fromkeys(demo for each in chosen for demo in each.prefix_demos)),
        reasoning="strip" if thinking else "off",
        marker=thinking[0].marker if thinking else chosen[0].marker,
        reasoning_tokens=max(each.reasoning_tokens for each in thinking or chosen),
    )


def _sentence(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    goal, *field = (str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown field; an intention has {', '.join(Intention.model_fields)}"
    if first["type"] == "string_type":
        message = f"YAML reads it as {first['input']!r}, not as text; put it in quotes"
    where = f", field {'.'.join(field)}" if field else ""
    return f"{path}, goal {goal}{where}: {message}."
