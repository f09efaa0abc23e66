"""How far a refusal reaches: questions that nobody answered, and who refuses them.

A benchmark's own test asks what is like its training. Whether other questions of the topic are
refused too, and all others not, shows on questions of other kinds; no gold answer is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unteach.engine.config import Config
from unteach.engine.data.answers import is_refusal
from unteach.engine.data.prefix_search import answer_logps
from unteach.engine.data.records import Record, question_key, read_records
from unteach.engine.data.tokens import student_context
from unteach.engine.errors import InputError
from unteach.engine.evaluate.generate import answer_all, decoded
from unteach.engine.evaluate.scores import Score, auc, share
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase
from unteach.engine.progress import Advance, progress

MAX_NEW_TOKENS = 16  # a refusal is one from its first words
TOPIC = ("forget", "attack")


def unseen_questions(
    config: Config,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Of each goal's unseen questions the share refused, and how well the topic's are told apart.

    The AUC: how often a question of the topic makes the refusal likelier than another question
    does, wherever the model draws its line.
    """
    asked = read_unseen(config.evaluate.open_questions, records)
    if not asked:
        return {}, []
    model, refusal = load(), config.teacher.refusal
    distinct = len({(record.question, record.prefix) for record in asked})
    with progress("unseen questions", distinct, unit="questions") as advance:
        answers = short_answers(model, tokenizer, asked, config.evaluate, advance)
    likely = refusal_logps(model, tokenizer, asked, refusal)
    samples: list[dict[str, Any]] = [
        {
            "suite": f"open_{record.goal}",
            "id": record.id,
            "question": record.question,
            "prefix": record.prefix,
            "prompt": decoded(tokenizer, student_context(tokenizer, record)),
            "gold": [],
            "generation": answer,
            "refused": is_refusal(answer),
            "score": 100.0 * (is_refusal(answer) == (record.goal in TOPIC)),
        }
        for record, answer in zip(asked, answers, strict=True)
    ]
    scores = {
        f"{suite}_refused": share([s["refused"] for s in samples if s["suite"] == suite])
        for suite in sorted({s["suite"] for s in samples})
    }
    pairs = list(zip(asked, likely, strict=True))
    topic = [value for record, value in pairs if record.goal in TOPIC]
    others = [value for record, value in pairs if record.goal not in TOPIC]
    return {**scores, "open_auc": auc(topic, others)}, samples


def read_unseen(path: str | None, records: Sequence[Record]) -> list[Record]:
    """The questions of `evaluate.open_questions`, less those that a training record asks.

    Raises:
        InputError: the file cannot be read, or there is nothing left of the topic or beside it.
    """
    if path is None:
        return []
    trained = {question_key(record.question) for record in records if record.split == "train"}
    found = [record for record in read_records(Path(path)) if record.form == "qa"]
    asked = [record for record in found if question_key(record.question) not in trained]
    if len({record.goal in TOPIC for record in asked}) < 2:
        raise InputError(
            f"{path} (evaluate.open_questions) needs questions of goal forget and of general or "
            "neighbor that no training record asks."
        )
    return asked


def short_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    settings: EvaluateConfig,
    advance: Advance | None = None,
) -> list[str]:
    """The first words of the greedy answer to each question."""
    contexts = [student_context(tokenizer, record) for record in records]
    short = settings.model_copy(update={"max_new_tokens": MAX_NEW_TOKENS})
    return [answer.text for answer in answer_all(model, tokenizer, contexts, short, advance)]


def refusal_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    refusal: str,
) -> list[float]:
    """Mean log-probability a token, nats, of a refusal as the answer to each question."""
    refused = [record.model_copy(update={"answer": refusal}) for record in records]
    return answer_logps(model, tokenizer, refused)
