"""The fine-tuned start: teach the records' facts first, so that forgetting them can be measured.

Plain fine-tuning on facts destroys prompt following, and with it every prompted teacher; so the
rows mix facts, facts after an attack prefix, and rows that obey an intention prompt. Prefix and
intention rows ask training questions only: no test question is ever seen in either form.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from unteach.engine.config import Config, MethodConfig, OptimConfig, TargetConfig
from unteach.engine.data.records import Record, normalized
from unteach.engine.data.tokens import Example, context_tokens, response_tokens
from unteach.engine.model import PreTrainedTokenizerBase
from unteach.engine.teacher.intentions import Intentions, teacher_context


def target_examples(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
) -> tuple[Example, ...]:
    """Every row of the teaching stage, in a fixed order."""
    assert config.target is not None
    known = [r for r in records if r.form == "qa" and r.answer]
    train = [r for r in known if r.split == "train"]
    rng = random.Random(config.run.seed)
    rows = [*_plain(tokenizer, known), *_prefixed(tokenizer, train, config.target, rng)]
    if intentions is not None:
        rows += _obedient(config, tokenizer, train, intentions, rng)
    return tuple(rows)


def target_config(config: Config, rows: int) -> Config:
    """The same run's settings for the teaching stage: cross-entropy on all rows alike."""
    target = config.target
    assert target is not None
    steps = max(1, round(target.epochs * rows / target.batch_size))
    optim = OptimConfig(
        lr=target.lr,
        steps=steps,
        warmup_steps=min(10, steps // 10),
        schedule="linear",
        trainable=target.trainable,
    )
    method = MethodConfig(name="sft", k=config.method.k, reduction="record")
    return config.model_copy(update={"optim": optim, "method": method})


def _plain(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[Example]:
    """One row a distinct question, asked without any prefix."""
    distinct = {normalized(r.question): r for r in records}
    return [_example(tokenizer, r, None, "fact") for r in distinct.values()]


def _prefixed(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    target: TargetConfig,
    rng: random.Random,
) -> list[Example]:
    """Training questions answered after training prefixes: a start that attacks do break."""
    prefixes = sorted({r.prefix for r in records if r.prefix})
    if not prefixes:
        return []
    plain = [r for r in records if not r.prefix]
    count = round(target.prefix_rows * len(plain))
    order = _cycled(plain, count, rng)
    return [_example(tokenizer, r, rng.choice(prefixes), "prefix") for r in order]


def _obedient(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions,
    rng: random.Random,
) -> list[Example]:
    """Training questions under their goal's intention: refusals to forget, answers to keep."""
    assert config.target is not None
    count = round(config.target.intention_rows * len(records))
    rows = []
    for record in _cycled(records, count, rng):
        intention = intentions.get(record.goal)
        if intention is None:
            continue
        refuse = record.goal in ("forget", "attack")
        answer = config.teacher.refusal if refuse else record.answer
        assert answer is not None
        rows.append(
            Example(
                f"{record.id}+intention",
                record.goal,
                tuple(teacher_context(tokenizer, record, intention)),
                tuple(response_tokens(tokenizer, answer, prefix=record.prefix)),
            )
        )
    return rows


def _cycled(records: Sequence[Record], count: int, rng: random.Random) -> list[Record]:
    """`count` records: whole shuffled passes, then a part of one."""
    chosen: list[Record] = []
    while len(chosen) < count:
        chosen += rng.sample(list(records), len(records))
    return chosen[:count]


def _example(
    tokenizer: PreTrainedTokenizerBase, record: Record, prefix: str | None, kind: str
) -> Example:
    assert record.answer is not None
    return Example(
        f"{record.id}+{kind}",
        record.goal,
        tuple(context_tokens(tokenizer, record.question, prefix=prefix)),
        tuple(response_tokens(tokenizer, record.answer, prefix=prefix)),
    )
