"""Every method, one row each: the means its loss is made of, over whose rows, and what it reads.

A row of the table is a few `Term`s. Each is a sum over supervised rows, weighted and divided by
normalisers of the whole step, so that neither ranks nor micro-batches change it. The formulas are
pure functions and live in losses.py; they are to be imported from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unteach.engine.config import Config, MethodConfig, Response, TeacherConfig
from unteach.engine.data.records import GOALS, Goal, Record, train_split
from unteach.engine.data.tokens import Example
from unteach.engine.errors import InputError
from unteach.engine.train.losses import bild_loss as bild_loss
from unteach.engine.train.losses import flat_loss as flat_loss
from unteach.engine.train.losses import ga_loss as ga_loss
from unteach.engine.train.losses import graddiff_loss as graddiff_loss
from unteach.engine.train.losses import npo_loss as npo_loss
from unteach.engine.train.losses import sft_loss as sft_loss
from unteach.engine.train.losses import simnpo_loss as simnpo_loss
from unteach.engine.train.losses import uce_loss as uce_loss
from unteach.engine.train.terms import (
    MethodOutput,
    Rows,
    ascend,
    bild,
    bitopk,
    flat_forget,
    flat_template,
    imitate,
    kl,
    npo,
    simnpo,
    unlearn,
)

Reads = Literal["labels", "reference", "teacher"]
FORGET: tuple[Goal, ...] = ("forget",)
GENERAL: tuple[Goal, ...] = ("general",)
UNLEARNED: tuple[Goal, ...] = ("forget", "attack")
KEPT: tuple[Goal, ...] = ("general", "neighbor")
GOLD: dict[Goal, Response] = dict.fromkeys(GOALS, "gold")
REFUSED: dict[Goal, Response] = dict.fromkeys(GOALS, "refusal")


@dataclass(frozen=True)
class Term:
    """One mean of a loss.

    Attributes:
        loss: of these rows alone.
        goals: whose rows it is a mean over.
        responses: whose answers they are; a goal left out has what `teacher.response` says.
        reads: what of the cache, beside the labels.
        reduction: mean over positions or over records; None = as configured.
        weight: factor of the mean.
    """

    loss: Callable[[Rows, MethodConfig], MethodOutput]
    goals: tuple[Goal, ...] = GOALS
    responses: Mapping[Goal, Response] = field(default_factory=dict)
    reads: Reads = "labels"
    reduction: Literal["position", "record"] | None = None
    weight: float = 1.0

    def covers(self, example: Example) -> bool:
        """Whether the mean is over this example; one that names no source is anybody's."""
        wanted = self.responses.get(example.goal)
        return example.goal in self.goals and (
            wanted is None or example.says is None or example.says == wanted
        )


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        summary: what it does, for whoever reads a model card.
        terms: the loss is their sum; where gradients are combined, each has a gradient of its own.
        routing: the teacher's, where the method fixes it.
        settings: `method` keys that the row fixes.
        combine: how the terms' gradients become one; None = their sum. Terms that forget lead.
        own_rate: whether the learning rate adapts to the loss of what is kept.
    """

    name: str
    summary: str
    terms: tuple[Term, ...]
    routing: Literal["oracle", "ensemble", "none"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    combine: Literal["ngdiff", "common"] | None = None
    own_rate: bool = False

    @property
    def goals(self) -> tuple[Goal, ...]:
        """Goals whose records it trains on."""
        return tuple(goal for goal in GOALS if any(goal in term.goals for term in self.terms))

    def sources(self, goal: Goal, teacher: TeacherConfig) -> tuple[Response, ...]:
        """Whose answers to a goal's questions it trains on; a stream each."""
        wanted = (t.responses.get(goal) or teacher.response[goal] for t in self.terms)
        terms = (goal in term.goals for term in self.terms)
        return tuple(dict.fromkeys(w for w, has in zip(wanted, terms, strict=True) if has))

    def fixes(self, goal: Goal) -> bool:
        """Whether the row says whose answers to a goal's questions it trains on."""
        return any(goal in term.goals and goal in term.responses for term in self.terms)

    def takes_open(self, goal: Goal, teacher: TeacherConfig) -> bool:
        """Whether it trains on a goal's questions without gold answers.

        Those to forget only beside those to keep: alone they would spread the refusal.
        """
        sources = (self.sources(each, teacher) for each in (goal, *KEPT))
        return all(found and "gold" not in found for found in sources)

    def needs_cache(self, teacher: TeacherConfig) -> bool:
        """Whether it trains on anything that only the teacher's cache holds."""
        if any(term.reads != "labels" for term in self.terms):
            return True
        return any("teacher" in self.sources(goal, teacher) for goal in self.goals)

    @property
    def reads_teacher(self) -> bool:
        """Whether it reads the teacher's rows, beyond labels and reference."""
        return any(term.reads == "teacher" for term in self.terms)


def _distilled(loss: Callable[[Rows, MethodConfig], MethodOutput]) -> tuple[Term, ...]:
    return (Term(loss, reads="teacher"),)


_KEEP = Term(imitate, GENERAL, GOLD)

METHODS = {
    method.name: method
    for method in (
        Method("bitopk", "Eq. 3, centred and gated as configured", _distilled(bitopk)),
        Method(
            "eq3",
            "Eq. 3 exactly as the paper writes it: raw logits, no gate",
            _distilled(bitopk),
            settings={"center": False, "gate": None},
        ),
        Method(
            "duet-loss",
            "ours with the teacher's top-K set alone (α = 0)",
            _distilled(bitopk),
            settings={"alpha": 0.0},
        ),
        Method("bild-loss", "ours with BiLD's logit differences", _distilled(bild)),
        Method("kl-teacher", "ours with KL over the full vocabulary", _distilled(kl)),
        Method(
            "duet",
            "the ensemble teacher's top-K logits at the first position",
            _distilled(bitopk),
            routing="ensemble",
            settings={"alpha": 0.0, "center": False, "gate": None, "positions": "first"},
        ),
        Method(
            "sft",
            "refusals to forget, answers to keep, by cross-entropy",
            (Term(imitate, responses={**GOLD, "forget": "refusal", "attack": "refusal"}),),
        ),
        Method("ga", "gradient ascent on the answers to forget", (Term(ascend, FORGET, GOLD),)),
        Method(
            "graddiff",
            "gradient ascent to forget, cross-entropy to keep",
            (Term(ascend, FORGET, GOLD), _KEEP),
        ),
        Method(
            "npo",
            "negative preference to forget, cross-entropy to keep",
            (Term(npo, FORGET, GOLD, reads="reference", reduction="record"), _KEEP),
            routing="none",
        ),
        Method(
            "simnpo",
            "negative preference without a reference, cross-entropy to keep",
            # 0.1375 goes with beta 2.5 in the authors' own runs.
            (Term(simnpo, FORGET, GOLD, reduction="record", weight=0.1375), _KEEP),
        ),
        Method(
            "flat",
            "forget data only: templates up, answers down, by an f-divergence",
            (
                Term(flat_template, FORGET, REFUSED, reduction="record"),
                Term(flat_forget, FORGET, GOLD, reduction="record"),
            ),
        ),
        Method(
            "ngdiff",
            "normalised gradient difference, its learning rate found on the way",
            (Term(ascend, UNLEARNED, GOLD), Term(imitate, KEPT, GOLD)),
            combine="ngdiff",
            own_rate=True,
        ),
        Method(
            "mollm",
            "a common descent direction of forgetting, KL and cross-entropy",
            (
                Term(unlearn, UNLEARNED, GOLD),
                Term(kl, KEPT, GOLD, reads="teacher"),
                Term(imitate, KEPT, GOLD),
            ),
            routing="none",
            combine="common",
        ),
    )
}


def find_method(name: str) -> Method:
    """The row of that name.

    Raises:
        InputError: no such row; the nearest name is given.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}."
        raise InputError(f"There is no method {name}; {hint}")
    return METHODS[name]


def settle(config: Config) -> Config:
    """The config with everything that its method fixes: its own keys, the teacher's routing, and
    whose answers the cache holds.

    A teacher that is not asked for what each goal wants is not measured by it. With open questions
    the model's own answers are taken where there is no gold one and the method leaves the choice.
    """
    method = find_method(config.method.name)
    update: dict[str, Any] = {"method": config.method.model_copy(update=dict(method.settings))}
    if config.data.open_questions is not None:
        says = dict(config.teacher.response)
        for goal in KEPT:
            if method.sources(goal, config.teacher) == ("gold",) and not method.fixes(goal):
                says[goal] = "own"
        asked = config.teacher.model_copy(update={"response": says})
        config = config.model_copy(update={"teacher": asked})
    teacher: dict[str, Any] = {}
    if method.routing is not None:
        teacher = {"routing": method.routing, "min_refusal": None, "min_agreement": None}
    if method.needs_cache(config.teacher):
        sources = {goal: method.sources(goal, config.teacher) for goal in method.goals}
        teacher["response"] = {
            **config.teacher.response,
            **{goal: says for goal, (says,) in sources.items()},
        }
    update["teacher"] = config.teacher.model_copy(update=teacher)
    return config.model_copy(update=update)


def check_method(config: Config, records: Sequence[Record]) -> None:
    """Refuse what the method cannot train on, before anything is loaded.

    Raises:
        InputError: no such method, a goal it needs is left out or has no record, a record without
            the gold answer that it trains on, a setting that it cannot use.
    """
    method, mix = find_method(config.method.name), config.data.mix
    train = train_split(records, anchors=config.data.anchors, form=config.data.form)
    for term in method.terms:
        if not any(mix.get(goal, 0) for goal in term.goals):
            raise InputError(
                f"Method {method.name} needs records of goal {' or '.join(term.goals)}: set "
                f"data.mix.{term.goals[0]} above 0."
            )
    present = {record.goal for record in train}
    for goal in method.goals:
        if mix.get(goal, 0) and goal not in present:
            raise InputError(
                f"{config.data.path} has no train record of goal {goal}, which data.mix asks "
                f"for: add records or set data.mix.{goal}=0."
            )
    for record in train:
        dropped = config.data.known_only and record.goal in UNLEARNED
        asked = record.goal in method.goals and mix.get(record.goal, 0) and not dropped
        if asked and not record.answer and "gold" in method.sources(record.goal, config.teacher):
            raise InputError(
                f"Train record {record.id!r} ({record.goal}) has no gold answer, and method "
                f"{method.name} trains on it: add `answer`, or leave the record out."
            )
    if method.name == "bild-loss" and config.method.k < 2:
        raise InputError("bild-loss compares pairs of ids: set method.k to 2 or more.")
    if any(t.loss in (kl, bild) for t in method.terms) and config.teacher.form != "hidden":
        raise InputError(
            f"Method {method.name} needs the teacher's hidden states: set teacher.form=hidden."
        )
