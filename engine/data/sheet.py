"""The data sheet: what a file of records holds, in a page that stands beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unteach.engine.data.records import GOALS, Record
from unteach.engine.data.rejects import Rejects
from unteach.engine.files import write_atomic

if TYPE_CHECKING:
    from unteach.engine.data.domain_gap import Gap

Overlap = tuple[str, str, float]
EXAMPLES = 2
SHOWN = 200
LISTED = 20


def write_sheet(
    path: Path,
    records: Iterable[Record],
    *,
    rejects: Rejects,
    name: str = "records.jsonl",
    near: Sequence[Overlap] = (),
    notes: Sequence[str] = (),
    gap: Gap | None = None,
) -> None:
    """Write `records.md`, and `domain_gap.png` beside it where the gap was measured.

    Args:
        records: read once, in one pass; they may come from a stream.
        name: of the file that holds them.
        near: pairs of a test and a train question that are nearly the same.
        notes: sentences about where the records come from.
    """
    counts: Counter[tuple[str, str, str, str]] = Counter()
    lengths = {goal: (Counter[int](), Counter[int]()) for goal in GOALS}
    examples: dict[str, list[Record]] = {goal: [] for goal in GOALS}
    anchors: Counter[str] = Counter()
    for record in records:
        counts[record.goal, record.split, record.source or "-", record.form] += 1
        for counter, text in zip(
            lengths[record.goal], (record.question, record.answer or ""), strict=True
        ):
            counter[len(text.split())] += 1
        anchors[record.goal] += record.anchor_of is not None
        if len(examples[record.goal]) < EXAMPLES:
            examples[record.goal].append(record)
    total = sum(counts.values())
    lines = ["# Records", "", f"{total} records in `{name}`.", ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    lines += _table(
        ("goal", "split", "source", "form", "records"),
        [(*key, count) for key, count in sorted(counts.items())],
    )
    lines += ["", "## Lengths, words", ""]
    lines += _table(
        ("goal", "question: median", "90%", "longest", "answer: median", "90%", "longest"),
        [(goal, *_spread(q), *_spread(a)) for goal, (q, a) in lengths.items() if q],
    )
    lines += ["", f"Anchors: {', '.join(f'{g} {n}' for g, n in anchors.items() if n) or 'none'}."]
    lines += ["", "## Overlaps", "", *_overlaps(near)]
    lines += ["", "## Left out", "", *_left_out(rejects)]
    if gap is not None:
        lines += ["", "## Domain gap", "", *_gap_lines(gap)]
        from unteach.engine.data.domain_gap import draw_gap  # brings a drawing library along

        write_atomic(path.with_name("domain_gap.png"), draw_gap(gap))
    lines += ["", "## Examples"]
    for goal, chosen in examples.items():
        for record in chosen:
            lines += ["", f"- **{goal}** {_shown(record)}"]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _spread(lengths: Counter[int]) -> tuple[int, int, int]:
    """The median, the ninth decile and the largest of counted lengths."""
    total, seen = sum(lengths.values()), 0
    marks: list[int] = []
    for length, number in sorted(lengths.items()):
        seen += number
        while len(marks) < 2 and seen >= (0.5, 0.9)[len(marks)] * total:
            marks.append(length)
    return marks[0], marks[1], max(lengths)


def _overlaps(near: Sequence[Overlap]) -> list[str]:
    first = (
        "No test question equals a training question after normalisation (checked); "
        f"{len(near)} pairs of a test and a training question are nearly the same."
    )
    if not near:
        return [first]
    rows: list[tuple[object, ...]] = [*near[:LISTED]]
    return [first, "", *_table(("test", "train", "likeness"), rows)]


def _left_out(rejects: Rejects) -> list[str]:
    if not rejects.counts:
        return ["Nothing."]
    rows = [
        (reason, count, _cell(rejects.examples[reason][0]))
        for reason, count in rejects.counts.most_common()
    ]
    return _table(("why", "count", "for example"), rows)


def _gap_lines(gap: Gap) -> list[str]:
    rows = [
        (f"{a} and {b}", f"{gap.before[a, b]:.2f}", f"{gap.after[a, b]:.2f}")
        for a, b in gap.before
        if (a, b) in gap.after
    ]
    return [
        "Proxy A-distance 2(1 − 2ε) between goals, ε the cross-validated error of a linear "
        f"classifier on the mean hidden state of {gap.model} ({gap.records} records of each goal): "
        "0 = cannot be told apart, 2 = always.",
        "",
        *_table(("goals", "raw text", "records"), rows),
        "",
        "![domain gap](domain_gap.png)",
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    head = "| " + " | ".join(names) + " |"
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [head, "|" + " --- |" * len(names), *body]


def _shown(record: Record) -> str:
    if record.form == "passage":
        return f"passage: {_cell(record.answer or '')}"
    prefix = f" · prefix: {_cell(record.prefix)}" if record.prefix else ""
    options = f" · options: {_cell(' / '.join(record.options))}" if record.options else ""
    return f"{_cell(record.question)}{prefix} → {_cell(record.answer or '')}{options}"


def _cell(text: str) -> str:
    """Text as it can stand in a table: one line, no marks that Markdown or HTML would act on."""
    plain = " ".join(text.split())[:SHOWN]
    for mark in "\\|`*_<>[]":
        plain = plain.replace(mark, f"\\{mark}")
    return plain
