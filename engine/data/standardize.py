"""Raw text into records of one shape: what to forget, what to keep, what lies beside, attacks.

Passages come in a stream and records leave in one. Without a writer the passages themselves are the
records; with one, each becomes questions, and every forget question gets its anchors.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from unteach.engine.data.assemble import (
    REFUSAL,
    attack_of,
    one_split,
    prefixes,
    without_duplicates,
)
from unteach.engine.data.prompt_files import Prompts
from unteach.engine.data.records import Goal, Record, Split, normalized, question_key
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.replies import Choices, Concepts, Pairs
from unteach.engine.data.settings import StandardizeConfig
from unteach.engine.data.texts import Passage, read_passages
from unteach.engine.data.validate import options_fault, pair_fault, topic_fault
from unteach.engine.data.writer import Chat, Writer
from unteach.engine.errors import InputError
from unteach.engine.progress import Advance

SOURCE = "standardize"


@dataclass(frozen=True)
class Draft:
    """A question that passed the rules, and the wrong options it may come with."""

    question: str
    answer: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What the writer made of one passage: questions, each with its anchors of two kinds."""

    drafts: tuple[Draft, ...]
    general: tuple[tuple[Draft, ...], ...] = ()
    neighbor: tuple[tuple[Draft, ...], ...] = ()


@dataclass(frozen=True)
class Standardizer:
    """The steps from text to records; `advance` is told of every passage and concept."""

    settings: StandardizeConfig
    prompts: Prompts
    writer: Writer | None
    rejects: Rejects
    advance: Advance

    def records(self) -> Iterator[Record]:
        """Every record, question for question once: forget and its anchors, general, neighbours.

        Raises:
            InputError: no text is named, or the writer is to write about no topic.
        """
        settings = self.settings
        if settings.forget is None and settings.general is None:
            raise InputError(
                "Nothing to standardise: standardize.forget and standardize.general name files or "
                "folders of text; --set one of them."
            )
        if self.writer is not None and not settings.topic.strip():
            raise InputError("Say what is to be forgotten: --set standardize.topic='a few words'.")
        records = one_split(without_duplicates(self._all(), self.rejects), self.rejects)
        targets: set[str] = set()
        for record in records:
            if record.goal in ("forget", "attack") and record.form == "qa":
                targets.add(record.id)
            if record.anchor_of is None or record.anchor_of in targets:
                yield record
            else:  # its record was left out: it stands alone
                yield record.model_copy(update={"anchor_of": None})

    def _all(self) -> Iterator[Record]:
        if self.settings.forget is not None:
            yield from self._forget(Path(self.settings.forget))
        if self.settings.general is not None:
            yield from self._general(Path(self.settings.general))
        if self.writer is not None:
            yield from self._neighbors(self.writer)

    @property
    def terms(self) -> tuple[str, ...]:
        """What gives the topic away."""
        return (self.settings.topic, *self.settings.terms)

    def _passages(self, path: Path) -> Iterator[Passage]:
        found = read_passages(path, self.settings.chunk_words, self.rejects)
        return islice(found, self.settings.max_chunks)

    def _forget(self, path: Path) -> Iterator[Record]:
        if self.writer is None:
            yield from self._raw("forget", path)
            return
        turns, asked = _Turns(), set[str]()
        for passage, facts in self.writer.map(self._forget_facts, self._passages(path)):
            self.advance(1, f"{sum(self.rejects.counts.values())} left out")
            split = self._split(passage.text)
            for place, draft in enumerate(facts.drafts):
                if question_key(draft.question) in asked:
                    self.rejects.add("question asked before", draft.question)
                    continue
                asked.add(question_key(draft.question))
                name = f"forget-{passage.number}-{place}"
                record = self._record(name, "forget", draft, split, passage)
                general = [
                    self._record(f"{name}-general-{i}", "general", anchor, split, None, of=name)
                    for i, anchor in enumerate(facts.general[place])
                ]
                neighbor = [
                    self._record(f"{name}-neighbor-{i}", "neighbor", anchor, split, None, of=name)
                    for i, anchor in enumerate(facts.neighbor[place])
                ]
                yield from _contrasted(record, general, neighbor, turns)

    def _general(self, path: Path) -> Iterator[Record]:
        if self.writer is None:
            yield from self._raw("general", path)
            return
        for passage, drafts in self.writer.map(self._general_drafts, self._passages(path)):
            self.advance(1, f"{sum(self.rejects.counts.values())} left out")
            for place, draft in enumerate(drafts):
                name = f"general-{passage.number}-{place}"
                split = self._split(passage.text)
                yield self._record(name, "general", draft, split, passage)

    def _raw(self, goal: Goal, path: Path) -> Iterator[Record]:
        for passage in self._passages(path):
            self.advance(1)
            yield Record(
                id=f"{goal}-{passage.number}",
                goal=goal,
                answer=passage.text,
                form="passage",
                topic=self.settings.topic or None,
                source=passage.source,
            )

    def _neighbors(self, writer: Writer) -> Iterator[Record]:
        if self.settings.neighbors == 0:
            return
        chat = self.prompts.chat(
            "neighbors", topic=self.settings.topic, count=self.settings.neighbors
        )
        asked = list(writer.map(lambda chat: writer.fill(chat, Concepts, self.rejects), [chat]))
        reply: Concepts | None = asked[0][1] if asked else None
        if reply is None:
            return
        concepts = []
        for concept in dict.fromkeys(reply.concepts[: self.settings.neighbors]):
            if fault := topic_fault([concept], self.terms):
                self.rejects.add(fault, concept)
            else:
                concepts.append(concept)
        for place, (concept, drafts) in enumerate(writer.map(self._neighbor_drafts, concepts)):
            self.advance(1)
            split = self._split(concept)
            for index, draft in enumerate(drafts):
                name = f"neighbor-{place}-{index}"
                record = self._record(name, "neighbor", draft, split, None)
                yield record.model_copy(update={"topic": concept})

    def _forget_facts(self, passage: Passage) -> Facts:
        drafts = self._pairs("forget_qa", passage)
        if not self.settings.anchors:
            return Facts(drafts, ((),) * len(drafts), ((),) * len(drafts))
        general = tuple(self._anchors("anchor_general", draft) for draft in drafts)
        neighbor = tuple(self._anchors("anchor_neighbor", draft) for draft in drafts)
        return Facts(drafts, general, neighbor)

    def _general_drafts(self, passage: Passage) -> tuple[Draft, ...]:
        return tuple(
            draft for draft in self._pairs("general_qa", passage) if not self._beside_fault(draft)
        )

    def _pairs(self, step: str, passage: Passage) -> tuple[Draft, ...]:
        assert self.writer is not None
        chat = self.prompts.chat(
            step, topic=self.settings.topic, count=self.settings.pairs, passage=passage.text
        )
        reply = self.writer.fill(chat, Pairs, self.rejects)
        drafts = []
        for pair in reply.pairs[: self.settings.pairs] if reply else ():
            if fault := pair_fault(pair.question, pair.answer, passage.text):
                self.rejects.add(fault, pair.model_dump())
            else:
                drafts.append(Draft(pair.question, pair.answer))
        return tuple(drafts)

    def _anchors(self, step: str, draft: Draft) -> tuple[Draft, ...]:
        chat = self.prompts.chat(
            step,
            topic=self.settings.topic,
            question=draft.question,
            count=self.settings.anchors,
        )
        shape: type[Pairs | Choices] = Pairs if step == "anchor_general" else Choices
        return self._beside(chat, shape, self.settings.anchors)

    def _neighbor_drafts(self, concept: str) -> tuple[Draft, ...]:
        pairs = self.settings.pairs
        chat = self.prompts.chat(
            "neighbor_qa", topic=self.settings.topic, concept=concept, count=pairs
        )
        return self._beside(chat, Choices, pairs)

    def _beside(self, chat: Chat, shape: type[Pairs | Choices], most: int) -> tuple[Draft, ...]:
        """Questions from the writer's own knowledge that must keep clear of the topic."""
        assert self.writer is not None
        reply = self.writer.fill(chat, shape, self.rejects)
        drafts = []
        for pair in reply.pairs[:most] if reply else ():
            wrong = tuple(getattr(pair, "wrong", ()))
            draft = Draft(pair.question, pair.answer, wrong)
            fault = pair_fault(pair.question, pair.answer, None)
            if fault is None and shape is Choices:
                fault = options_fault(pair.answer, wrong)
            if fault:
                self.rejects.add(fault, pair.model_dump())
            elif not self._beside_fault(draft):
                drafts.append(draft)
        return tuple(drafts)

    def _beside_fault(self, draft: Draft) -> bool:
        """Whether a question beside the topic mentions it; counted."""
        fault = topic_fault([draft.question, draft.answer, *draft.wrong], self.terms)
        if fault:
            self.rejects.add(fault, draft.question)
        return fault is not None

    def _split(self, text: str) -> Split:
        """The same for a text whatever else is there."""
        return "test" if _unit(text) < self.settings.test_share else "train"

    def _record(
        self,
        name: str,
        goal: Goal,
        draft: Draft,
        split: Split,
        passage: Passage | None,
        of: str | None = None,
    ) -> Record:
        options, correct = None, None
        if goal == "neighbor":
            wrong = list(dict.fromkeys(draft.wrong))[:3]
            correct = int(_unit(draft.question) * (len(wrong) + 1))
            options = [*wrong[:correct], draft.answer, *wrong[correct:], REFUSAL]
        return Record(
            id=name,
            goal=goal,
            question=draft.question,
            answer=draft.answer,
            options=options,
            correct=correct,
            refusals=[len(options) - 1] if options else [],
            anchor_of=of,
            topic=self.settings.topic if goal == "forget" else None,
            source=passage.source if passage else SOURCE,
            split=split,
            meta={"fact": f"{goal}:{normalized(draft.answer)}"},
        )


class _Turns:
    """Whose turn it is: of each use the prefixes go round, and every other test row is chosen.

    Each counts by itself: with one count for all, some prefixes and rows would never come up.
    """

    def __init__(self) -> None:
        self._turns: defaultdict[str, Iterator[int]] = defaultdict(count)

    def take(self, use: str, texts: Sequence[str]) -> str:
        return texts[next(self._turns[use]) % len(texts)]

    def other(self) -> bool:
        return next(self._turns["other"]) % 2 == 1


def _contrasted(
    record: Record, general: list[Record], neighbor: list[Record], turns: _Turns
) -> Iterator[Record]:
    """A forget question with its attack row and the anchors of all three objectives.

    Anchors of the attack ask the other anchors' questions: after a benign opening (general) and
    after an adversarial one (neighbour), and are answered. Of the held-out questions every other
    one becomes an attack test instead, so that the two test sets share none.
    """
    lists = prefixes()
    if record.split == "test":
        moved = turns.other()
        yield attack_of(record, turns.take("test", lists["test"])) if moved else record
        for anchor in (*general, *neighbor):
            target = f"{record.id}-attack" if moved else record.id
            yield anchor.model_copy(update={"anchor_of": target})
        return
    attack = attack_of(record, turns.take("attack", lists["train"]))
    yield from (record, *general, *neighbor, attack)
    for anchors, use in ((general, "benign"), (neighbor, "train")):
        for anchor in anchors[:1]:
            yield anchor.model_copy(
                update={
                    "id": f"{anchor.id}-prefixed",
                    "prefix": turns.take(use, lists[use]),
                    "anchor_of": attack.id,
                    "options": None,
                    "correct": None,
                    "refusals": [],
                }
            )


def _unit(text: str) -> float:
    """A number in [0, 1) that hangs on the text alone."""
    digest = hashlib.sha256(normalized(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
