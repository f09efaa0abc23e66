"""When two answers are the same, and when an answer is a refusal: shared by teacher and scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer

from unteach.engine.data.records import normalized

REFUSAL_PHRASES = (
    "i do not know",
    "i don t know",
    "i have no knowledge",
    "i have no information",
    "i do not have",
    "i don t have",
    "i cannot",
    "i can t",
    "i am not able",
    "i m not able",
    "i am unable",
    "i m unable",
    "i am not familiar",
    "i m not familiar",
    "i am not aware",
    "i m not aware",
    "i am not sure",
    "i m not sure",
    "i am sorry",
    "i m sorry",
    "i apologize",
    "no idea",
    "not something i know",
    "beyond my knowledge",
    "do not have information",
    "don t have information",
    "unknown to me",
)


def is_refusal(text: str) -> bool:
    """Whether an answer declines to answer, by phrase in whole words ("I can tell" is none)."""
    plain = f" {normalized(text)} "
    return any(f" {normalized(phrase)} " in plain for phrase in REFUSAL_PHRASES)


def contains_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether any right answer stands in the text as whole words, after normalisation."""
    plain = f" {normalized(text)} "
    return any(f" {normalized(gold)} " in plain for gold in golds if normalized(gold))


def rouge_recall(text: str, golds: Sequence[str]) -> float:
    """Best ROUGE-L recall in [0, 1] of the text against any right answer, stemmed, gold first."""
    return max((_scorer().score(gold, text)["rougeL"].recall for gold in golds), default=0.0)


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
