"""Questions and their greedy answers: every prompt of every suite in one pass, none asked twice.

Batches are made over all prompts together, so that one long answer holds up as few as possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unteach.engine.data.found_prefixes import read_prefixes
from unteach.engine.data.records import Goal, Record, normalized
from unteach.engine.data.tokens import end_token
from unteach.engine.errors import InputError
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.evaluate.told import NOTHING, Told
from unteach.engine.inference import Tokens, greedy, share_prefix
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase, head_of
from unteach.engine.progress import Advance

# The suite of a goal's plain questions; neighbors are scored by choice, and asked beside that.
ASKED_AS: dict[Goal, str] = {
    "forget": "forget",
    "general": "general",
    "neighbor": "neighbor_recall",
    "attack": "attack",
}


@dataclass(frozen=True)
class Ask:
    """One question as one suite asks it; `prefix` stands on the open assistant turn."""

    suite: str
    record: Record
    prefix: str | None

    def context(self, tokenizer: PreTrainedTokenizerBase, told: Told = NOTHING) -> Tokens:
        """What the model reads."""
        return told.context(tokenizer, self.record, self.prefix)


@dataclass(frozen=True)
class Answer:
    """What the model says after its context; `ended` is False where it was cut."""

    prompt: str
    text: str
    ended: bool


def asks_of(records: Sequence[Record], prefixes: Sequence[str]) -> list[Ask]:
    """The questions of every goal as they are, then general and neighbor ones with prefixes.

    Records in order of their ids take the prefixes in turn; a record with a prefix of its own is
    asked with that one only.

    Args:
        records: of the goals to score, all of one split.
        prefixes: adversarial ones that no training record has; empty = nothing asked with prefixes.
    """
    ordered = sorted(records, key=lambda record: record.id)
    asks = [Ask(ASKED_AS[record.goal], record, record.prefix) for record in ordered]
    for goal in ("general", "neighbor"):
        plain = [r for r in ordered if r.goal == goal and not r.prefix]
        if prefixes:
            asks += [
                Ask(f"{goal}_prefixed", record, prefixes[index % len(prefixes)])
                for index, record in enumerate(plain)
            ]
    return asks


def attack_prefixes(records: Sequence[Record]) -> list[str]:
    """The distinct prefixes of attack test records, trailing spaces stripped, sorted."""
    attacks = (r for r in records if r.split == "test" and r.goal == "attack")
    return sorted({r.prefix.rstrip() for r in attacks if r.prefix and r.prefix.strip()})


def searched_prefixes(settings: EvaluateConfig, records: Sequence[Record]) -> list[str]:
    """The prefixes of `evaluate.searched_prefixes`, less those that a training record has.

    Raises:
        InputError: the file cannot be used, or every prefix of it is trained.
    """
    if settings.searched_prefixes is None:
        return []
    trained = {normalized(r.prefix) for r in records if r.split == "train" and r.prefix}
    found = read_prefixes(Path(settings.searched_prefixes))
    kept = [prefix for prefix in found if normalized(prefix) not in trained]
    if not kept:
        raise InputError(
            f"Every prefix of {settings.searched_prefixes} is trained on and would flatter the "
            "score: search again with `unteach prefixes --target model`, or unset "
            "evaluate.searched_prefixes."
        )
    return kept


def answer_asks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    settings: EvaluateConfig,
    advance: Advance | None = None,
    told: Told = NOTHING,
) -> list[Answer]:
    """Greedy answers in the order of `asks`; those that are told the same are batched together."""
    groups: dict[tuple[Goal, bool] | None, list[Ask]] = {}
    for ask in asks:
        alike = None if told.routing == "none" else (ask.record.goal, bool(ask.prefix))
        groups.setdefault(alike, []).append(ask)
    found: dict[int, Answer] = {}
    for group in groups.values():
        contexts = [ask.context(tokenizer, told) for ask in group]
        answers = answer_all(model, tokenizer, contexts, settings, advance)
        found.update({id(a): b for a, b in zip(group, answers, strict=True)})
    return [found[id(ask)] for ask in asks]


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Tokens],
    settings: EvaluateConfig,
    advance: Advance | None = None,
) -> list[Answer]:
    """Greedy answers in the order of `contexts`; equal contexts are computed once."""
    if not contexts:
        return []
    distinct = [list(context) for context in sorted({tuple(context) for context in contexts})]
    generated = greedy(
        model,
        distinct,
        end=end_token(tokenizer),
        vocab=head_of(model, tokenizer).vocab,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        prefix=share_prefix(model, distinct),
        advance=advance,
    )
    answers = {
        tuple(context): Answer(
            prompt=decoded(tokenizer, context),
            text=decoded(tokenizer, ids, special=False).strip(),
            ended=len(ids) < settings.max_new_tokens,
        )
        for context, ids in zip(distinct, generated, strict=True)
    }
    return [answers[tuple(context)] for context in contexts]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Tokens, *, special: bool = True) -> str:
    """Token ids as text, special tokens shown or left out."""
    text = tokenizer.decode(ids, skip_special_tokens=not special)
    assert isinstance(text, str)
    return text
