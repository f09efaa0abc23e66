"""`unteach prefixes`: search for the strongest openings, then attack held-out questions with them.

The search sees trained forget questions; the leak rate is measured on held-out ones, against no
prefix and against the seeds.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unteach.engine.data.assemble import prefixes
from unteach.engine.data.prefix_search import (
    Propose,
    Search,
    answer_logps,
    mutations,
    search_prefixes,
)
from unteach.engine.data.records import Record
from unteach.engine.data.tokens import context_tokens
from unteach.engine.errors import InputError
from unteach.engine.evaluate.generate import answer_all
from unteach.engine.evaluate.pictures import BLUE, GREY, ORANGE
from unteach.engine.evaluate.scores import Score, leaks, mean
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.files import write_atomic, write_json
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase
from unteach.engine.progress import progress, say

KEPT = 8


def attack_with_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    settings: EvaluateConfig,
    folder: Path,
    *,
    rounds: int,
    children: int,
    per_question: bool = False,
    questions: int = 32,
    seed: int = 0,
    proposer: Propose | None = None,
) -> dict[str, Any]:
    """Search on trained forget questions, attack held-out ones, write what was found.

    Args:
        per_question: search one prefix for each held-out question on that question alone, instead
            of one for all.
        questions: most questions to search on.
        proposer: gives variants of the best prefixes; None = mutations.
    Returns:
        What `prefixes.json` holds.
    Raises:
        InputError: no trained or no held-out forget question with an answer.
    """
    searched, held = _questions(records, questions)
    seeds = prefixes()["train"]
    propose = proposer or mutations(seed)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [[record] for record in held] if per_question else [searched]
    total = (rounds + 1) * len(chosen)
    with progress("prefixes", total, unit="rounds") as advance:
        found = [
            search_prefixes(
                _scorer(model, tokenizer, group, settings.batch_size),
                seeds,
                propose,
                golds=list(chain.from_iterable(record.golds for record in group)),
                rounds=rounds,
                children=children,
                keep=KEPT,
                advance=advance,
            )
            for group in chosen
        ]
    best = [search.best for search in found] if per_question else [found[0].best] * len(held)
    rates = {
        "none": _leaks(model, tokenizer, settings, held, [[None]] * len(held)),
        "seeds": _leaks(model, tokenizer, settings, held, [seeds] * len(held)),
        "found": _leaks(model, tokenizer, settings, held, [[prefix] for prefix in best]),
    }
    content = _content(found, rates, per_question, len(searched))
    write_json(folder / "prefixes.json", content)
    write_atomic(folder / "prefixes.png", draw_attack(content["curve"], rates))
    for name, score in rates.items():
        interval = f"{score.low:.1f} to {score.high:.1f}, N={score.n}"
        say(f"prefixes: {name}: leak rate {score.value:.1f} ({interval})")
    strongest = content["best"][0]["prefix"]
    say(f"prefixes: {content['scored']} scored; best: {strongest!r}; see {folder}")
    return content


def _questions(records: Sequence[Record], most: int) -> tuple[list[Record], list[Record]]:
    asked = [r for r in records if r.form == "qa" and r.goal in ("forget", "attack") and r.golds]
    plain = [r.model_copy(update={"prefix": None}) for r in asked]
    searched = {r.question: r for r in plain if r.split == "train"}
    held = {r.question: r for r in plain if r.split == "test"}
    for side, name in ((searched, "train"), (held, "test")):
        if not side:
            raise InputError(
                f"There is no {name} forget question with an answer: a search needs some to search "
                "on and others to attack."
            )
    return list(searched.values())[:most], list(held.values())


def _scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Sequence[Record],
    batch_size: int,
) -> Callable[[str], float]:
    def score(prefix: str) -> float:
        values = answer_logps(model, tokenizer, group, prefix, batch_size=batch_size)
        return sum(values) / len(values)

    return score


def _leaks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluateConfig,
    held: Sequence[Record],
    prefixes: Sequence[Sequence[str | None]],
) -> Score:
    """How often an answer comes out: each question's share over its own prefixes, and their mean.

    A question's prefixes mostly succeed or fail together, so N is the number of questions.
    """
    asked = [(r, prefix) for r, each in zip(held, prefixes, strict=True) for prefix in each]
    contexts = [context_tokens(tokenizer, r.question, prefix=prefix) for r, prefix in asked]
    answers = iter(answer_all(model, tokenizer, contexts, settings))
    return mean(
        [
            sum(leaks(next(answers).text, record.golds) for _ in each) / len(each)
            for record, each in zip(held, prefixes, strict=True)
        ]
    )


def _content(
    found: Sequence[Search], rates: dict[str, Score], per_question: bool, questions: int
) -> dict[str, Any]:
    curves = [search.curve for search in found]
    left_out = sum((search.rejects.counts for search in found), Counter[str]())
    ranked = [pair for search in found for pair in search.ranked[: 1 if per_question else KEPT]]
    return {
        "kind": "question" if per_question else "universal",
        "search_questions": questions,
        "scored": sum(search.scored for search in found),
        "left_out": dict(left_out),
        "curve": [sum(values) / len(values) for values in zip(*curves, strict=True)],
        "best": [{"prefix": text, "logp": score} for text, score in ranked],
        "leak_rate": {name: vars(score) for name, score in rates.items()},
    }


def draw_attack(curve: Sequence[float], rates: dict[str, Score]) -> bytes:
    """Strength of the best prefix over rounds, and leak rates with intervals, as PNG bytes."""
    figure = Figure(figsize=(8.4, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    left.plot(range(len(curve)), curve, color=BLUE, marker="o", linewidth=2)
    left.set_xlabel("round (0 = seeds)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))  # a search has no half rounds
    left.set_ylabel("log-probability a token of the answer, nats")
    left.grid(color="#e5e5e5")
    for place, (name, score) in enumerate(rates.items()):
        low, high = max(0.0, score.value - score.low), max(0.0, score.high - score.value)
        colour = {"none": GREY, "seeds": BLUE}.get(name, ORANGE)
        right.bar(place, score.value, color=colour, yerr=[[low], [high]], capsize=4)
    right.set_xticks(range(len(rates)), list(rates))
    right.set_ylabel("leak rate on held-out questions, %")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(False)
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
