"""Raw text as passages, file by file and line by line: .txt, .md, .jsonl, and .pdf by an extra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unteach.engine.data.chunks import chunked, passages, sentences
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.rows import COMPRESSED, files_under, read_rows, text_lines
from unteach.engine.errors import InputError, reason

KINDS = (".txt", ".md", ".jsonl", ".pdf")
MAX_PDF = 256 * 2**20
MAX_PAGE = 2**20
MIN_WORDS = 5
# Sentences that speak to whoever reads for a living: a writer must not be given them.
_ORDER = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,60}"
    r"\b(?:instructions?|prompts?|rules|directions|guidelines|messages?)\b"
    r"|\bsystem prompt\b|\byou are now\b|\bas an ai\b"
    r"|\b(?:you|assistant|model) must (?:now |only )?(?:reply|answer|output|respond|write|return)\b"
    r"|\b(?:reply|respond|answer|output) (?:only )?with\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:system|user|assistant|inst|s)>|\[/?inst\]", re.IGNORECASE
)


@dataclass(frozen=True)
class Passage:
    """A piece of a text; `number` counts over all files in order."""

    text: str
    source: str
    number: int


def read_passages(path: Path, words: int, rejects: Rejects) -> Iterator[Passage]:
    """Passages of a file or folder, lazily, without sentences that give orders to the writer.

    Raises:
        InputError: there is no such path, no file of a kind that is read, or no passage in it.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: name a file or folder of text.")
    if path.is_file() and path.suffix.lower() in COMPRESSED:
        raise InputError(f"{path} is compressed: unpack it, look at its size, and name the files.")
    files = [path] if path.is_file() else files_under(path, KINDS, rejects)
    files = [file for file in files if file.suffix.lower() in KINDS]
    if not files:
        raise InputError(f"{path} holds no text of {', '.join(KINDS)}.")
    number = 0
    for file in files:
        try:
            for piece in _pieces(file, words, rejects):
                text = without_orders(piece, rejects)
                if len(text.split()) < MIN_WORDS:
                    rejects.add(f"passage under {MIN_WORDS} words", piece)
                    continue
                yield Passage(text, file.name, number)
                number += 1
        except OSError as error:
            raise InputError(f"{file} cannot be read: {reason(error)}.") from error
    if number == 0:
        raise InputError(f"{path} gives no passage (left out: {rejects}): is there text in it?")


def without_orders(text: str, rejects: Rejects) -> str:
    """The text without chat markup and sentences that tell a language model what to do."""
    kept = []
    plain, marks = _MARKUP.subn(" ", text)
    if marks:
        rejects.add("chat markup in a passage", text)
    for sentence in sentences(plain):
        if _ORDER.search(sentence):
            rejects.add("sentence that gives orders to the writer", sentence)
        else:
            kept.append(sentence)
    return " ".join(kept)


def _pieces(file: Path, words: int, rejects: Rejects) -> Iterator[str]:
    kind = file.suffix.lower()
    if kind == ".pdf":
        for page in _pages(file, rejects):
            yield from chunked(page, words)
    elif kind == ".jsonl":
        for row in read_rows(file, rejects):
            text = row.get("text")
            if isinstance(text, str) and text.strip():
                yield from chunked(text, words)
            else:
                rejects.add("row without text", row)
    else:
        yield from passages(text_lines(file, rejects), words)


def _pages(file: Path, rejects: Rejects) -> Iterator[str]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise InputError(f"{file} is a PDF: pip install 'unteach[pdf]' to read it.") from error
    if file.stat().st_size > MAX_PDF:
        raise InputError(f"{file} is over 256 MiB: split it.")
    try:
        reader = PdfReader(file)
        if reader.is_encrypted:
            raise InputError(f"{file} is encrypted: save it without a password.")
        pages = list(range(len(reader.pages)))
    except (PyPdfError, ValueError, RecursionError, KeyError) as error:
        raise InputError(f"{file} is no PDF that can be read: {error}.") from error
    for index in pages:
        try:
            # pypdf itself stops at streams that unpack to too much.
            text = reader.pages[index].extract_text()
        except Exception as error:  # damaged pages raise anything
            rejects.add("PDF page that cannot be read", f"{file} {index + 1}: {error}")
            continue
        if len(text) > MAX_PAGE:
            rejects.add("PDF page over 1 MiB of text", f"{file} {index + 1}")
        else:
            yield text
