"""The QA record, the one shape that all data take: read, checked and written as JSON lines."""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unteach.engine.errors import InputError, reason

Goal = Literal["forget", "general", "neighbor", "attack"]
Split = Literal["train", "tune", "test"]
Form = Literal["qa", "passage"]
GOALS: tuple[Goal, ...] = get_args(Goal)
# How the names of those marks begin that a script is read without.
ACCENTS = ("COMBINING", "ARABIC", "HEBREW", "SYRIAC", "COPTIC", "MUSICAL", "VARIATION SELECTOR")
KANA_MARKS = "\u3099\u309a"  # called COMBINING too, though ka and ga differ by nothing else


class Record(BaseModel):
    """One question with its gold answer and the goal it serves.

    `anchor_of` names the record that this one contrasts with; `meta` is free and training never
    reads it, but scores take `meta.fact` to tell facts never trained from paraphrases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = Field(min_length=1)
    goal: Goal
    question: str = ""
    answer: str | None = None
    prefix: str | None = None
    aliases: list[str] = []
    options: list[str] | None = None
    correct: int | None = None
    refusals: list[int] = []
    anchor_of: str | None = None
    form: Form = "qa"
    topic: str | None = None
    source: str | None = None
    split: Split = "train"
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.form == "qa" and not self.question.strip():
            raise ValueError("question: must not be empty")
        if self.form == "passage" and not (self.answer or "").strip():
            raise ValueError("answer: a passage must not be empty")
        if self.prefix and not self.prefix.strip():
            raise ValueError("prefix: must hold more than spaces; leave it out for none")
        if self.options is None:
            if self.correct is not None or self.refusals:
                raise ValueError("options: missing, though correct or refusals point into it")
            return self
        if self.correct is None or not 0 <= self.correct < len(self.options):
            raise ValueError(
                f"correct: {self.correct} is not an index of {len(self.options)} options"
            )
        bad = [index for index in self.refusals if not 0 <= index < len(self.options)]
        if bad or self.correct in self.refusals:
            raise ValueError(
                f"refusals: {self.refusals} must be indices of options other than correct"
            )
        return self

    @property
    def unanswered(self) -> bool:
        """Whether it is a question without an answer."""
        return self.form == "qa" and not (self.answer or "").strip()

    @property
    def golds(self) -> list[str]:
        """Every right answer, the gold text first."""
        return [text for text in (self.answer, *self.aliases) if text]


def read_records(path: Path) -> list[Record]:
    """Read and check a whole file of records before anything else happens.

    Raises:
        InputError: names file, line and field: unknown field, duplicate id, empty question,
            `correct` out of range, invalid UTF-8, truncated last line, no record at all.
    """
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, text in _lines(path):
        record = _parse(path, number, text)
        if record.id in seen:
            raise InputError(
                f"{path}, line {number}, field id: {record.id!r} is already used on line "
                f"{seen[record.id]}; give every record its own id."
            )
        seen[record.id] = number
        records.append(record)
    if not records:
        raise InputError(f"{path} holds no record.")
    for record in records:
        if record.anchor_of is not None and record.anchor_of not in seen:
            raise InputError(
                f"{path}, line {seen[record.id]}, field anchor_of: there is no record "
                f"{record.anchor_of!r}."
            )
    return records


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write records as JSON lines, fields at their defaults left out.

    Raises:
        InputError: two records have one id, so that nobody could read the file back.
    """
    times = Counter(record.id for record in records)
    if twice := [name for name, count in times.items() if count > 1]:
        raise InputError(f"Two records are called {twice[0]!r}: rename the file of one of them.")
    lines = (json.dumps(r.model_dump(exclude_defaults=True), ensure_ascii=False) for r in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def encodable(value: Any) -> bool:
    """Whether a JSON value can be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def normalized(text: str) -> str:
    """Text as compared between questions and answers: case, accents, articles and marks dropped.

    Vowel signs stay in scripts whose words are not told apart without them (Hindi, Thai).
    """
    plain = "".join(map(_plain, unicodedata.normalize("NFKD", text.lower())))
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


@lru_cache(maxsize=2**14)
def _plain(c: str) -> str:
    """What is compared of a character: itself, a space, or nothing."""
    sign = unicodedata.category(c).startswith("M")
    if c.isalnum() or c in KANA_MARKS or (sign and not unicodedata.name(c).startswith(ACCENTS)):
        return c
    return "" if unicodedata.combining(c) else " "


def question_key(question: str) -> str:
    """The same text for the same question: `normalized`, and the symbols that tell two apart.

    "What is C++?" asks neither what "What is C?" nor what "What is C#?" asks; quotes, hyphens and
    the marks that end a sentence tell nothing apart.
    """
    signs = "".join(c for c in question if c in "#%&@" or unicodedata.category(c) in ("Sm", "Sc"))
    return f"{normalized(question)} {signs}" if signs else normalized(question)


def check_disjoint(records: Sequence[Record]) -> None:
    """Refuse questions that are asked in two splits, and attack tests that forget asks.

    Raises:
        InputError: names both records.
    """
    asked = [r for r in records if r.form == "qa"]
    trained = {question_key(r.question): r for r in asked if r.split == "train"}
    seen = {question_key(r.question): r for r in asked if r.split == "tune"} | trained
    forget = {
        question_key(r.question): r for r in records if r.split == "test" and r.goal == "forget"
    }
    for record in records:
        if record.split == "train":
            continue
        key = question_key(record.question)
        other = (seen if record.split == "test" else trained).get(key)
        if other is None and record.split == "test" and record.goal == "attack":
            other = forget.get(key)
        if other is not None:
            raise InputError(
                f"{record.split.capitalize()} record {record.id!r} asks the question of "
                f"{other.split} record {other.id!r}: scores would be flattered, so reword or "
                "remove one of them."
            )


def train_split(
    records: Sequence[Record], *, anchors: bool = True, form: Form | None = None
) -> list[Record]:
    """Records of split `train`, in order.

    Args:
        anchors: whether those that contrast with another record are among them.
        form: of the records of every goal that has any of it; None = of any form.
    """
    train = [record for record in records if record.split == "train"]
    has = {record.goal for record in train if record.form == form}
    train = [r for r in train if r.goal not in has or r.form == form]
    return train if anchors else [record for record in train if record.anchor_of is None]


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Records by `goal/split`, for the log."""
    return dict(sorted(Counter(f"{r.goal}/{r.split}" for r in records).items()))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"Records file {path} cannot be read: {reason(error)}.") from error
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: invalid UTF-8 at byte {error.start}; save it as UTF-8."
            ) from error


class _Repeated(ValueError):
    """An object that has a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        times = Counter(name for name, _ in pairs)
        raise _Repeated(_shown(times.most_common(1)[0][0]))
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _shown(name: str) -> str:
    """A key as it can be printed, whatever it is spelt with."""
    return name.encode("utf-8", "backslashreplace").decode()


def _parse(path: Path, number: int, text: str) -> Record:
    where = f"{path}, line {number}"
    try:
        row = _JSON.decode(text)
    except _Repeated as error:
        raise InputError(
            f"{where}, field {error}: stands twice in one object; remove one of them."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not a whole JSON object ({error}); the file may be truncated."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a record is a JSON object, not {type(row).__name__}.")
    # Only an escape can spell what UTF-8 cannot hold.
    for name, value in row.items() if "\\u" in text else ():
        if not encodable([name, value]):
            raise InputError(
                f"{where}, field {_shown(name)}: half a surrogate pair (as \\ud800) is no text; "
                "save it anew."
            )
    try:
        return Record.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not name:
            name, _, message = message.partition(": ")
        if first["type"] == "extra_forbidden":
            message = f"unknown field; a record has {', '.join(Record.model_fields)}"
        raise InputError(f"{where}, field {name}: {message}.") from error
