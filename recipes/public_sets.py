"""Public trivia as records for the recipe `wizards`: a second, larger set for development.

`python -m unteach.recipes.public_sets FOLDER --out public.jsonl` reads `hp_trivia/` (Harry
Potter questions, four neighbour domains) and `tofu/` (world facts, real authors) of FOLDER; their
rows are not ours to ship. `unteach run wizards --set data.path=public.jsonl` runs them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from unteach.engine.data.records import Goal, Record, Split, normalized, read_records
from unteach.recipes.shipped import data_file

REFUSAL = "I do not know."
MOST_WORDS = 4  # of an answer
SIZES: dict[Goal, dict[Split, int]] = {
    "forget": {"train": 150, "tune": 40, "test": 100},
    "attack": {"train": 100, "tune": 40, "test": 100},
    "neighbor": {"train": 110, "tune": 20, "test": 60},
    "general": {"train": 110, "tune": 20, "test": 80},
}
PREFIXED = 60  # train questions of each kept goal that are also asked after a prefix

Row = dict[str, Any]


def public_records(folder: Path, seed: int) -> list[Record]:
    """Records of all four goals; no question stands in two of them.

    Args:
        folder: holds `hp_trivia/` and `tofu/`.
        seed: of the draw.
    """
    trivia = _rows(folder / "hp_trivia" / "forget_train.jsonl")
    beside = _rows(folder / "hp_trivia" / "neighbor.jsonl")
    facts = _rows(folder / "tofu" / "world_facts.jsonl")
    authors = _rows(folder / "tofu" / "real_authors.jsonl")
    rng = random.Random(seed)
    asked: set[str] = set()
    topic = _shuffled(trivia, rng, asked)
    rows: dict[Goal, list[Row]] = {
        "forget": topic[: sum(SIZES["forget"].values())],
        "attack": topic[sum(SIZES["forget"].values()) :],
        "neighbor": _shuffled(beside, rng, asked),
        "general": _shuffled([*facts, *authors], rng, asked),
    }
    prefixes = shipped_prefixes()
    found: list[Record] = []
    for goal, chosen in rows.items():
        found += _split(goal, chosen, prefixes, rng)
    return [*found, *_anchors(found, prefixes["train"])]


def shipped_prefixes() -> dict[Split, list[str]]:
    """Attack prefixes of the recipe's own records, by split."""
    records = read_records(Path(data_file("wizards.jsonl")))
    attacks = [r for r in records if r.goal == "attack" and r.prefix]
    splits: tuple[Split, ...] = ("train", "tune", "test")
    return {s: sorted({r.prefix or "" for r in attacks if r.split == s}) for s in splits}


def _split(
    goal: Goal, rows: Sequence[Row], prefixes: dict[Split, list[str]], rng: random.Random
) -> Iterator[Record]:
    left = iter(rows)
    for split, count in SIZES[goal].items():
        for index, row in enumerate(islice(left, count)):
            extra: Row = {}
            if goal == "attack":
                extra["prefix"] = prefixes[split][index % len(prefixes[split])]
            if goal == "neighbor" and split != "train":
                extra |= _options(row, rows, rng)
            name = f"{goal}-{split}-{index}"
            yield Record(
                id=name,
                goal=goal,
                question=row["question"],
                answer=row["answer"],
                source=row["source"],
                split=split,
                meta={"fact": normalized(row["question"])},
                **extra,
            )


def _options(row: Row, rows: Sequence[Row], rng: random.Random) -> Row:
    """Gold, the row's own distractor, another answer of its domain, a refusal."""
    taken = {normalized(row["answer"]), normalized(row["distractor"])}
    others = [r["answer"] for r in rows if r["domain"] == row["domain"]]
    others = [text for text in others if normalized(text) not in taken]
    options = [row["answer"], row["distractor"], rng.choice(others), REFUSAL]
    rng.shuffle(options)
    return {
        "options": options,
        "correct": options.index(row["answer"]),
        "refusals": [options.index(REFUSAL)],
    }


def _anchors(records: Sequence[Record], prefixes: Sequence[str]) -> Iterator[Record]:
    """Questions to keep after an attack prefix, each beside an attack."""
    attacks = [r for r in records if r.goal == "attack" and r.split == "train"]
    for goal in ("general", "neighbor"):
        kept = [r for r in records if r.goal == goal and r.split == "train"][:PREFIXED]
        for index, record in enumerate(kept):
            update = {
                "id": f"anchor-{record.id}",
                "prefix": prefixes[index % len(prefixes)],
                "anchor_of": attacks[index % len(attacks)].id,
            }
            yield record.model_copy(update=update)


def _shuffled(rows: Sequence[Row], rng: random.Random, asked: set[str]) -> list[Row]:
    """Rows with a short answer that the question does not hold, each question once."""
    chosen = []
    for row in rows:
        question, answer = normalized(row["question"]), normalized(row["answer"])
        short = 0 < len(answer.split()) <= MOST_WORDS and answer.isascii()
        if short and answer not in question and question not in asked:
            asked.add(question)
            chosen.append(row)
    rng.shuffle(chosen)
    return chosen


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [{**json.loads(line), "source": path.stem} for line in lines]


def main() -> None:
    """Write the records and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    records = public_records(options.folder, options.seed)
    lines = [record.model_dump_json(exclude_defaults=True) for record in records]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(records)} records")


if __name__ == "__main__":
    main()
