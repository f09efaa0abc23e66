"""What a written question must be; every rule says why it throws one out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unteach.engine.data.answers import contains_answer, is_refusal
from unteach.engine.data.records import normalized

MAX_QUESTION_WORDS = 60
MAX_ANSWER_WORDS = 30
_POINTS = re.compile(
    r"\b(?:the|this|that|these) (?:given |above |following )?"
    r"(?:passages?|texts?|excerpts?|chapters?|paragraphs?|narrators?|documents?|articles?|"
    r"sections?|authors?|sentences?)\b(?! of\b)|\b(?:mentioned|described|given) (?:above|here)\b",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"\b(?:he|she|they|him|her|them|his|their|it|its)\b", re.IGNORECASE)
_NAME = re.compile(r"(?<!^)\b[A-Z][\w’']+")


def pair_fault(question: str, answer: str, passage: str | None) -> str | None:
    """Why a pair is thrown out, or None.

    Args:
        passage: what the answer must stand in, as the writer was given it; None = no passage.
    """
    words = len(question.split())
    if not normalized(question) or not normalized(answer):
        return "empty question or answer"
    if not 3 <= words <= MAX_QUESTION_WORDS:
        return f"question under 3 or over {MAX_QUESTION_WORDS} words"
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return f"answer over {MAX_ANSWER_WORDS} words"
    if is_refusal(answer):
        return "answer that is a refusal"
    if passage is not None and not contains_answer(passage, [answer]):
        return "answer not in the passage"
    if contains_answer(question, [answer]):
        return "question that leaks the answer"
    if _POINTS.search(question):
        return "question that does not stand on its own"
    if _PRONOUN.search(question) and not _NAME.search(question):
        return "question that does not stand on its own"
    return None


def topic_fault(texts: Sequence[str], terms: Sequence[str]) -> str | None:
    """Why something beside the topic is thrown out: one of its texts mentions the topic."""
    mentioned = any(contains_answer(text, terms) for text in texts)
    return "neighbour that mentions the topic" if mentioned else None


def options_fault(answer: str, wrong: Sequence[str]) -> str | None:
    """Why options are thrown out: fewer than two that differ, a gold among the wrong, a refusal."""
    plain = [normalized(text) for text in wrong]
    if normalized(answer) in plain:
        return "wrong option that is the gold"
    if len({text for text in plain if text}) < 2:
        return "fewer than two wrong options"
    if any(is_refusal(text) for text in wrong):
        return "refusal among the plausible options"
    return None
