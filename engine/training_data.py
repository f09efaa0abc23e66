"""Which records a training takes, and as which examples: what is left out, whose answer it is."""

from __future__ import annotations

from unteach.engine.config import Response
from unteach.engine.data.records import Record
from unteach.engine.data.sampler import Stream
from unteach.engine.data.tokens import Example, passage_tokens, response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.knowledge import answered_by_base
from unteach.engine.progress import say
from unteach.engine.run import Run
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.methods import find_method

_REFUSED_PASSAGE = ("refusal", "passage")


def training_records(run: Run) -> list[Record]:
    """Train records, less what `data.form`, `data.anchors` and `data.known_only` leave out."""
    data = run.config.data
    records = run.train_records
    left_out = len(run.split("train")) - len(records)
    if left_out:
        say(
            f"train: {left_out} records left out by data.form={data.form or 'null'}, "
            f"data.anchors={str(data.anchors).lower()} and method {run.config.method.name}"
        )
    if not run.config.data.known_only:
        return records
    names = answered_by_base(run)
    asked = [
        r
        for r in records
        if r.goal in ("forget", "attack") and r.form == "qa" and r.id not in run.open
    ]
    dropped = [r.id for r in asked if run.found.get(r.id, r.id) not in names]
    say(
        f"known: the base answers {len(asked) - len(dropped)} of {len(asked)} forget and attack "
        f"questions to train on; {len(dropped)} dropped"
    )
    return [r for r in records if r.id not in dropped]


def training_streams(run: Run, cache: TeacherCache | None) -> tuple[Stream, ...]:
    """A stream for each goal of the method, or for each source of its answers.

    The student's context, and the response that the cache holds or that the record gives.
    """
    method, config = find_method(run.config.method.name), run.config
    if cache is None:
        records = training_records(run)
    else:
        records = [r for r in run.split("train") if r.id in cache.entries]
    streams = []
    for goal in method.goals:
        count = config.data.mix.get(goal, 0)
        if not count:
            continue
        for says in method.sources(goal, config.teacher):
            # A text to continue is no question that could be refused.
            asked = [r for r in records if r.goal == goal and (says, r.form) != _REFUSED_PASSAGE]
            examples = [_example(run, record, says, cache) for record in asked]
            if not examples:
                raise InputError(
                    f"No train record of goal {goal} is left, and data.mix asks for {count} a "
                    f"step: add records or set data.mix.{goal}=0."
                )
            streams.append(Stream(tuple(examples), count))
    return tuple(streams)


def _example(run: Run, record: Record, says: Response, cache: TeacherCache | None) -> Example:
    context = tuple(student_context(run.tokenizer, record))
    if cache is not None:
        entry, response = cache.entries[record.id], tuple(cache.labels(record.id))
        return Example(record.id, record.goal, context, response, entry.first_row, says=says)
    answer = run.config.teacher.refusal if says == "refusal" else record.answer
    assert answer is not None
    if record.form == "passage":
        response = tuple(passage_tokens(run.tokenizer, answer))
    else:
        response = tuple(response_tokens(run.tokenizer, answer, prefix=record.prefix))
    return Example(record.id, record.goal, context, response, says=says)
