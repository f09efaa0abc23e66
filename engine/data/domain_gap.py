"""The paper's domain gap, measured: how well a linear classifier tells two goals' data apart.

d_A = 2(1 - 2ε), ε the cross-validated error of a logistic regression on the model's hidden states
(Ben-David et al. 2006): 0 where the data cannot be told apart, 2 where they always can.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from unteach.engine.data.records import GOALS, Record
from unteach.engine.data.tokens import passage_tokens, response_tokens, student_context
from unteach.engine.inference import batch_hidden
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]
FOLDS = 5
RIDGE = 1.0
MAX_TOKENS = 256
BATCH = 8


@dataclass(frozen=True)
class Gap:
    """Proxy A-distance of every pair of goals, raw and standardised.

    Attributes:
        records: of each goal, at most.
    """

    model: str
    records: int
    before: dict[Pair, float]
    after: dict[Pair, float]


def measure_gap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    before: Mapping[str, Sequence[Record]],
    after: Mapping[str, Sequence[Record]],
    *,
    name: str,
) -> Gap:
    """The gap between goals over records by goal, on both sides of the standardisation."""
    sides = []
    for side in (before, after):
        states = {goal: record_states(model, tokenizer, rows) for goal, rows in side.items()}
        sides.append(
            {(a, b): proxy_distance(states[a], states[b]) for a, b in combinations(states, 2)}
        )
    largest = max(len(rows) for side in (before, after) for rows in side.values())
    return Gap(name, largest, *sides)


@torch.no_grad()
def record_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Tensor:
    """[R, D] mean hidden state over each record as training reads it, float64."""
    sequences = [
        (
            student_context(tokenizer, record)
            + (
                passage_tokens(tokenizer, record.answer or "")
                if record.form == "passage"
                else response_tokens(tokenizer, record.answer or "", prefix=record.prefix)
            )
        )[:MAX_TOKENS]
        for record in records
    ]
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    states: dict[int, Tensor] = {}
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        hidden = batch_hidden(model, [sequences[index] for index in chosen])
        for index, hidden_TD in zip(chosen, hidden, strict=True):
            states[index] = hidden_TD.double().mean(0).cpu()
    return torch.stack([states[index] for index in range(len(records))])


def proxy_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """2(1 - 2ε) between two samples, in [0, 2]; a classifier worse than chance counts as chance.

    The larger sample is cut to the smaller one's size. Folds are taken in order, so the samples
    should be in no order of their own; each is standardised by its training part.

    Raises:
        ValueError: fewer than FOLDS rows on a side, or widths that differ.
    """
    size = min(len(first_ND), len(second_MD))
    if size < FOLDS or first_ND.shape[1] != second_MD.shape[1]:
        raise ValueError(f"two samples of at least {FOLDS} rows and equal width, not {size}")
    x = torch.cat([first_ND[:size], second_MD[:size]]).double()
    y = torch.cat([x.new_zeros(size), x.new_ones(size)])
    fold = torch.arange(size).repeat(2) % FOLDS
    wrong = 0
    for index in range(FOLDS):
        held = fold == index
        mean, std = x[~held].mean(0), x[~held].std(0).clamp_min(1e-8)
        scores = _logistic((x[~held] - mean) / std, y[~held])((x[held] - mean) / std)
        wrong += int(((scores > 0) != (y[held] > 0)).sum())
    return max(0.0, 2 * (1 - 2 * wrong / len(x)))


def _logistic(x_ND: Tensor, y_N: Tensor) -> Any:
    """A ridge-penalised logistic regression, fitted in the span of its rows (exact, N ≤ D)."""
    _, scale, basis_DR = torch.linalg.svd(x_ND, full_matrices=False)
    basis_DR = basis_DR[scale > scale.max() * 1e-10].T
    z_NR = x_ND @ basis_DR
    weight = torch.zeros(z_NR.shape[1] + 1, dtype=x_ND.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = z_NR @ weight[1:] + weight[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y_N, reduction="sum")
        value = value + RIDGE / 2 * weight[1:].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    fitted = weight.detach()
    return lambda x: (x @ basis_DR) @ fitted[1:] + fitted[0]


def draw_gap(gap: Gap) -> bytes:
    """Two heat maps of goals by goals, raw text beside records, as PNG bytes."""
    figure = Figure(figsize=(8.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    image: Any = None
    for axis, title, pairs in zip(
        axes, ("raw text", "records"), (gap.before, gap.after), strict=True
    ):
        goals = [goal for goal in GOALS if any(goal in pair for pair in pairs)]
        grid = [[_between(pairs, a, b) for b in goals] for a in goals]
        image = axis.imshow(grid, vmin=0, vmax=2, cmap="cividis")
        axis.set_xticks(range(len(goals)), goals, rotation=30)
        axis.set_yticks(range(len(goals)), goals)
        axis.set_title(title)
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                colour = "white" if value < 1 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="proxy A-distance", shrink=0.8)
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _between(pairs: Mapping[Pair, float], a: str, b: str) -> float:
    return 0.0 if a == b else pairs.get((a, b), pairs.get((b, a), 0.0))
