"""Every method, one row each: a pure function from supervised rows to a scalar loss.

A loss is a sum over rows, weighted and divided by the step's global normaliser, so that neither
ranks nor micro-batches change it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from unteach.engine.config import MethodConfig
from unteach.engine.data.records import GOALS, Goal
from unteach.engine.errors import InputError
from unteach.engine.model import Head
from unteach.kernels.bitopk import HiddenTeacher, LogitsTeacher, SparseTeacher, bitopk_loss
from unteach.kernels.linear_logprob import linear_logprob

Teacher = HiddenTeacher | LogitsTeacher | SparseTeacher


@dataclass(frozen=True)
class Rows:
    """What a method sees of one micro-batch: N supervised positions.

    Attributes:
        hidden_ND: student hidden states after the final norm.
        head_VD: output head, whole.
        bias_V: the head's bias, or None.
        head: soft cap, scale and real vocabulary size.
        labels_N: int64, the response token of each position.
        weight_N: float32 weight of each row.
        normalizer: what the weighted sum of the whole step is divided by.
        teacher: cached teacher rows, None for methods without one.
        seeds_NS: int32 ids likely among the student's top-K, or None.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    head: Head
    labels_N: Tensor
    weight_N: Tensor
    normalizer: float
    teacher: Teacher | None
    seeds_NS: Tensor | None


@dataclass(frozen=True)
class MethodOutput:
    """Scalar loss, and what the log and the next step's seeds take from it (all detached)."""

    loss: Tensor
    row_loss_N: Tensor
    student_ids_NS: Tensor | None = None
    coverage_N: Tensor | None = None
    fallback_rows: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        goals: goals whose records it trains on.
        cached_teacher: whether it reads teacher rows beside the labels.
    """

    name: str
    summary: str
    loss: Callable[[Rows, MethodConfig], MethodOutput]
    goals: tuple[Goal, ...] = GOALS
    cached_teacher: bool = False


def bitopk(rows: Rows, config: MethodConfig) -> MethodOutput:
    """Eq. 3 with the options of the config: centring by the union, and the gate."""
    assert rows.teacher is not None
    output = bitopk_loss(
        rows.hidden_ND,
        rows.head_VD,
        rows.teacher,
        k=config.k,
        alpha=config.alpha,
        beta=config.beta,
        weight_N=rows.weight_N,
        normalizer=rows.normalizer,
        center=config.center,
        gate=config.gate,
        bias_V=rows.bias_V,
        softcap=rows.head.softcap,
        scale=rows.head.scale,
        vocab=rows.head.vocab,
        seeds_NS=rows.seeds_NS,
    )
    return MethodOutput(
        output.loss,
        output.row_loss_N,
        output.student_ids_NS,
        output.coverage_N,
        output.fallback_rows,
    )


def eq3(rows: Rows, config: MethodConfig) -> MethodOutput:
    """Eq. 3 exactly as the paper writes it: raw logits, no gate."""
    return bitopk(rows, config.model_copy(update={"center": False, "gate": None}))


def sft_loss(logp_N: Tensor) -> Tensor:
    """Negative log-likelihood of supervised tokens, nats, a row each.

    L_n = -log p(y_n)

    Args:
        logp_N: log-probability of each label.
    """
    return -logp_N


def sft(rows: Rows, config: MethodConfig) -> MethodOutput:
    """Supervised fine-tuning on the responses: refusals to forget, answers to keep."""
    logp_N = linear_logprob(
        rows.hidden_ND,
        rows.head_VD,
        rows.labels_N,
        bias_V=rows.bias_V,
        softcap=rows.head.softcap,
        scale=rows.head.scale,
    )
    row_loss_N = sft_loss(logp_N)
    return MethodOutput((row_loss_N * rows.weight_N).sum() / rows.normalizer, row_loss_N.detach())


METHODS = {
    method.name: method
    for method in (
        Method("bitopk", "Eq. 3, centred and gated as configured", bitopk, cached_teacher=True),
        Method("eq3", "Eq. 3 exactly as the paper writes it", eq3, cached_teacher=True),
        Method("sft", "refusals to forget, answers to keep, by cross-entropy", sft),
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
