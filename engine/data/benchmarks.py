"""The benchmarks' own rows, and what each becomes: one table of parts, one reader a schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from unteach.engine.data.chunks import chunked
from unteach.engine.data.records import Goal, Split
from unteach.engine.data.rows import Row
from unteach.engine.errors import InputError

Fields = dict[str, Any]
Reader = Callable[[Row], Iterator[Fields]]
PASSAGE_WORDS = 180
WRONG = ("distractors", "distractor", "perturbed_answer")


class RowError(ValueError):
    """A row that cannot become a record; the message is the reason that is counted."""


@dataclass(frozen=True)
class Part:
    """One table of a source.

    Attributes:
        name: what its file is called on this machine, without the suffix.
        config, split: where it lies in the hub's data set.
        read: from a row to the fields of its records.
        columns: what a row must have; the sentence about a missing file shows them.
        others: further names of the file, and of the split in other revisions.
        held: the split of its records where the benchmark fixes it.
        optional: a source without it is still whole.
    """

    name: str
    config: str | None
    split: str
    goal: Goal
    read: Reader
    columns: tuple[str, ...]
    others: tuple[str, ...] = ()
    held: Split | None = None
    optional: bool = False


@dataclass(frozen=True)
class Source:
    """A public data set: its hub id, and whether it is too large to be read but as a stream."""

    name: str
    repo: str
    parts: tuple[Part, ...]
    stream: bool = False


def find_source(name: str, subset: str | None) -> Source:
    """The parts of a named source.

    Raises:
        InputError: it has no such subset.
    """
    makers: dict[str, Callable[[str | None], Source]] = {
        "muse-books": lambda s: _muse("muse-books", "muse-bench/MUSE-Books", s),
        "muse-news": lambda s: _muse("muse-news", "muse-bench/MUSE-News", s),
        "wmdp-cyber": lambda s: _wmdp("wmdp-cyber", s),
        "wmdp-bio": lambda s: _wmdp("wmdp-bio", s),
        "wmdp-corpora": _corpora,
        "rwku": _rwku,
        "tofu": _tofu,
        "mmlu": _mmlu,
        "wikipedia": _wikipedia,
        "nq-open": _nq_open,
    }
    return makers[name](subset)


def qa_row(row: Row) -> Iterator[Fields]:
    """{question, answer | answers, distractor(s) | perturbed_answer}."""
    golds = row.get("answer", row.get("answers"))
    if isinstance(golds, list):
        golds = [_text(gold, "answer") for gold in golds]
    else:
        golds = [_text(golds, "answer")]
    if not golds:
        raise RowError("no text in field answer")
    given: Any = next((row[name] for name in WRONG if name in row), [])
    texts = given if isinstance(given, list) else [given]
    wrong = list(dict.fromkeys(w.strip() for w in texts if isinstance(w, str) and w.strip()))
    yield {
        "question": _text(row.get("question"), "question"),
        "answer": golds[0],
        "aliases": list(dict.fromkeys(golds[1:])),
        "confusable": [text for text in wrong if text not in golds],
    }


def choice_row(row: Row) -> Iterator[Fields]:
    """{question, choices, answer: index, subject?}: the gold choice becomes the answer.

    A CSV cell holds the list as JSON and the index as digits.
    """
    choices, correct = from_cell(row.get("choices")), from_cell(row.get("answer"))
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError("no list in field choices")
    texts = [_text(choice, "choices") for choice in choices]
    if type(correct) is not int or not 0 <= correct < len(texts):
        raise RowError("options without the gold")
    subject = row.get("subject")
    yield {
        "question": _text(row.get("question"), "question"),
        "answer": texts[correct],
        "options": texts,
        "correct": correct,
        "topic": subject.replace("_", " ") if isinstance(subject, str) and subject else None,
    }


def text_row(row: Row) -> Iterator[Fields]:
    """{text, title?}: passages of at most 180 words."""
    title = row.get("title")
    for passage in chunked(_text(row.get("text"), "text"), PASSAGE_WORDS):
        topic = title if isinstance(title, str) and title.strip() else None
        yield {"form": "passage", "answer": passage, "topic": topic}


def verbmem_row(row: Row) -> Iterator[Fields]:
    """{prompt, gt}: how a forgotten text goes on."""
    yield {"question": _text(row.get("prompt"), "prompt"), "answer": _text(row.get("gt"), "gt")}


def rwku_reader(subject: str | None) -> Reader:
    """{query, answer, level, type, subject} of one subject, or of all."""

    def read(row: Row) -> Iterator[Fields]:
        if subject is not None and row.get("subject") != subject:
            return
        question, level = _text(row.get("query"), "query"), str(row.get("level"))
        if level == "1":
            question = f"Please complete the blank in the following question. {question}"
        topic, kind = row.get("subject"), row.get("type")
        yield {
            "question": question,
            "answer": _text(row.get("answer"), "answer"),
            "topic": topic if isinstance(topic, str) else None,
            "meta": {"level": level, "type": kind if isinstance(kind, str) else None},
        }

    return read


def rwku_attack_reader(subject: str | None) -> Reader:
    """Level 3: the attack is in the question; the assistant's turn opens with "Answer:".

    `affirmative suffix` questions end in an opening of their own and are asked as they stand, as
    forget questions.
    """
    read = rwku_reader(subject)

    def read_attack(row: Row) -> Iterator[Fields]:
        for fields in read(row):
            if fields["meta"]["type"] == "affirmative suffix":
                yield {**fields, "goal": "forget"}
            else:
                yield {**fields, "prefix": "Answer:"}

    return read_attack


def from_cell(value: Any) -> Any:
    """What a cell of a CSV holds as JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no text in field {name}")
    return value.strip()


QA, CHOICES, TEXT = ("question", "answer"), ("question", "choices", "answer"), ("text",)
RWKU = ("query", "answer", "level", "type", "subject")


def _muse(name: str, repo: str, subset: str | None) -> Source:
    tables = {
        "knowmem": (
            Part("forget_qa", "knowmem", "forget_qa", "forget", qa_row, QA),
            Part("forget_qa_icl", "knowmem", "forget_qa_icl", "forget", qa_row, QA,
                 held="train", optional=True),
            Part("retain_qa", "knowmem", "retain_qa", "general", qa_row, QA, ("retain2_qa",)),
            Part("retain_qa_icl", "knowmem", "retain_qa_icl", "general", qa_row, QA,
                 ("retain2_qa_icl",), held="train", optional=True),
        ),
        "raw": (
            Part("forget", "raw", "forget", "forget", text_row, TEXT, held="train"),
            Part("retain1", "raw", "retain1", "general", text_row, TEXT, held="train"),
        ),
        "verbmem": (
            Part("forget", "verbmem", "forget", "forget", verbmem_row, ("prompt", "gt"),
                 held="test"),
        ),
    }  # fmt: skip
    return Source(name, repo, tables[_chosen(name, subset, tuple(tables))])


def _wmdp(name: str, subset: str | None) -> Source:
    _chosen(name, subset, (name,))
    others = ("mcq", "test")
    return Source(
        name, "cais/wmdp", (Part(name, name, "test", "forget", choice_row, CHOICES, others),)
    )


def _corpora(subset: str | None) -> Source:
    # The bio forget corpus is gated and has no public table.
    names: dict[str, tuple[tuple[str, Goal], ...]] = {
        "cyber": (("cyber-forget-corpus", "forget"), ("cyber-retain-corpus", "neighbor")),
        "bio": (("bio-retain-corpus", "neighbor"),),
    }
    chosen = names[_chosen("wmdp-corpora", subset, tuple(names))]
    parts = (Part(n, n, "train", goal, text_row, TEXT, held="train") for n, goal in chosen)
    return Source("wmdp-corpora", "cais/wmdp-corpora", tuple(parts))


def _rwku(subset: str | None) -> Source:
    plain, attack = rwku_reader(subset), rwku_attack_reader(subset)
    return Source(
        "rwku",
        "jinzhuoran/RWKU",
        (
            Part("forget_level1", "forget_level1", "test", "forget", plain, RWKU),
            Part("forget_level2", "forget_level2", "test", "forget", plain, RWKU),
            Part("forget_level3", "forget_level3", "test", "attack", attack, RWKU, held="test",
                 optional=True),
            Part("neighbor_level1", "neighbor_level1", "test", "neighbor", plain, RWKU),
            Part("neighbor_level2", "neighbor_level2", "test", "neighbor", plain, RWKU),
        ),
    )  # fmt: skip


def _tofu(subset: str | None) -> Source:
    retain = {"forget10": "retain90", "forget05": "retain95", "forget01": "retain99"}
    forget = _chosen("tofu", subset, tuple(retain))
    kept = retain[forget]
    return Source(
        "tofu",
        "locuslab/TOFU",
        (
            Part(forget, forget, "train", "forget", qa_row, QA),
            Part(kept, kept, "train", "general", qa_row, QA),
            Part("real_authors", "real_authors_perturbed", "train", "neighbor", qa_row, QA,
                 ("real_authors_perturbed",)),
            Part("world_facts", "world_facts_perturbed", "train", "general", qa_row, QA,
                 ("world_facts_perturbed",), optional=True),
        ),
    )  # fmt: skip


def _mmlu(subset: str | None) -> Source:
    name = subset or "all"
    return Source(
        "mmlu",
        "cais/mmlu",
        (
            Part("test", name, "test", "general", choice_row, CHOICES, held="test"),
            Part("dev", name, "dev", "general", choice_row, CHOICES, held="train", optional=True),
        ),
    )


def _wikipedia(subset: str | None) -> Source:
    name = subset or "20231101.en"
    part = Part("wikipedia", name, "train", "general", text_row, TEXT, ("train",), held="train")
    return Source("wikipedia", "wikimedia/wikipedia", (part,), stream=True)


def _nq_open(subset: str | None) -> Source:
    _chosen("nq-open", subset, ("nq-open",))
    part = Part(
        "nq-open", None, "validation", "general", qa_row, QA, ("validation", "dev", "nq_open")
    )
    return Source("nq-open", "google-research-datasets/nq_open", (part,))


def _chosen(source: str, subset: str | None, names: tuple[str, ...]) -> str:
    if subset is not None and subset not in names:
        raise InputError(
            f"data.subset {subset} is no part of {source}: choose {', '.join(names)}, or null."
        )
    return subset or names[0]
