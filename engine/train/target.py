"""The fine-tuned start: teach the records' facts first, so that forgetting them can be measured.

Plain fine-tuning on facts destroys prompt following, and with it every prompted teacher; so the
rows mix facts, facts after an attack prefix, and rows that obey an intention prompt. Prefix and
intention rows ask training questions only: no test question is ever seen in either form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unteach.engine.config import Config, MethodConfig, OptimConfig
from unteach.engine.data.records import GOALS, Record
from unteach.engine.data.sampler import Stream
from unteach.engine.data.tokens import Example, context_tokens, response_tokens
from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedTokenizerBase
from unteach.engine.teacher.intentions import Intentions, teacher_context


def target_streams(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
) -> tuple[Stream, ...]:
    """One stream for each prompt, each with its own share of the steps.

    Raises:
        InputError: no record has a question and a gold answer to teach.
    """
    target = config.target
    assert target is not None
    known = [r for r in records if r.form == "qa" and r.answer]
    train = [r for r in known if r.split == "train"]
    # Attack rows ask what others ask. Marks stay: "What is C?" is not "What is C++?".
    distinct = {" ".join(r.question.lower().split()): r for r in known}
    plain = [_example(tokenizer, r, None) for r in distinct.values()]
    turns = math.ceil(target.prefix_epochs)
    prefixed = [row for turn in range(turns) for row in _prefixed(tokenizer, train, turn)]
    kinds = [(plain, target.epochs), (prefixed, target.prefix_epochs / max(turns, 1))]
    for goal in GOALS:
        for with_prefix in (False, True):
            rows = [r for r in train if r.goal == goal and bool(r.prefix) == with_prefix]
            obedient = _obedient(config, tokenizer, rows, intentions)
            kinds.append((obedient, target.intention_epochs))
    size = target.batch_size
    streams = tuple(
        Stream(tuple(rows), size, steps=max(1, round(epochs * len(rows) / size)))
        for rows, epochs in kinds
        if rows and epochs
    )
    if not streams:
        raise InputError(
            "The first stage has nothing to teach, because no record has a question with an "
            "answer: add answers, or set target=null to start from the model as it is."
        )
    return streams


def target_config(config: Config, streams: Sequence[Stream]) -> Config:
    """The same run's settings for the teaching stage: cross-entropy, all rows alike.

    Course and rate are the stage's own, what saves memory is the run's.
    """
    target = config.target
    assert target is not None
    steps = sum(stream.steps or 0 for stream in streams)
    optim = OptimConfig(
        lr=target.lr,
        steps=steps,
        warmup_steps=min(8, steps // 10),
        schedule="linear",
        betas=(0.9, 0.99),
        trainable=target.trainable,
        state=config.optim.state,
        accumulation=config.optim.accumulation,
        reuse_frozen=config.optim.reuse_frozen,
    )
    return config.model_copy(update={"optim": optim, "method": MethodConfig(name="sft")})


def _prefixed(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], turn: int
) -> list[Example]:
    """Every training question after a training prefix, another one in every turn."""
    prefixes = sorted({r.prefix for r in records if r.prefix})
    return [
        _example(tokenizer, record, prefixes[(index + turn) % len(prefixes)])
        for index, record in enumerate(records)
        if prefixes
    ]


def _obedient(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
) -> list[Example]:
    """Questions under their goal's intention: refusals to forget, answers to keep."""
    rows = []
    for record in records:
        intention = intentions.get(record.goal) if intentions else None
        if intention is None or intention.reasoning != "off":
            continue
        refuse = record.goal in ("forget", "attack")
        answer = config.teacher.refusal if refuse else record.answer
        assert answer is not None
        context = tuple(teacher_context(tokenizer, record, intention))
        response = tuple(response_tokens(tokenizer, answer, prefix=record.prefix))
        rows.append(Example(record.id, record.goal, context, response))
    return rows


def _example(tokenizer: PreTrainedTokenizerBase, record: Record, prefix: str | None) -> Example:
    assert record.answer is not None
    context = tuple(context_tokens(tokenizer, record.question, prefix=prefix))
    response = tuple(response_tokens(tokenizer, record.answer, prefix=prefix))
    return Example(record.id, record.goal, context, response)
