"""What an LLM replies, read strictly: one JSON object of the asked shape, or a reason why not.

Models too small for JSON may write pairs as lines, `Q: …` and `A: …` in turn and nothing else.
A reply is data. It is parsed, never executed, and no text of it becomes a path or an instruction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

MAX_REPLY = 200_000


def _plain(text: str) -> str:
    """One line; control characters count as spaces."""
    plain = " ".join(text.split())
    if not plain:
        raise ValueError("must not be empty")
    return plain


Text = Annotated[str, StringConstraints(max_length=2000), AfterValidator(_plain)]


class Shape(BaseModel):
    """The shape of a reply; a field too many is ignored, a field too few is a fault."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Pair(Shape):
    question: Text
    answer: Text


class Pairs(Shape):
    pairs: list[Pair]


class Concepts(Shape):
    concepts: list[Text]


class Choice(Shape):
    question: Text
    answer: Text
    wrong: list[Text]


class Choices(Shape):
    pairs: list[Choice]


class Prefixes(Shape):
    prefixes: list[Text]


S = TypeVar("S", bound=Shape)


class ReplyError(ValueError):
    """A reply that is not of the asked shape; the message tells the writer what is wrong."""


def parse_reply(text: str, shape: type[S]) -> tuple[S, bool]:
    """The one JSON object of a reply, and whether markup or prose around it was taken off.

    Raises:
        ReplyError: no such object, nor lines of pairs where those are asked for; or more than one.
    """
    if len(text) > MAX_REPLY:
        raise ReplyError(f"the reply is longer than {MAX_REPLY} characters")
    try:
        return shape.model_validate(_loads(text)), False
    except (ValueError, RecursionError) as error:
        fault = _reason(error)
    found: list[S] = []
    for value in _objects(text):
        try:
            found.append(shape.model_validate(value))
        except ValidationError as error:
            fault = _reason(error)
    if shape is Pairs and not found and (pairs := _lines_of_pairs(text)):
        try:
            return shape.model_validate({"pairs": pairs}), False
        except ValidationError as error:
            fault = _reason(error)
    if len(found) != 1:
        raise ReplyError(f"{len(found)} JSON objects of the shape" if found else fault)
    return found[0], True


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _objects(text: str) -> Iterator[Any]:
    """The JSON objects that stand in a text, outermost first, whatever is around them."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            return
        except ValueError:
            at = text.find("{", at + 1)
            continue
        yield value
        at = text.find("{", end)


def _lines_of_pairs(text: str) -> list[dict[str, str]]:
    """Pairs of a reply that is `Q: …` and `A: …` lines in turn; none where another line is there.

    A last question without its answer was cut off, and is not one.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and lines[-1] in ("A", "A:"):
        lines.pop()
    if lines and (lines[-1] == "Q" or lines[-1].startswith("Q:")):
        lines.pop()
    if len(lines) % 2:
        return []
    pairs = []
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        question, answer = first.removeprefix("Q:"), second.removeprefix("A:")
        if question == first or answer == second or not question.strip() or not answer.strip():
            return []
        pairs.append({"question": question, "answer": answer})
    return pairs


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        return f"{name or 'the reply'}: {first['msg']}"
    return str(error) or type(error).__name__
