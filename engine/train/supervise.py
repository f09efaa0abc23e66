"""From a micro-batch to its loss: the one forward pass, head on supervised positions only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unteach.engine.config import MethodConfig
from unteach.engine.data.records import GOALS
from unteach.engine.data.tokens import Batch, Example
from unteach.engine.model import Head, PreTrainedModel, head_bias, head_weight, hidden_states
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.train.methods import MethodOutput, Rows, find_method
from unteach.engine.train.parallel import enter_head
from unteach.engine.train.seeds import SeedFile


def supervised_rows(example: Example, method: MethodConfig) -> int:
    """How many positions of an example carry loss."""
    return 1 if method.positions == "first" else len(example.response)


def count_normalizer(examples: Sequence[Example], method: MethodConfig) -> float:
    """What the whole step's weighted sum is divided by: supervised positions, or records.

    Every rank knows the whole step, so the count needs no communication.
    """
    if method.reduction == "record":
        return float(len(examples))
    return float(sum(supervised_rows(example, method) for example in examples))


def row_weights(batch: Batch, method: MethodConfig) -> Tensor:
    """float32 [N]: the goal's weight, shared among the rows of a record where records count."""
    weight_G = torch.tensor([method.weights[goal] for goal in GOALS])
    weight_N = weight_G[batch.goal_N]
    if method.reduction == "record":
        rows_B = torch.bincount(batch.example_N, minlength=len(batch.examples))
        weight_N = weight_N / rows_B[batch.example_N]
    return weight_N


def supervised_loss(
    model: PreTrainedModel,
    batch: Batch,
    weight_N: Tensor,
    normalizer: float,
    method: MethodConfig,
    head: Head,
    cache: TeacherCache | None,
    seeds: SeedFile | None,
) -> MethodOutput:
    """Forward one micro-batch; the head's weight is read here, where FSDP2 has made it whole."""
    device = model.device
    place_BT = None if batch.place_BT is None else batch.place_BT.to(device)
    hidden_BTD = hidden_states(
        model, batch.tokens_BT.to(device), batch.prefix_P.to(device), place_BT
    )
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.position_N.to(device)]
    hidden_ND = enter_head(model, hidden_ND)
    weight_VD, bias_V = head_weight(model), head_bias(model)
    teacher = seeds_NS = None
    if cache is not None and batch.cache_row_N is not None:
        cached = cache.rows(batch.cache_row_N)
        teacher = cache.teacher(cached, device)
        if seeds is not None:
            seeds_NS = seeds.read(batch.cache_row_N, cached.student_ids_NS)
            seeds_NS = seeds_NS.to(device, non_blocking=True)
    rows = Rows(
        hidden_ND=hidden_ND,
        head_VD=weight_VD.to(hidden_ND.dtype),
        bias_V=bias_V,
        head=head,
        labels_N=batch.labels_N.to(device),
        weight_N=weight_N.to(device),
        normalizer=normalizer,
        teacher=teacher,
        seeds_NS=seeds_NS,
    )
    output = find_method(method.name).loss(rows, method)
    if seeds is not None and batch.cache_row_N is not None and output.student_ids_NS is not None:
        seeds.write(batch.cache_row_N, output.student_ids_NS)
    return output
