"""Text in pieces: paragraphs, sentences and passages of at most so many words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# A mark, a closing quote perhaps, a space, and something that can begin a sentence; initials
# ("J. K.") are no end.
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])(?<!\b[A-Z]\.)|(?<=[.!?]["'”’)]))\s+(?=["'“‘(]?[A-Z0-9])"""
)


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, white space made plain."""
    plain = " ".join(text.split())
    return [part for part in _SENTENCE_END.split(plain) if part]


def chunked(text: str, words: int) -> Iterator[str]:
    """Passages of at most `words` words, cut at sentence ends where there are any."""
    return passages(text.splitlines(keepends=True), words)


def passages(lines: Iterable[str], words: int) -> Iterator[str]:
    """`chunked` for text that comes line by line; never holds more than one long line.

    A paragraph ends at an empty line; a passage ends with a paragraph once it is half full.
    """
    held: list[str] = []
    count = 0
    for sentence, ends_paragraph in _sentences_of(lines, words):
        size = len(sentence.split())
        if held and count + size > words:
            yield " ".join(held)
            held, count = [], 0
        held.append(sentence)
        count += size
        if ends_paragraph and count * 2 >= words:
            yield " ".join(held)
            held, count = [], 0
    if held:
        yield " ".join(held)


def _sentences_of(lines: Iterable[str], words: int) -> Iterator[tuple[str, bool]]:
    paragraph: list[str] = []
    size = 0
    for line in lines:
        if line.strip():
            paragraph.append(line)
            size += len(line)
        # A text without empty lines must not be held whole.
        if paragraph and (not line.strip() or size > 40 * words):
            yield from _split(paragraph, words)
            paragraph, size = [], 0
    if paragraph:
        yield from _split(paragraph, words)


def _split(paragraph: list[str], words: int) -> Iterator[tuple[str, bool]]:
    pieces = []
    for sentence in sentences("".join(paragraph)):
        tokens = sentence.split()
        pieces += [" ".join(tokens[i : i + words]) for i in range(0, len(tokens), words)]
    for index, piece in enumerate(pieces):
        yield piece, index == len(pieces) - 1
