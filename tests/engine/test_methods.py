"""Each formula against a derivation of its own, in plain Python and float64, gradients too."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unteach.engine.config import Config, TeacherConfig, override
from unteach.engine.data.records import Record, read_records
from unteach.engine.errors import InputError
from unteach.engine.train.methods import (
    METHODS,
    bild_loss,
    check_method,
    find_method,
    flat_loss,
    ga_loss,
    graddiff_loss,
    npo_loss,
    settle,
    sft_loss,
    simnpo_loss,
    uce_loss,
)
from unteach.recipes.tiny import tiny


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def value(loss: Tensor) -> float:
    return float(loss.detach())


def gradient(loss: Tensor, *wanted: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wanted))


def test_likelihoods_are_token_means() -> None:
    forget, retain = leaf(-0.5, -2.0, -3.5), leaf(-1.0, -0.25)
    assert value(sft_loss(forget)) == pytest.approx(2.0)
    assert value(ga_loss(forget)) == pytest.approx(-2.0)
    loss = graddiff_loss(forget, retain, gamma=0.5, alpha=3.0)
    assert value(loss) == pytest.approx(-0.5 * 2.0 + 3.0 * 0.625)
    d_forget, d_retain = gradient(loss, forget, retain)
    assert d_forget.tolist() == pytest.approx([0.5 / 3] * 3)
    assert d_retain.tolist() == pytest.approx([-1.5] * 2)
    assert sft_loss(forget).dtype == torch.float64


def test_npo_is_the_written_formula_and_its_slope() -> None:
    logp, reference, beta = leaf(-3.0, -10.0), leaf(-4.0, -2.5), 0.3
    ratios = [beta * (-3.0 + 4.0), beta * (-10.0 + 2.5)]
    wanted = 2 / beta * sum(math.log1p(math.exp(r)) for r in ratios) / 2
    loss = npo_loss(logp, reference, beta=beta)
    assert value(loss) == pytest.approx(wanted, rel=1e-12)
    slopes = [math.exp(r) / (1 + math.exp(r)) for r in ratios]  # 2/β · β · σ(βr) / 2
    assert gradient(loss, logp)[0].tolist() == pytest.approx(slopes, rel=1e-12)
    with pytest.raises(RuntimeError, match="not have been used"):
        gradient(npo_loss(logp, reference), reference)


def test_npo_identities() -> None:
    same = leaf(-7.0, -1.0)
    assert value(npo_loss(same, same.detach(), beta=0.1)) == pytest.approx(20 * math.log(2))
    logp, reference = leaf(-5.0, -9.0), torch.tensor([-4.0, -6.0], dtype=torch.float64)
    (slope,) = gradient(npo_loss(logp, reference, beta=1e-9), logp)
    (ascent,) = gradient(ga_loss(logp), logp)
    torch.testing.assert_close(slope, ascent, rtol=1e-8, atol=0)
    for ratio in (1e4, -1e4):
        far = torch.tensor([ratio], dtype=torch.float32, requires_grad=True)
        loss = npo_loss(far, torch.zeros(1))
        assert math.isfinite(float(loss.detach()))
        assert bool(torch.isfinite(gradient(loss, far)[0]).all())
    assert value(npo_loss(leaf(1e4), leaf(0.0), beta=0.1)) == pytest.approx(2e4)
    with pytest.raises(ValueError, match="beta is 0"):
        npo_loss(same, same, beta=0)
    with pytest.raises(ValueError, match="expected the shape"):
        npo_loss(same, leaf(1.0))


def test_simnpo_divides_by_length_and_keeps_gamma_inside() -> None:
    logp, lengths = leaf(-6.0, -1.0), torch.tensor([3, 2])
    beta, gamma = 2.5, 0.2
    inside = [beta * (6.0 / 3 - gamma), beta * (1.0 / 2 - gamma)]
    wanted = 2 / beta * sum(math.log1p(math.exp(-x)) for x in inside) / 2
    loss = simnpo_loss(logp, lengths, beta=beta, gamma=gamma)
    assert value(loss) == pytest.approx(wanted, rel=1e-12)
    slopes = [1 / (1 + math.exp(x)) / n for x, n in zip(inside, (3, 2), strict=True)]
    assert gradient(loss, logp)[0].tolist() == pytest.approx(slopes, rel=1e-12)


def test_simnpo_refuses_lengths_that_would_broadcast() -> None:
    logp = torch.tensor([-3.0, -5.0])
    for lengths in (torch.tensor([[2], [4]]), torch.tensor([2]), torch.tensor(2)):
        with pytest.raises(ValueError, match=r"lengths_B is .*expected the shape of logp_B"):
            simnpo_loss(logp, lengths)


FLAT = {
    "tv": lambda x, z: -math.tanh(x) / 2 + math.tanh(z) / 2,
    "kl": lambda x, z: -x + math.exp(z - 1),
    "js": lambda x, z: math.log1p(math.exp(-x)) + math.log1p(math.exp(z)) - 2 * math.log(2),
    "pearson": lambda x, z: -x + z + z * z / 4,
}


@pytest.mark.parametrize("divergence", FLAT)
def test_flat_is_of_batch_means_and_pushes_the_right_way(divergence: str) -> None:
    template, forget = leaf(0.1, 0.5), leaf(0.9, 0.2, 0.4)
    loss = flat_loss(template, forget, divergence=divergence)
    assert value(loss) == pytest.approx(FLAT[divergence](0.3, 0.5), rel=1e-12)
    up, down = gradient(loss, template, forget)
    assert bool((up < 0).all()) and bool((down > 0).all())
    step = 1e-6
    by_hand = (FLAT[divergence](0.3, 0.5 + step) - FLAT[divergence](0.3, 0.5 - step)) / (2 * step)
    assert float(down.sum()) == pytest.approx(by_hand, rel=1e-6)


def test_flat_refuses_other_divergences() -> None:
    with pytest.raises(ValueError, match="'jeffrey'"):
        flat_loss(leaf(0.1), leaf(0.1), divergence="jeffrey")  # type: ignore[arg-type]


def test_uce_is_bounded_with_a_bounded_slope() -> None:
    logp = leaf(-50.0, math.log(0.5), 0.0)
    assert value(uce_loss(logp)) == pytest.approx((0 - math.log(0.75) + math.log(2)) / 3)
    (slope,) = gradient(uce_loss(logp), logp)
    wanted = [p / (2 - p) / 3 for p in (math.exp(-50), 0.5, 1.0)]
    assert slope.tolist() == pytest.approx(wanted)
    many = uce_loss(-torch.rand(200, dtype=torch.float64).mul(30))
    assert 0 <= value(many) <= math.log(2)


def bild_by_hand(sides: list[tuple[list[float], list[float]]], temperature: float) -> float:
    """Σ_sides KL(softmax(d_t) || softmax(d_s)), one row, in plain Python."""
    total = 0.0
    for student, teacher in sides:
        spread = []
        for z in (student, teacher):
            d = [(z[i] - z[j]) / temperature for i, j in combinations(range(len(z)), 2)]
            norm = math.log(sum(math.exp(x) for x in d))
            spread.append([x - norm for x in d])
        total += sum(math.exp(t) * (t - s) for s, t in zip(*spread, strict=True))
    return total


def test_bild_is_both_sides_and_only_the_student_learns() -> None:
    values = torch.randn(4, 5, 4, dtype=torch.float64).mul(3)
    tensors = [v.clone().requires_grad_() for v in values]
    loss = bild_loss(*tensors)
    rows = values.tolist()
    wanted = [
        bild_by_hand([(rows[0][n], rows[1][n]), (rows[2][n], rows[3][n])], 3.0) for n in range(5)
    ]
    assert value(loss) == pytest.approx(sum(wanted) / 5, rel=1e-12)
    loss.backward()
    assert tensors[1].grad is None and tensors[3].grad is None
    for side, place in ((0, (2, 1)), (2, (4, 3))):  # the teacher-led and the student-led student
        step = 1e-6
        moved = []
        for sign in (1, -1):
            shifted = [v.clone() for v in values]
            shifted[side][place] += sign * step
            moved.append(value(bild_loss(*shifted)))
        grad = tensors[side].grad
        assert grad is not None
        assert float(grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5)


def test_symmetric_bild_adds_the_other_direction() -> None:
    values = list(torch.randn(4, 3, 4, dtype=torch.float64))
    swapped = [values[1], values[0], values[3], values[2]]
    both = bild_loss(*values) + bild_loss(*swapped)
    torch.testing.assert_close(bild_loss(*values, symmetric=True), both)
    assert value(bild_loss(values[0], values[0], values[2], values[2])) == pytest.approx(0)


def test_duet_loss_is_bitopk_without_the_students_set() -> None:
    config = settle(override(tiny(), ["method.name=duet-loss", "method.alpha=0.7"]))
    assert config.method == tiny().method.model_copy(update={"name": "duet-loss", "alpha": 0.0})
    assert config.teacher == tiny().teacher
    assert METHODS["duet-loss"].terms == METHODS["bitopk"].terms


def test_a_method_says_what_its_cache_holds() -> None:
    npo = settle(override(tiny(), ["method.name=npo"])).teacher
    assert (npo.routing, npo.min_refusal) == ("none", None)
    assert (npo.response["forget"], npo.response["general"]) == ("gold", "gold")
    duet = settle(override(tiny(), ["method.name=duet"]))
    assert (duet.teacher.routing, duet.method.positions) == ("ensemble", "first")
    needs = {name for name, m in METHODS.items() if m.needs_cache(TeacherConfig())}
    assert needs == {*METHODS} - {"sft", "ga", "graddiff", "simnpo", "flat", "ngdiff"}
    assert find_method("flat").sources("forget", TeacherConfig()) == ("refusal", "gold")


def bad(settings: list[str], records: list[Record] | None = None) -> Config:
    config = override(tiny(), settings)
    check_method(config, records if records is not None else read_records(Path(config.data.path)))
    return config


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["method.name=npoo"], "did you mean npo?"),
        (["method.name=npo", 'data.mix={"forget": 1}'], "npo needs records of goal general"),
        (["method.name=ga", 'data.mix={"general": 1}'], "ga needs records of goal forget"),
        (["method.name=bild-loss", "method.k=1"], "method.k to 2"),
        (["method.name=kl-teacher", "teacher.form=topk"], "teacher.form=hidden"),
    ],
)
def test_what_a_method_cannot_train_on_is_one_sentence(settings: list[str], part: str) -> None:
    with pytest.raises(InputError, match=part):
        bad(settings)


def test_a_goal_without_records_and_a_record_without_gold_are_named() -> None:
    records = read_records(Path(tiny().data.path))
    with pytest.raises(InputError, match="no train record of goal attack"):
        bad(["method.name=mollm"], [r for r in records if r.goal != "attack"])
    blank = [r.model_copy(update={"answer": None}) if r.id == "forget-owl" else r for r in records]
    with pytest.raises(InputError, match=r"'forget-owl' \(forget\) has no gold answer.*npo"):
        bad(["method.name=npo"], blank)
    bad(["method.name=bitopk"], blank)  # the teacher's own answer is what it trains on
    bad(["method.name=npo", "data.known_only=true"], blank)  # such records are dropped anyway
