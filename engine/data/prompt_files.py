"""Prompts of the writer: text files that ship here, or a user's own of the same names."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from unteach.engine.data.tokens import Turn
from unteach.engine.errors import InputError, reason

SHIPPED = Path(__file__).resolve().parent / "prompts"
PLAIN = "plain"
TURN = re.compile(r"^\[(user|assistant)\]\n", re.MULTILINE)
NEEDED = {
    "system": (),
    "forget_qa": ("count", "topic", "passage"),
    "general_qa": ("count", "passage"),
    "neighbors": ("count", "topic"),
    "neighbor_qa": ("count", "concept"),
    "anchor_general": ("count", "question"),
    "anchor_neighbor": ("count", "question"),
    "prefixes": ("count", "best"),
}


@dataclass(frozen=True)
class Prompts:
    """Every prompt by name; `chat` fills one in."""

    texts: dict[str, str]

    def chat(self, name: str, **values: object) -> tuple[Turn, ...]:
        """System and user turn of a step, its names filled in all at once.

        A line `[assistant]` or `[user]` of the file begins another turn: an example to go by.
        Only `{name}` of a given value is replaced: braces of JSON stay, and so does whatever looks
        like a name inside a value. `{mark}` is drawn from the passage, which thus cannot hold it.
        """
        passage = str(values.get("passage", ""))
        values["mark"] = f"=={hashlib.sha256(passage.encode()).hexdigest()[:12]}=="
        pattern = re.compile("|".join(rf"\{{{key}\}}" for key in values))
        first, *others = TURN.split(self.texts[name])  # before a value could look like such a line
        turns = [("user", first), *zip(others[::2], others[1::2], strict=True)]
        filled = [
            (role, pattern.sub(lambda match: str(values[match[0][1:-1]]), text).strip())
            for role, text in turns
        ]
        return (("system", self.texts["system"].strip()), *filled)


def load_prompts(folder: str | None) -> Prompts:
    """The shipped prompts, with a folder's own in place of those that it has.

    `plain` is the folder that ships for writers too small for JSON.

    Raises:
        InputError: a file there has another name than any step, or lacks a name to fill in.
    """
    place = SHIPPED / PLAIN if folder == PLAIN else Path(folder or "")
    own = {path.stem: path for path in sorted(place.glob("*.txt"))} if folder else {}
    if folder and not own:
        raise InputError(
            f"standardize.prompts {folder} holds no prompt: copy the .txt files of {SHIPPED} there."
        )
    strange = next((name for name in own if name not in NEEDED), None)
    if strange:
        raise InputError(f"{own[strange]} is no step's prompt: name it {', '.join(NEEDED)}.")
    texts = {}
    for name, needed in NEEDED.items():
        path = own.get(name, SHIPPED / f"{name}.txt")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Prompt {path} cannot be read: {reason(error)}.") from error
        missing = [key for key in needed if f"{{{key}}}" not in text]
        if missing:
            raise InputError(f"Prompt {path} does not say {{{missing[0]}}}: put it where it goes.")
        texts[name] = text
    return Prompts(texts)
