"""The weights of gradient surgery against what they promise, and GeN on parabolas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.config import Config, MethodConfig
from unteach.engine.errors import InputError
from unteach.engine.model import Head
from unteach.engine.train.log import FiniteGuard, StepSums
from unteach.engine.train.own_rate import OwnRate, best_rate, next_rate
from unteach.engine.train.parallel import World
from unteach.engine.train.supervise import Part
from unteach.engine.train.surgery import (
    GoalGradients,
    cosines,
    gram_matrix,
    mgda_weights,
    ngdiff_combine,
    projection_weights,
)

ALONE = World(0, 1, torch.device("cpu"), None)


def gradients(goals: int, width: int = 6, seed: int = 0) -> Tensor:
    """Rows of different lengths."""
    torch.manual_seed(seed)
    return torch.randn(goals, width, dtype=torch.float64) * torch.logspace(-2, 2, goals)[:, None]


def brute_force(gram_GG: Tensor, points: int = 60) -> float:
    """The least length on a grid over the simplex of three."""
    ticks = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    first, second = torch.meshgrid(ticks, ticks, indexing="ij")
    grid = torch.stack([first, second, 1 - first - second], -1).reshape(-1, 3)
    grid = grid[grid[:, 2] >= -1e-9]
    return float(((grid @ gram_GG) * grid).sum(1).min())


@pytest.mark.parametrize("seed", range(5))
def test_ngdiff_never_forgets_what_is_kept_nor_keeps_what_is_forgotten(seed: int) -> None:
    forget, retain = gradients(2, seed=seed)
    rows = torch.stack([-forget, retain])
    direction = ngdiff_combine(rows @ rows.T) @ rows
    wanted = retain / retain.norm() - forget / forget.norm()
    torch.testing.assert_close(direction, wanted)
    assert float(direction @ retain) >= 0 >= float(direction @ forget)


def test_ngdiff_drops_a_gradient_of_length_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert ngdiff_combine(rows @ rows.T).tolist() == [0.0, 0.2]


@pytest.mark.parametrize("goals", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(6))
def test_mgda_descends_for_every_goal(goals: int, seed: int) -> None:
    rows = gradients(goals, width=goals + 2, seed=seed)
    rows = rows / rows.norm(dim=1, keepdim=True).sqrt()
    weights = mgda_weights(rows @ rows.T)
    assert float(weights.sum()) == pytest.approx(1) and bool((weights >= -1e-12).all())
    shortest = weights @ rows
    # The condition that only the shortest point of a polytope meets: g_k · w >= ||w||².
    assert bool((rows @ shortest >= shortest @ shortest * (1 - 1e-9) - 1e-12).all())


def test_mgda_of_two_is_the_closed_form_and_the_enumeration_of_three() -> None:
    for seed in range(20):
        one, two = gradients(2, width=3, seed=seed)
        share = float(((two - one) @ two) / ((one - two) @ (one - two)))
        share = min(max(share, 0.0), 1.0)
        pair = torch.stack([one, two])
        assert mgda_weights(pair @ pair.T).tolist() == pytest.approx([share, 1 - share])
        twice = torch.stack([one, two, two])
        weights = mgda_weights(twice @ twice.T)
        assert float(weights[0]) == pytest.approx(share, abs=1e-9)


def test_mgda_of_three_is_the_least_of_a_grid() -> None:
    inside = torch.eye(3, dtype=torch.float64) + 0.1
    assert mgda_weights(inside).tolist() == pytest.approx([1 / 3] * 3)
    for seed in range(8):
        rows = gradients(3, width=4, seed=seed)
        rows = rows / rows.norm(dim=1, keepdim=True)
        gram = rows @ rows.T
        weights = mgda_weights(gram)
        found = float(weights @ gram @ weights)
        assert found <= brute_force(gram) + 1e-12
        assert found >= brute_force(gram) - 0.05


@pytest.mark.parametrize("goals", [2, 3, 5])
def test_equal_and_zero_gradients_have_finite_weights(goals: int) -> None:
    row = torch.tensor([1.0, 2.0], dtype=torch.float64)
    same = row.expand(goals, 2)
    for rows in (same, torch.zeros_like(same), torch.cat([same[1:], 0 * same[:1]])):
        weights = mgda_weights(rows @ rows.T)
        assert bool(torch.isfinite(weights).all())
        assert float(weights.sum()) == pytest.approx(1)
        assert bool(torch.isfinite(projection_weights(rows @ rows.T)).all())
        assert bool(torch.isfinite(cosines(rows @ rows.T)).all())


def test_projection_is_orthogonal_to_what_is_kept_and_as_long_as_before() -> None:
    rows = gradients(3)
    direction = projection_weights(rows @ rows.T) @ rows
    kept = rows[1:] / rows[1:].norm(dim=1, keepdim=True)
    assert float((kept @ direction).abs().max()) <= 1e-9 * float(direction.norm())
    assert float(direction.norm()) == pytest.approx(float(rows[0].norm()))
    along = torch.stack([rows[1], rows[1], rows[2]])
    assert projection_weights(along @ along.T).tolist() == [0, 0, 0]


def test_gram_matrix_and_cosines_are_those_of_whole_gradients() -> None:
    parts = [[torch.randn(3, 4), None], [torch.randn(3, 4), torch.randn(5)]]
    flat = torch.stack([torch.cat([p[0].flatten(), torch.zeros(5) if p[1] is None else p[1]])
                        for p in parts])  # fmt: skip
    gram = gram_matrix(parts, ALONE)
    # The small one is lost where squares are summed in float32.
    assert float(gram_matrix([[torch.tensor([4096.0, 2.0**-6])]], ALONE)) == 2.0**24 + 2.0**-12
    torch.testing.assert_close(gram, (flat @ flat.T).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        float(cosines(gram)[0, 1]),
        float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_gradient_that_is_rounding_has_no_say() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    goals = GoalGradients(model, MethodConfig(name="mollm"), ALONE)
    for row in ([[3.0, 1.0]], [[1e-7, -2e-7]], [[-1.0, 1.0]]):
        model.weight.grad = torch.tensor(row)
        goals.keep()
        assert model.weight.grad is None
    goals.combine()
    assert model.weight.grad is not None
    # Between (3, 1) and (-1, 1), nearest to the origin.
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("direction", ["projection", "mgda", "normalized-mgda"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_gradient_of_nan_is_named_by_the_guard(direction: Any, broken: int) -> None:
    model = torch.nn.Linear(4, 1, bias=False)
    goals = GoalGradients(model, MethodConfig(name="mollm", direction=direction), ALONE)
    gram_GG = torch.eye(3, dtype=torch.float64)
    gram_GG[broken], gram_GG[:, broken] = math.nan, math.nan
    assert bool(goals.weights(gram_GG).isnan().all())
    for goal in range(3):
        model.weight.grad = torch.full_like(model.weight, math.nan if goal == broken else 1.0)
        goals.keep()
    goals.combine()
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = FiniteGuard(optimizer, ALONE)
    with pytest.raises(InputError, match="Step 1: the gradient is not finite, though every"):
        guard.judge(0, StepSums(ALONE), torch.nn.utils.get_total_norm([model.weight.grad]))
        optimizer.step()
        guard.settle()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("rate", [0.01, 0.3, 2.0])
def test_gen_is_exact_on_a_quadratic(rate: float) -> None:
    # L(θ - x d) = 5 - b x + a x²/2 has its bottom at b/a.
    a, b = 0.7, 1.9
    losses = {x: 5 - b * x + a * x * x / 2 for x in (rate, 0.0, -rate)}
    found = best_rate(rate, losses[rate], losses[0.0], losses[-rate])
    assert found == pytest.approx(b / a, rel=1e-9)


def test_gens_guards() -> None:
    assert next_rate(1.0, 3.0, 2.0, 1.0) == 1.0  # uphill
    assert next_rate(1.0, 1.0, 3.0, 4.0) == 1.0  # no bottom
    assert next_rate(1.0, math.inf, 2.0, 3.0) == 0.5
    assert next_rate(1.0, 1.5, 2.0, 4.5) == pytest.approx(0.9 + 0.1 * 0.75)
    far = (5 - 1.9 * 0.01 + 0.7 * 0.01**2 / 2, 5.0, 5 + 1.9 * 0.01 + 0.7 * 0.01**2 / 2)
    assert next_rate(0.01, *far) == pytest.approx(0.011)  # held at double


def test_a_probe_leaves_the_step_and_the_optimisers_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = torch.tensor([[1.0, -2.0, 0.5]])
    sides = []
    for every in (1, None):
        model = torch.nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        config = Config(method=MethodConfig(name="ngdiff", own_rate_every=every))
        own = OwnRate(config, model, optimizer, Head(3, None, 1.0), None, ALONE)  # type: ignore[arg-type]

        def loss(part: object, weight: Tensor = model.weight) -> float:
            return float((weight.detach() - target).square().sum())

        monkeypatch.setattr(own, "_loss", loss)
        for step in range(3):
            model.weight.grad = 2 * (model.weight.detach() - target)
            own.step(step, Part((), (), ()))
        sides.append((model.weight.detach(), optimizer.state[model.weight], own.factor))
    (probed, state, factor), (plain, plain_state, one) = sides
    assert torch.equal(probed, plain) and (factor, one) == (pytest.approx(1.331), 1.0)
    assert all(torch.equal(state[key], value) for key, value in plain_state.items())
