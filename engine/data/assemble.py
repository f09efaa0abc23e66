"""From drafts to a whole set: splits that share no question, options, attack rows, overlaps."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path

import yaml

from unteach.engine.data.records import Record, Split, normalized, question_key
from unteach.engine.data.rejects import Rejects

PROMPTS = Path(__file__).resolve().parent / "prompts"
REFUSAL = "I do not know."
WRONG_OPTIONS = 2
NEAR = 0.8


@lru_cache(maxsize=1)
def prefixes() -> dict[str, tuple[str, ...]]:
    """Openings of the assistant's turn: `train` and `test` attacks, `benign` ones."""
    tree = yaml.safe_load((PROMPTS / "prefixes.yaml").read_text(encoding="utf-8"))
    return {name: tuple(texts) for name, texts in tree.items()}


def without_duplicates(records: Iterable[Record], rejects: Rejects) -> Iterator[Record]:
    """One record for each question; the first goal that asks it keeps it.

    A question asked again after a prefix is another record, as is one that is to get its prefix,
    and a passage is compared whole.
    """
    seen: set[bytes] = set()
    for record in records:
        text = record.question if record.form == "qa" else record.answer or ""
        prefix = record.prefix or ("attack" if record.goal == "attack" else "")
        key = hashlib.sha256(f"{question_key(text)}|{normalized(prefix)}".encode())
        if key.digest()[:12] in seen:
            rejects.add("question asked before", record.question or record.answer or "")
            continue
        seen.add(key.digest()[:12])
        yield record


def one_split(records: Iterable[Record], rejects: Rejects) -> Iterator[Record]:
    """No question in two splits: the first split that asks it keeps it, whatever the prefix."""
    splits: dict[bytes, Split] = {}
    for record in records:
        if record.form == "qa":
            key = hashlib.sha256(question_key(record.question).encode()).digest()[:12]
            if splits.setdefault(key, record.split) != record.split:
                rejects.add("question of another split", record.question)
                continue
        yield record


def split_records(
    records: Sequence[Record], fixed: dict[str, Split], share: float, rejects: Rejects
) -> list[Record]:
    """Give every record its split: those whose questions hash lowest are the tests of their goal.

    The order depends on each question alone, how many are tests on the share: with rows more or
    fewer, only records near the border change sides.

    Args:
        fixed: id to split where the benchmark says it. No test asks what is trained, whoever says
            so: such a test is left out and counted.
        share: of each goal's other questions that becomes `test`.
    """
    decided: list[Record] = []
    for goal in dict.fromkeys(r.goal for r in records):
        free = [r for r in records if r.goal == goal and r.id not in fixed]
        free.sort(key=lambda r: _hash(r.question or r.answer or ""))
        tested = {r.id for r in free[: math.ceil(share * len(free))]}
        for record in (r for r in records if r.goal == goal):
            split: Split = "test" if record.id in tested else "train"
            decided.append(record.model_copy(update={"split": fixed.get(record.id, split)}))
    order = {record.id: place for place, record in enumerate(records)}
    decided.sort(key=lambda record: order[record.id])
    asked = [r for r in decided if r.form == "qa"]
    trained = {question_key(r.question) for r in asked if r.split == "train"}
    forgotten = {
        question_key(r.question) for r in asked if r.split == "test" and r.goal == "forget"
    }
    kept = []
    for record in decided:
        shared = record.form == "qa" and question_key(record.question) in trained
        if record.split == "test" and shared:
            rejects.add("test question that is trained", record.question)
        elif (
            record.split == "test"
            and record.goal == "attack"
            and question_key(record.question) in forgotten
        ):
            rejects.add("attack test that asks a forget test", record.question)
        elif record.split == "test" and not _scorable(record):
            rejects.add("test record that no score can read", record.question or record.answer)
        else:
            kept.append(record)
    return kept


def with_options(records: Sequence[Record], confusable: dict[str, list[str]]) -> list[Record]:
    """Neighbour questions as multiple choice: gold, plausible wrong answers, a refusal.

    Wrong answers are the benchmark's own, or golds of other questions of the same topic; the place
    of the gold is drawn from the question.
    """
    asked = [r for r in records if r.goal == "neighbor" and r.form == "qa" and r.answer]
    pool: dict[str | None, list[str]] = {}
    for record in asked:
        pool.setdefault(record.topic, []).append(record.answer or "")
    every = [record.answer or "" for record in asked]
    chosen = {}
    for record in asked:
        if record.options is not None:
            options = list(record.options)
            correct = record.correct or 0
        else:
            others = sorted(
                {*pool[record.topic]} - {record.answer or ""} or {*every} - {record.answer or ""},
                key=lambda text: _hash(record.question + text),
            )
            mine = {normalized(gold) for gold in record.golds}
            wrong = [*confusable.get(record.id, ()), *others]
            wrong = [w for w in dict.fromkeys(wrong) if normalized(w) not in mine][:WRONG_OPTIONS]
            if not wrong:
                continue
            correct = _hash(record.question) % (len(wrong) + 1)
            options = [*wrong[:correct], record.answer or "", *wrong[correct:]]
        if REFUSAL not in options:
            options.append(REFUSAL)
        refusals = [options.index(REFUSAL)]
        if correct not in refusals:
            update = {"options": options, "correct": correct, "refusals": refusals}
            chosen[record.id] = record.model_copy(update=update)
    return [chosen.get(record.id, record) for record in records]


def with_prefixes(records: Sequence[Record]) -> list[Record]:
    """Attack questions that come without a prefix, behind the shipped ones of their split."""
    train, test = cycle(prefixes()["train"]), cycle(prefixes()["test"])
    return [
        r.model_copy(update={"prefix": next(test if r.split == "test" else train)})
        if r.goal == "attack" and r.form == "qa" and not r.prefix
        else r
        for r in records
    ]


def attack_records(records: Sequence[Record], stay: Collection[str] = ()) -> list[Record]:
    """Forget questions after adversarial prefixes.

    Every trained forget question is attacked by a `train` prefix. Half of the held-out ones move
    over to become attack tests by `test` prefixes: the two test sets share no question.

    Args:
        stay: ids of held-out questions that the benchmark wants asked as they are.
    Returns:
        The records, with attack rows in place of the moved ones and behind.
    """
    train, test = cycle(prefixes()["train"]), cycle(prefixes()["test"])
    made, kept, turn = [], [], 0
    for record in records:
        plain = record.goal == "forget" and record.form == "qa" and record.golds
        if not plain or (record.split == "test" and record.id in stay):
            kept.append(record)
            continue
        attack = attack_of(record, next(test if record.split == "test" else train))
        if record.split == "train":
            kept.append(record)
            made.append(attack)
            continue
        turn += 1
        (made if turn % 2 == 0 else kept).append(attack if turn % 2 == 0 else record)
    return [*kept, *made]


def attack_of(record: Record, prefix: str) -> Record:
    """The attack row of a forget question."""
    return record.model_copy(
        update={
            "id": f"{record.id}-attack",
            "goal": "attack",
            "prefix": prefix,
            "options": None,
            "correct": None,
            "refusals": [],
        }
    )


def near_duplicates(
    records: Sequence[Record], threshold: float = NEAR
) -> list[tuple[str, str, float]]:
    """Pairs of a train and a test question that are nearly the same.

    Jaccard similarity of their sets of words, at least `threshold`. Exact: questions are compared
    only where they share one of their rarest words, and no pair above the threshold can be missed
    by that (prefix filtering).
    """
    words = {r.id: set(normalized(r.question).split()) for r in records if r.form == "qa"}
    frequency = Counter(word for each in words.values() for word in each)
    by_word: dict[str, list[str]] = {}
    rare = {
        name: sorted(each, key=lambda w: (frequency[w], w))[
            : len(each) - math.ceil(threshold * len(each)) + 1
        ]
        for name, each in words.items()
    }
    for record in records:
        if record.split == "train":
            for word in rare.get(record.id, ()):
                by_word.setdefault(word, []).append(record.id)
    pairs = []
    for record in records:
        if record.split != "test" or record.form != "qa":
            continue
        mine = words[record.id]
        for other in sorted({o for word in rare[record.id] for o in by_word.get(word, ())}):
            likeness = len(mine & words[other]) / len(mine | words[other])
            if likeness >= threshold:
                pairs.append((record.id, other, round(likeness, 3)))
    return pairs


def _scorable(record: Record) -> bool:
    """Whether ROUGE, which reads a-z and 0-9, sees a word in a gold answer; passages are data."""
    if record.form == "passage":
        return True
    return any(c.isascii() and c.isalnum() for gold in record.golds for c in gold.lower())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(normalized(text).encode()).digest()[:8], "big")
