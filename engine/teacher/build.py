"""Build the teacher cache: shard by shard, each whole or absent, on one rank or many.

A shard is a fixed number of records, goal by goal in record order, and its bytes depend on nothing
else: a build that was killed, resumed or spread over ranks makes the same cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from unteach.engine.config import Config, TeacherConfig
from unteach.engine.data.answers import is_refusal
from unteach.engine.data.records import GOALS, Goal, Record
from unteach.engine.errors import InputError
from unteach.engine.model import DTYPES, PreTrainedModel, PreTrainedTokenizerBase
from unteach.engine.progress import Advance, progress, say
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import Intentions
from unteach.engine.teacher.manifest import Entry, Manifest, Shard, cache_fingerprints
from unteach.engine.teacher.prompted import Teacher
from unteach.engine.teacher.ranks import first_rank, rank_and_world, together
from unteach.engine.teacher.writer import CacheWriter

# Ids a row for the first seeds: enough for every K up to 32, so that K may change and the cache
# stay; they cost 256 bytes a row.
SEED_K = 32
PASSES = 3  # every record answers, and is read behind its prompt and without it


@dataclass(frozen=True)
class Rate:
    """How far a goal's teacher does what it is asked.

    Attributes:
        met, total: refusals of records, or gold tokens that are the teacher's first choice.
        example: the record that is furthest from it, in words.
    """

    goal: Goal
    met: int
    total: int
    example: str

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.met / self.total


def build_cache(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
    folder: Path,
    *,
    weights_fingerprint: str,
    rebuild: bool = False,
) -> TeacherCache:
    """Make the cache of these records, or what is missing of it, and open it.

    Args:
        model: the teacher, its weights in `teacher.dtype`.
        records: what is trained on; other splits do not belong here.
        rebuild: make damaged shards again, and all of them where the inputs have changed.
    Raises:
        InputError: inputs that cannot be used, a cache that is damaged or made of something else,
            a full disk, or a teacher below `teacher.min_refusal` or `teacher.min_agreement`.
    """
    _check(config, model, records)
    teacher = Teacher(config.teacher, model, tokenizer, intentions)
    if config.method.k > teacher.rule.vocab:
        raise InputError(
            f"method.k is {config.method.k} and the vocabulary has {teacher.rule.vocab} ids: "
            "choose a smaller method.k."
        )
    ordered = sorted(records, key=_place)
    size = config.teacher.shard_records
    batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    fresh = _plan(config, teacher, records, len(batches), weights_fingerprint)
    writer = CacheWriter(folder, fresh)

    def begin() -> Manifest:
        writer.resume(rebuild=rebuild)
        writer.write_head(teacher.rule, teacher.weight_VE, teacher.bias_V)
        return writer.manifest

    writer.manifest = first_rank(begin)
    _build_shards(writer, teacher, batches)
    rates = first_rank(lambda: _finish(writer, config.teacher, ordered))
    for sentence in rates:
        say(sentence)
    return TeacherCache.open(folder, expected=fresh.fingerprints)


def teacher_rates(
    config: TeacherConfig, records: Sequence[Record], entries: Sequence[Entry]
) -> list[Rate]:
    """Refusals to forget and attack records that the teacher answers itself, and agreement with
    gold answers elsewhere; a goal with nothing to measure has no rate.
    """
    by_id = {record.id: record for record in records}
    rates = []
    for goal in GOALS:
        held = [e for e in entries if e.goal == goal and by_id[e.id].form == "qa"]
        response = config.response[goal]
        if response == "own":
            held = [e for e in held if not by_id[e.id].unanswered]
        refusing = goal in ("forget", "attack") and response == "teacher"
        agreeing = goal in ("general", "neighbor") and response in ("gold", "own")
        if not held or not (refusing or agreeing):
            continue
        if refusing:
            refused = [is_refusal(entry.answer) for entry in held]
            worst = held[refused.index(False)] if False in refused else held[0]
            met, total = sum(refused), len(held)
        else:
            worst = min(held, key=lambda entry: entry.agreed / entry.rows)
            met, total = sum(e.agreed for e in held), sum(e.rows for e in held)
        example = f"{by_id[worst.id].question!r} with {worst.answer!r}"
        rates.append(Rate(goal, met, total, example))
    return rates


def check_rate(config: TeacherConfig, rate: Rate) -> None:
    """Stop a teacher that does not do what it is asked.

    Raises:
        InputError: says which goal, how often, an example, and what to do.
    """
    refusing = rate.goal in ("forget", "attack")
    name = "min_refusal" if refusing else "min_agreement"
    least = config.min_refusal if refusing else config.min_agreement
    if least is None or rate.share >= least:
        return
    fault = (
        f"refuses {rate.met} of {rate.total} {rate.goal} records ({rate.share:.0%}); it answers"
        if refusing
        else f"would say {rate.met} of {rate.total} gold tokens of {rate.goal} records "
        f"({rate.share:.0%}); least of all it answers"
    )
    raise InputError(
        f"The prompted teacher {fault} {rate.example}. teacher.{name} asks for {least:.0%}: give "
        f"goal {rate.goal} more demos (prefix_demos for records with a prefix), or lower "
        f"teacher.{name}."
    )


def _check(config: Config, model: PreTrainedModel, records: Sequence[Record]) -> None:
    if not records:
        raise InputError("There are no records to teach: the train split is empty.")
    ids = [record.id for record in records]
    if len(set(ids)) != len(ids):
        raise InputError("Two records to teach share an id: give every record its own.")
    if model.dtype != DTYPES[config.teacher.dtype]:
        raise ValueError(f"the teacher is in {model.dtype}, expected {config.teacher.dtype}")


def _place(record: Record) -> tuple[int, str, bool]:
    """Records that read the same prompt lie together."""
    return GOALS.index(record.goal), record.form, bool(record.prefix)


def _plan(
    config: Config,
    teacher: Teacher,
    records: Sequence[Record],
    shards_total: int,
    weights_fingerprint: str,
) -> Manifest:
    form, vocab = config.teacher.form, teacher.rule.vocab
    return Manifest(
        form=form,
        approximate=form == "topk"
        or (form == "logits" and config.teacher.logits_dtype == "bfloat16"),
        dtype=config.teacher.dtype,
        logits_dtype=config.teacher.logits_dtype,
        top=min(config.teacher.top, vocab),
        seeds=min(2 * max(config.method.k, SEED_K), vocab),
        width=teacher.weight_VE.shape[1],
        head_rows=teacher.weight_VE.shape[0],
        shard_records=config.teacher.shard_records,
        shards_total=shards_total,
        fingerprints=cache_fingerprints(
            config, teacher.tokenizer, records, teacher.intentions, weights_fingerprint
        ),
    )


def _build_shards(
    writer: CacheWriter, teacher: Teacher, batches: Sequence[Sequence[Record]]
) -> None:
    """Rounds of one shard a rank; what a round made is listed before the next begins."""
    rank, world = rank_and_world()
    todo = writer.missing()
    counts = [len(batch) for batch in batches]
    total, left = sum(counts), sum(counts[index] for index in todo)
    if not todo:
        return
    done = PASSES * (total - left)
    checked: set[Goal] = set()
    first_rank(partial(_check_whole_goals, writer, teacher.config, batches, checked))
    with progress("teach", PASSES * total, unit="passes", done=done) as advance:
        for first in range(0, len(todo), world):
            indices = todo[first : first + world]
            mine = indices[rank] if rank < len(indices) else None

            work = partial(_shard, writer, teacher, mine, batches, advance)
            made = [shard for shard in together(work) if shard is not None]
            first_rank(partial(_list, writer, teacher.config, batches, made, checked))
            others = sum(counts[index] for index in indices if index != mine)
            if others:
                advance(PASSES * others)


def _shard(
    writer: CacheWriter,
    teacher: Teacher,
    index: int | None,
    batches: Sequence[Sequence[Record]],
    advance: Advance,
) -> Shard | None:
    if index is None:
        return None
    lessons = teacher.lessons(batches[index], advance)
    tensors, entries = teacher.rows(lessons, writer.manifest, advance)
    return writer.write_shard(index, tensors, entries)


def _list(
    writer: CacheWriter,
    config: TeacherConfig,
    batches: Sequence[Sequence[Record]],
    made: Sequence[Shard],
    checked: set[Goal],
) -> None:
    writer.list_shards(made)
    _check_whole_goals(writer, config, batches, checked)


def _check_whole_goals(
    writer: CacheWriter,
    config: TeacherConfig,
    batches: Sequence[Sequence[Record]],
    checked: set[Goal],
) -> None:
    """A goal whose last record is in is measured at once, in whatever run, before more is spent."""
    waiting = {record.goal for index in writer.missing() for record in batches[index]}
    listed = {entry.goal for shard in writer.manifest.shards for entry in shard.records}
    ready = listed - waiting - checked
    if ready:
        records = [record for batch in batches for record in batch if record.goal in ready]
        entries = [e for shard in writer.manifest.shards for e in shard.records if e.goal in ready]
        for rate in teacher_rates(config, records, entries):
            check_rate(config, rate)
        checked |= ready


def _finish(writer: CacheWriter, config: TeacherConfig, records: Sequence[Record]) -> list[str]:
    """Measure every goal, then call the cache complete; returns what to print."""
    entries = [entry for shard in writer.manifest.shards for entry in shard.records]
    sentences = []
    for rate in teacher_rates(config, records, entries):
        check_rate(config, rate)
        what = "records refused" if rate.goal in ("forget", "attack") else "gold tokens met"
        sentences.append(
            f"teacher, {rate.goal}: {rate.met} of {rate.total} {what} ({rate.share:.1%})"
        )
    closed = sum(not entry.own_marker for entry in entries)
    if closed:
        thinking = sum(entry.reasoning is not None for entry in entries)
        sentences.append(f"teacher: {closed} of {thinking} reasonings never came to the marker")
    writer.finish()
    return sentences
