"""From supervised rows to the weighted sum of a formula: one function for each kind of term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.engine.config import MethodConfig
from unteach.engine.errors import InputError
from unteach.engine.model import Head
from unteach.engine.train.losses import (
    bild_rows,
    flat_forget_rows,
    flat_template_rows,
    ga_rows,
    npo_rows,
    sft_rows,
    simnpo_rows,
    uce_rows,
)
from unteach.kernels.bitopk import HiddenTeacher, LogitsTeacher, SparseTeacher, bitopk_loss
from unteach.kernels.gather_linear import gather_linear
from unteach.kernels.linear_kl import linear_kl
from unteach.kernels.linear_logprob import linear_logprob
from unteach.kernels.linear_topk import linear_topk

Teacher = HiddenTeacher | LogitsTeacher | SparseTeacher


@dataclass(frozen=True)
class Rows:
    """What a term sees of one micro-batch: N supervised positions of B records.

    Attributes:
        hidden_ND: student hidden states after the final norm.
        head_VD: output head, whole.
        bias_V: the head's bias, or None.
        head: soft cap, scale and real vocabulary size.
        labels_N: int64, the response token of each position.
        owner_N: int64, which record of the micro-batch each position belongs to.
        records: B.
        weight_N: float32; the loss is the weighted sum of the rows, with nothing left to divide.
        teacher: cached teacher rows, None for terms that do not read them.
        reference_logp_N: log-probability of the label under the weights before training, or None.
        seeds_NS: int32 ids likely among the student's top-K, or None.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    head: Head
    labels_N: Tensor
    owner_N: Tensor
    records: int
    weight_N: Tensor
    teacher: Teacher | None = None
    reference_logp_N: Tensor | None = None
    seeds_NS: Tensor | None = None

    def logp(self) -> Tensor:
        """Log-probability of each label, [N], nats."""
        return linear_logprob(
            self.hidden_ND,
            self.head_VD,
            self.labels_N,
            bias_V=self.bias_V,
            softcap=self.head.softcap,
            scale=self.head.scale,
        )

    def logits(self, ids_NU: Tensor) -> Tensor:
        """The student's logits at some ids of each row, [N, U]."""
        return gather_linear(
            self.hidden_ND,
            self.head_VD,
            ids_NU,
            bias_V=self.bias_V,
            softcap=self.head.softcap,
            scale=self.head.scale,
        )

    def summed(self, value_N: Tensor) -> Tensor:
        """Sum over the rows of each record, [B]; 0 for a record without any."""
        return value_N.new_zeros(self.records).index_add(0, self.owner_N, value_N)

    def lengths(self) -> Tensor:
        """Rows of each record, [B], at least 1 so that they may divide."""
        return self.summed(torch.ones_like(self.weight_N)).clamp_min(1)

    def weighted(self, row_loss_N: Tensor) -> MethodOutput:
        """The loss of rows that carry a value each."""
        return MethodOutput((row_loss_N * self.weight_N).sum(), row_loss_N.detach())

    def weighted_records(self, loss_B: Tensor) -> MethodOutput:
        """The loss of records that carry a value each, through the weights of their rows."""
        return self.weighted(loss_B[self.owner_N])


@dataclass(frozen=True)
class MethodOutput:
    """Scalar loss, and what the log and the next step's seeds take from it (all detached)."""

    loss: Tensor
    row_loss_N: Tensor
    student_ids_NS: Tensor | None = None
    coverage_N: Tensor | None = None
    fallback_rows: Tensor | None = None


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
        normalizer=1.0,  # the weights hold it
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


def bild(rows: Rows, config: MethodConfig) -> MethodOutput:
    """BiLD at the top-K ids of either side."""
    teacher = hidden_teacher(rows, "bild-loss")
    assert teacher.ids_NM is not None and teacher.logits_NM is not None
    _, student_ids_NK = linear_topk(
        rows.hidden_ND,
        rows.head_VD,
        config.k,
        vocab=rows.head.vocab,
        seeds_NS=rows.seeds_NS,
        bias_V=rows.bias_V,
        softcap=rows.head.softcap,
        scale=rows.head.scale,
    )
    with torch.no_grad():
        teacher_at_student_NK = gather_linear(
            teacher.hidden_NE,
            teacher.head_VE,
            student_ids_NK,
            bias_V=teacher.bias_V,
            softcap=rows.head.softcap,
            scale=rows.head.scale,
        )
    output = rows.weighted(
        bild_rows(
            rows.logits(teacher.ids_NM[:, : config.k]),
            teacher.logits_NM[:, : config.k],
            rows.logits(student_ids_NK),
            teacher_at_student_NK,
            temperature=config.bild_temperature,
            symmetric=config.bild_symmetric,
        )
    )
    return MethodOutput(output.loss, output.row_loss_N, student_ids_NK)


def kl(rows: Rows, config: MethodConfig) -> MethodOutput:
    """KL(teacher || student) over the full vocabulary, in tiles."""
    teacher = hidden_teacher(rows, "KL over the full vocabulary")
    if teacher.bias_V is not None:
        raise InputError(
            "KL over the full vocabulary is not made for a teacher whose head has a bias: choose "
            "another method.name."
        )
    return rows.weighted(
        linear_kl(
            rows.hidden_ND,
            rows.head_VD,
            teacher.hidden_NE,
            teacher.head_VE,
            vocab=rows.head.vocab,
            bias_V=rows.bias_V,
            softcap=rows.head.softcap,
            scale=rows.head.scale,
        )
    )


def imitate(rows: Rows, config: MethodConfig) -> MethodOutput:
    """Cross-entropy of the labels."""
    return rows.weighted(sft_rows(rows.logp()))


def ascend(rows: Rows, config: MethodConfig) -> MethodOutput:
    """Cross-entropy of the labels, upside down."""
    return rows.weighted(ga_rows(rows.logp()))


def unlearn(rows: Rows, config: MethodConfig) -> MethodOutput:
    """The bounded unlearning cross-entropy."""
    return rows.weighted(uce_rows(rows.logp()))


def npo(rows: Rows, config: MethodConfig) -> MethodOutput:
    """NPO of whole responses against the cached log-probabilities of the original model."""
    assert rows.reference_logp_N is not None
    logp_B, reference_B = rows.summed(rows.logp()), rows.summed(rows.reference_logp_N)
    return rows.weighted_records(npo_rows(logp_B, reference_B, beta=config.npo_beta))


def simnpo(rows: Rows, config: MethodConfig) -> MethodOutput:
    """SimNPO of whole responses."""
    logp_B = rows.summed(rows.logp())
    loss_B = simnpo_rows(logp_B, rows.lengths(), beta=config.simnpo_beta, gamma=config.simnpo_gamma)
    return rows.weighted_records(loss_B)


def flat_template(rows: Rows, config: MethodConfig) -> MethodOutput:
    """FLAT's template side of each record: mean_b of -g(P_b), not -g(mean_b P_b)."""
    return rows.weighted_records(flat_template_rows(_mean_prob(rows), config.flat_divergence))


def flat_forget(rows: Rows, config: MethodConfig) -> MethodOutput:
    """FLAT's forget side of each record: mean_b of f*(g(P_b)), not f*(g(mean_b P_b))."""
    return rows.weighted_records(flat_forget_rows(_mean_prob(rows), config.flat_divergence))


def hidden_teacher(rows: Rows, what: str) -> HiddenTeacher:
    """The teacher as hidden states and head.

    Raises:
        InputError: the cache has another form.
    """
    if not isinstance(rows.teacher, HiddenTeacher):
        raise InputError(f"{what} needs the teacher's hidden states: set teacher.form=hidden.")
    return rows.teacher


def _mean_prob(rows: Rows) -> Tensor:
    return rows.summed(rows.logp().exp()) / rows.lengths()
