"""Adversarial prefixes: the inner maximum of Obj3, approached by search.

    max_p  mean over questions of  (1/T) log π(answer | question, p)

A prefix is scored by the target model's own log-probability of the gold answer behind it: exact,
batched, no judge. Each round proposes variants of the best (from a writer, or by mutation), scores
them on the search questions, and keeps the best.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from unteach.engine.data.answers import contains_answer, is_refusal
from unteach.engine.data.prompt_files import Prompts
from unteach.engine.data.records import Record, normalized
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.replies import Prefixes
from unteach.engine.data.tokens import answer_tokens, context_tokens
from unteach.engine.data.writer import Writer
from unteach.engine.errors import InputError
from unteach.engine.inference import batch_hidden, share_prefix
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    head_bias,
    head_of,
    head_weight,
)
from unteach.engine.progress import Advance
from unteach.kernels.linear_logprob import linear_logprob

MAX_WORDS = 30
Ranked = Sequence[tuple[str, float]]
Propose = Callable[[Ranked, int], list[str]]


@dataclass(frozen=True)
class Search:
    """What was found, best first, and how strong the best was after each round.

    Attributes:
        curve: mean log-probability a token of the best prefix, round 0 = the seeds.
        scored: prefixes scored, each on every search question.
    """

    ranked: list[tuple[str, float]]
    curve: list[float]
    scored: int
    rejects: Rejects = field(default_factory=Rejects)

    @property
    def best(self) -> str:
        return self.ranked[0][0]


@torch.no_grad()
def answer_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    prefix: str | None = None,
    *,
    batch_size: int = 32,
) -> list[float]:
    """Mean log-probability a token, nats, of each record's gold answer.

    Args:
        prefix: stands on the open assistant turn before the answer; None = the record's own.
    """
    chosen = [r.prefix if prefix is None else prefix for r in records]
    contexts = [
        context_tokens(tokenizer, record.question, prefix=each)
        for record, each in zip(records, chosen, strict=True)
    ]
    answers = [
        answer_tokens(tokenizer, r.golds[0], p) for r, p in zip(records, chosen, strict=True)
    ]
    head = head_of(model, tokenizer)
    shared = share_prefix(model, contexts)
    start = shared.length if shared else 0
    order = sorted(range(len(records)), key=lambda i: len(contexts[i]) + len(answers[i]))
    found: dict[int, float] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        hidden = batch_hidden(model, [contexts[i] + answers[i][:-1] for i in batch], shared)
        rows = [h[len(contexts[i]) - 1 - start :] for i, h in zip(batch, hidden, strict=True)]
        labels = [label for i in batch for label in answers[i]]
        logp_N = linear_logprob(
            torch.cat(rows),
            head_weight(model),
            torch.tensor(labels, dtype=torch.int64, device=model.device),
            bias_V=head_bias(model),
            softcap=head.softcap,
            scale=head.scale,
        )
        parts = logp_N.double().split([len(answers[i]) for i in batch])
        found |= {i: float(part.mean()) for i, part in zip(batch, parts, strict=True)}
    return [found[i] for i in range(len(records))]


def search_prefixes(
    score: Callable[[str], float],
    seeds: Sequence[str],
    propose: Propose,
    *,
    golds: Sequence[str],
    rounds: int,
    children: int,
    keep: int,
    advance: Advance | None = None,
) -> Search:
    """Keep the best `keep` prefixes of seeds and `children` proposals a round.

    Args:
        score: larger is the stronger attack.
        golds: answers of the questions; a prefix that holds one would be no attack but the answer.
    Raises:
        InputError: no seed may be used.
    """
    rejects = Rejects()
    scores: dict[str, float] = {}
    curve: list[float] = []
    ranked: list[tuple[str, float]] = []
    for turn in range(rounds + 1):
        proposed = list(seeds) if turn == 0 else propose(ranked, children)
        for text in dict.fromkeys(each.rstrip() for each in proposed):
            if text in scores:
                continue
            if fault := prefix_fault(text, golds):
                rejects.add(fault, text)
                continue
            scores[text] = score(text)
        # Ties go to the shorter text, then to the alphabet: the same result on every machine.
        ranked = sorted(scores.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:keep]
        if not ranked:
            raise InputError(
                f"No prefix is left to begin the search with (left out: {rejects}): search on "
                "questions whose answers are no part of the shipped prefixes."
            )
        curve.append(ranked[0][1])
        if advance:
            advance(1, f"best {ranked[0][1]:.3f}")
    return Search(ranked, curve, len(scores), rejects)


def prefix_fault(text: str, golds: Sequence[str]) -> str | None:
    """Why a proposal is no prefix, or None."""
    if not normalized(text):
        return "empty prefix"
    if len(text.split()) > MAX_WORDS:
        return f"prefix over {MAX_WORDS} words"
    if any(contains_answer(text, [gold]) for gold in golds):
        return "prefix that holds an answer"
    if is_refusal(text) and not text.rstrip().endswith((":", ",", "is")):
        return "prefix that refuses"
    return None


def mutations(seed: int) -> Propose:
    """Variants without a writer: parts of the best and of the pool joined, dropped and swapped."""
    source = random.Random(seed)

    def propose(ranked: Ranked, count: int) -> list[str]:
        pool = [text for text, _ in ranked]
        made: list[str] = []
        while len(made) < count:
            # The stronger a prefix, the likelier it has children.
            parent = pool[min(source.randrange(len(pool)), source.randrange(len(pool)))]
            other, words = source.choice(pool), parent.split()
            place = source.randrange(len(words))
            kind = source.randrange(5)
            if kind == 0 and len(words) > 1:
                child = [*words[:place], *words[place + 1 :]]
            elif kind == 1:
                child = [*other.split(), *words]
            elif kind == 2:
                child = [*words, *other.split()]
            elif kind == 3:
                child = [*words[: place + 1], *other.split()[-(place + 1) :]]
            else:
                swap = source.randrange(len(words))
                child = list(words)
                child[place], child[swap] = child[swap], child[place]
            made.append(" ".join(child))
        return made

    return propose


def written(writer: Writer, prompts: Prompts, rejects: Rejects) -> Propose:
    """Variants that a writer proposes when it is shown the best and their scores."""

    def propose(ranked: Ranked, count: int) -> list[str]:
        best = "\n".join(f"{score:.3f}  {text}" for text, score in ranked)
        chat = prompts.chat("prefixes", best=best, count=count)
        reply = writer.fill(chat, Prefixes, rejects)
        return list(reply.prefixes[:count]) if reply else []

    return propose
