"""What the plan foretells against what real tensors of a real step take."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from unteach.benchmarks.bench_plan import ALONE, live_peak
from unteach.engine.config import override
from unteach.engine.data.tokens import Example, collate
from unteach.engine.live_bytes import LiveBytes
from unteach.engine.model import head_of, load_model, load_tokenizer, tiny_model
from unteach.engine.plan import largest_batch, lines, plan, plan_batch
from unteach.engine.train.optim import adamw
from unteach.engine.train.own_rate import OwnRate
from unteach.engine.train.parallel import LOSS_METHOD
from unteach.engine.train.supervise import micro_batch, split_step, supervised_loss
from unteach.engine.train.surgery import GoalGradients
from unteach.recipes.tiny import tiny


@pytest.mark.parametrize("pack", ["null", "300"])
@pytest.mark.parametrize("mode", ["off", "elementwise", "selective", "2", "full"])
def test_peak_of_a_real_step_is_the_planned_one(tmp_path: Path, mode: str, pack: str) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    mix = 'data.mix={"forget": 4, "general": 20}'
    settings = [f"parallel.checkpointing={mode}", f"data.pack_tokens={pack}", mix]
    config = override(tiny(), settings)
    batch = largest_batch(config, 1, load_tokenizer(path, config.model))
    assert (batch.place_BT is not None) == (pack != "null")
    planned = plan_batch(config, 1, path, batch).peak
    assert planned == pytest.approx(live_peak(config, path, batch), rel=0.02)


def test_a_step_with_a_gradient_for_each_goal_and_a_probe_fits_into_its_plan(
    tmp_path: Path,
) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    config = override(tiny(), ["method.name=ngdiff", "method.own_rate_every=1"])
    goals = ("forget", "general") * 3
    examples = [
        Example(str(i), goal, tuple(range(3, 9 + i)), (7, 8, 9), None, 0, "gold")
        for i, goal in enumerate(goals)
    ]
    planned = plan_batch(config, 1, path, collate(examples))
    model, tokenizer = load_model(path, config.model), load_tokenizer(path, config.model)
    setattr(model, LOSS_METHOD, types.MethodType(supervised_loss, model.train()))
    optimizer, head = adamw(model, config.optim), head_of(model, tokenizer)
    own = OwnRate(config, model, optimizer, head, None, ALONE)
    parts = split_step(examples, config.method)
    with LiveBytes() as live:
        for step in range(2):  # the second step has moments from the beginning
            live.peak = live.now
            surgery = GoalGradients(model, config.method, ALONE)
            for part in parts:
                batch = micro_batch(part.examples, part, config)
                supervised_loss(model, batch, part, config.method, head, None, None).loss.backward()
                surgery.keep()
            surgery.combine()
            own.step(step, parts[-1])
            optimizer.zero_grad()
    weights = planned.items["weights"]
    assert planned.items["gradients"] == 2 * weights
    assert 0.85 * planned.peak < weights + live.peak < planned.peak
    mollm = plan_batch(override(config, ["method.name=mollm"]), 1, path, collate(examples))
    assert mollm.items["gradients"] == 3 * weights


def test_adapters_are_planned_as_they_are(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    config = override(tiny(), ["optim.lora_rank=4", 'data.mix={"forget": 4, "general": 20}'])
    batch = largest_batch(config, 1, load_tokenizer(path, config.model))
    planned = plan_batch(config, 1, path, batch)
    assert planned.peak == pytest.approx(live_peak(config, path, batch), rel=0.02)
    assert planned.items["gradients"] < 0.2 * planned.items["weights"]


def test_items_follow_their_arithmetic() -> None:
    alone, two = plan(tiny(), 1), plan(tiny(), 2)
    weights = alone.items["weights"]
    assert alone.items["gradients"] == weights and alone.items["optimiser"] == 2 * weights
    assert two.items["weights"] == weights // 2 and two.items["whole units"] > 0
    lean = plan(override(tiny(), ["model.dtype=bfloat16", "optim.state=8bit"]), 1)
    assert lean.items["weights"] == weights // 2
    assert lean.items["optimiser"] == pytest.approx(weights / 4 * 2 * (1 + 1 / 64))
    frozen = plan(override(tiny(), ["optim.head=frozen", "method.name=sft"]), 1)
    assert frozen.items["gradients"] < weights and frozen.items["teacher head"] == 0


def test_plan_names_the_cheapest_switch_that_makes_it_fit() -> None:
    config = override(tiny(), ['data.mix={"general": 128}'])
    start = plan(config, 1).peak
    roomy = list(lines(config, 1, start))
    assert roomy[-1].startswith("It fits") and not [r for r in roomy if "--set" in r]
    full = plan(override(config, ["parallel.checkpointing=full"]), 1).peak
    tight = list(lines(config, 1, full))
    assert [r.split()[1] for r in tight if "--set" in r] == ["parallel.checkpointing=full"]
    assert "and fits into" in tight[-1]
    assert "still does not fit" in list(lines(config, 1, 1000))[-1]
