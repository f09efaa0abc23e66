"""What the plan foretells against what real tensors of a real step take."""

from __future__ import annotations

from pathlib import Path

import pytest

from unteach.benchmarks.bench_plan import live_peak
from unteach.engine.config import override
from unteach.engine.model import load_tokenizer, tiny_model
from unteach.engine.plan import largest_batch, lines, plan, plan_batch
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
