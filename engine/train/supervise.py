"""From a step to its loss: its parts, the one forward pass, head on supervised positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unteach.engine.config import Config, MethodConfig
from unteach.engine.data.records import GOALS
from unteach.engine.data.tokens import Batch, Example, collate
from unteach.engine.model import Head, PreTrainedModel, head_bias, head_weight, hidden_states
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.methods import Term, find_method
from unteach.engine.train.parallel import enter_head
from unteach.engine.train.seeds import SeedFile
from unteach.engine.train.terms import MethodOutput, Rows


@dataclass(frozen=True)
class Part:
    """What one gradient is of: terms of the loss, and the examples that they are means over.

    Attributes:
        normalizers: what each term's weighted sum over the whole step is divided by.
    """

    terms: tuple[Term, ...]
    examples: tuple[Example, ...]
    normalizers: tuple[float, ...]


def split_step(examples: Sequence[Example], method: MethodConfig) -> list[Part]:
    """One part for all terms, or one for each term whose gradient is wanted apart.

    Every rank knows the whole step, so that its normalisers need no communication.
    """
    row = find_method(method.name)
    groups = [(term,) for term in row.terms] if row.combine else [row.terms]
    return [part_of(examples, terms, method) for terms in groups]


def part_of(examples: Sequence[Example], terms: Sequence[Term], method: MethodConfig) -> Part:
    """These terms over those of the examples that any of them covers."""
    covered = tuple(e for e in examples if any(term.covers(e) for term in terms))
    return Part(tuple(terms), covered, tuple(normalizer_of(covered, t, method) for t in terms))


def micro_batch(chosen: Sequence[Example], part: Part, config: Config) -> Batch:
    """The examples of one forward pass; a rank without any takes one to keep in step."""
    return collate(
        chosen or part.examples[:1],
        first_only=config.method.positions == "first",
        pack_tokens=config.data.pack_tokens,
    )


def rows_read(batch: Batch, part: Part) -> Iterator[Tensor]:
    """The rows of the cache that each term of a part will ask for."""
    for term in part.terms:
        if batch.cache_row_N is not None and term.reads != "labels":
            yield batch.cache_row_N[term_rows(batch, term)]


def supervised_rows(example: Example, method: MethodConfig) -> int:
    """How many positions of an example carry loss."""
    return 1 if method.positions == "first" else len(example.response)


def normalizer_of(examples: Sequence[Example], term: Term, method: MethodConfig) -> float:
    """Supervised positions, or records, that a term is a mean over in the whole step."""
    covered = [example for example in examples if term.covers(example)]
    if (term.reduction or method.reduction) == "record":
        return float(len(covered))
    return float(sum(supervised_rows(example, method) for example in covered))


def term_rows(batch: Batch, term: Term) -> Tensor:
    """int64, the rows of a micro-batch that a term is a mean over."""
    covered_B = torch.tensor([term.covers(example) for example in batch.examples])
    return covered_B[batch.example_N].nonzero()[:, 0]


def term_weights(batch: Batch, term: Term, normalizer: float, method: MethodConfig) -> Tensor:
    """float32 [N], for every row of the micro-batch: its share of the term's mean.

    The goal's weight and the term's over the normaliser; where records count, shared among the
    rows of a record.
    """
    weight_G = torch.tensor([method.weights[goal] for goal in GOALS])
    weight_N = weight_G[batch.goal_N] * term.weight
    if (term.reduction or method.reduction) == "record":
        rows_B = torch.bincount(batch.example_N, minlength=len(batch.examples))
        weight_N = weight_N / rows_B[batch.example_N]
    return weight_N / normalizer


def supervised_loss(
    model: PreTrainedModel,
    batch: Batch,
    part: Part,
    method: MethodConfig,
    head: Head,
    cache: TeacherCache | None,
    seeds: SeedFile | None,
    share: float = 1.0,
) -> MethodOutput:
    """Forward one micro-batch; the head's weight is read here, where FSDP2 has made it whole.

    Args:
        batch: on the device that computes; offloaded weights of the model may lie elsewhere.
        share: factor of every weight; 0 for a batch that only keeps a rank in step.
    """
    device = batch.tokens_BT.device
    hidden_BTD = hidden_states(model, batch.tokens_BT, batch.prefix_P, batch.place_BT)
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.position_N]
    hidden_ND = enter_head(model, hidden_ND)
    if torch.is_autocast_enabled(device.type):
        # The last norm stays wide; FSDP2 casts what enters the head, one process does so here.
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device.type))
    whole = Rows(
        hidden_ND=hidden_ND,
        head_VD=head_weight(model).to(hidden_ND.dtype),
        bias_V=head_bias(model),
        head=head,
        labels_N=batch.labels_N,
        owner_N=batch.example_N.to(device, non_blocking=True),
        records=len(batch.examples),
        weight_N=torch.ones(len(batch.labels_N), device=device) * share,
    )
    loss, row_loss_N = hidden_ND.new_zeros(()), whole.weight_N.new_zeros(len(batch.labels_N))
    output = MethodOutput(loss, row_loss_N)
    for term, normalizer in zip(part.terms, part.normalizers, strict=True):
        index_R = term_rows(batch, term)
        weight_R = term_weights(batch, term, normalizer, method)[index_R] * share
        rows = _with_cache(_chosen(whole, index_R, weight_R), batch, index_R, term, cache, seeds)
        output = term.loss(rows, method)
        loss = loss + output.loss
        rows_R = index_R.to(device, non_blocking=True)
        row_loss_N.index_add_(0, rows_R, output.row_loss_N.float())
        if (
            seeds is not None
            and batch.cache_row_N is not None
            and output.student_ids_NS is not None
        ):
            seeds.write(batch.cache_row_N[index_R], output.student_ids_NS)
    if len(part.terms) == 1 and len(output.row_loss_N) == len(row_loss_N):
        return replace(output, loss=loss)
    return MethodOutput(loss, row_loss_N)


def _chosen(rows: Rows, index_R: Tensor, weight_R: Tensor) -> Rows:
    """Some of the rows, with the weights of a term; all of them are not copied."""
    device = rows.hidden_ND.device
    weight_R = weight_R.to(device, non_blocking=True)
    if len(index_R) == len(rows.labels_N):
        return replace(rows, weight_N=weight_R)
    index_R = index_R.to(device, non_blocking=True)
    return replace(
        rows,
        hidden_ND=rows.hidden_ND[index_R],
        labels_N=rows.labels_N[index_R],
        owner_N=rows.owner_N[index_R],
        weight_N=weight_R,
    )


def _with_cache(
    rows: Rows,
    batch: Batch,
    index_R: Tensor,
    term: Term,
    cache: TeacherCache | None,
    seeds: SeedFile | None,
) -> Rows:
    """What the term reads of the cache, beside the rows."""
    if cache is None or batch.cache_row_N is None or term.reads == "labels":
        return rows
    row_R, device = batch.cache_row_N[index_R], rows.hidden_ND.device
    cached = cache.rows(row_R)
    seeds_RS = None
    if seeds is not None:
        seeds_RS = seeds.read(row_R, cached.student_ids_NS).to(device, non_blocking=True)
    return replace(
        rows,
        teacher=cache.teacher(cached, device) if term.reads == "teacher" else None,
        reference_logp_N=cached.reference_logp_N.to(device, non_blocking=True),
        seeds_NS=seeds_RS,
    )
