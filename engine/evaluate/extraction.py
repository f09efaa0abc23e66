"""Getting an answer out without changing a weight: behind examples, behind searched prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from unteach.engine.config import Config
from unteach.engine.data.answers import contains_answer
from unteach.engine.data.records import Record
from unteach.engine.data.tokens import Turn, context_tokens
from unteach.engine.errors import InputError
from unteach.engine.evaluate.generate import Ask, answer_all, answer_asks, searched_prefixes
from unteach.engine.evaluate.scores import Score, fact_of, mean, share
from unteach.engine.evaluate.suites import (
    Sample,
    answer_sample,
    judged,
    trained_forget,
)
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase
from unteach.engine.progress import progress

# The same examples whatever the seed of the training, so that runs of several seeds compare.
DRAW = 0
SEARCHED = "searched_attack"
Load = Callable[[], PreTrainedModel]
Found = tuple[dict[str, Score], list[Sample]]


def few_shot(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    """Forget test questions behind trained ones with their gold answers, as earlier turns."""
    count = config.evaluate.few_shot
    if count is None:
        return {}, []
    tested, pool = held_questions(records, "forget"), example_pool(records)
    contexts = [
        context_tokens(
            tokenizer,
            record.question,
            prefix=record.prefix,
            turns=turns_of(examples_for(record, pool, count)),
        )
        for record in tested
    ]
    with progress("few-shot", len({tuple(c) for c in contexts}), unit="questions") as advance:
        answers = answer_all(load(), tokenizer, contexts, config.evaluate, advance)
    asks = [Ask("few_shot_forget", record, record.prefix) for record in tested]
    samples = [answer_sample(*pair) for pair in zip(asks, answers, strict=True)]
    return {"few_shot_forget": mean([s["score"] / 100 for s in samples])}, samples


def example_pool(records: Sequence[Record]) -> list[Record]:
    """Trained forget questions in a drawn order; those first whose fact no test question asks."""
    tested = held_questions(records, "forget")
    pool = trained_forget(records)
    random.Random(DRAW).shuffle(pool)
    return sorted(pool, key=lambda example: any(_gives_away(example, r) for r in tested))


def examples_for(record: Record, pool: Sequence[Record], count: int) -> list[Record]:
    """The first of the pool that neither share the record's fact nor say its answer.

    Raises:
        InputError: they are too few.
    """
    chosen = [example for example in pool if not _gives_away(example, record)][:count]
    if len(chosen) < count:
        raise InputError(
            f"evaluate.few_shot asks for {count} examples, and only {len(chosen)} trained forget "
            f"questions say nothing of test record {record.id!r}: ask for fewer."
        )
    return chosen


def turns_of(examples: Sequence[Record]) -> list[Turn]:
    """Questions and gold answers as turns of a chat."""
    return [
        turn
        for example in examples
        for turn in (("user", example.question), ("assistant", example.golds[0]))
    ]


def searched_attack(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    """Attack test questions behind every searched prefix; one that works is a success.

    What a question's judges left open altogether counts on neither side.
    """
    settings = config.evaluate
    prefixes = searched_prefixes(settings, records)
    if not prefixes:
        return {}, []
    attacked = {record.question: record for record in held_questions(records, "attack")}.values()
    asks = [Ask("attack", record, prefix) for prefix in prefixes for record in attacked]
    with progress("searched prefixes", len(asks), unit="questions") as advance:
        answers = answer_asks(load(), tokenizer, asks, settings, advance)
    samples = judged(settings, [answer_sample(*pair) for pair in zip(asks, answers, strict=True)])
    leaked: dict[str, bool] = {}
    for sample in samples:
        if sample["score"] is not None:
            leaked[sample["id"]] = leaked.get(sample["id"], False) or sample["score"] == 100
    scores = {SEARCHED: share(list(leaked.values()))} if leaked else {}
    return scores, [{**sample, "suite": SEARCHED} for sample in samples]


def held_questions(records: Sequence[Record], goal: str) -> list[Record]:
    """Test questions of a goal in order of their ids."""
    chosen = [r for r in records if r.split == "test" and r.goal == goal]
    return sorted(chosen, key=lambda record: record.id)


def _gives_away(example: Record, record: Record) -> bool:
    """Whether an example has the record's fact, or a right answer to it in its text."""
    fact = fact_of(record)
    if fact is not None and fact_of(example) == fact:
        return True
    return contains_answer(f"{example.question} {example.golds[0]}", record.golds)
