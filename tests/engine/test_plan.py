"""What the plan foretells against what real tensors of a real step take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unteach.engine.config import Config, override
from unteach.engine.live_bytes import LiveBytes
from unteach.engine.model import (
    head_weight,
    hidden_states,
    load_model,
    load_tokenizer,
    tiny_model,
)
from unteach.engine.plan import largest_batch, lines, plan, plan_batch
from unteach.engine.train.optim import adamw, choose_trainable
from unteach.engine.train.parallel import World, shard_model
from unteach.kernels.bitopk import HiddenTeacher, bitopk_loss
from unteach.kernels.linear_topk import linear_topk
from unteach.recipes.tiny import tiny


def measured(config: Config, path: str) -> tuple[int, int]:
    """Peak bytes of tensors in one step, weights and moments included, and planned ones."""
    batch = largest_batch(config, 1, load_tokenizer(path, config.model))
    model = load_model(path, config.model)
    choose_trainable(model, config.optim)
    shard_model(model, config.parallel, World(0, 1, torch.device("cpu"), None))
    model.train()
    width = head_weight(model).shape[1]
    cached_NE = torch.randn(len(batch.position_N), width)
    head_VE = head_weight(model).detach().clone()
    logits_NM, ids_NM = linear_topk(cached_NE, head_VE, config.teacher.top)
    teacher = HiddenTeacher(cached_NE, head_VE, ids_NM, logits_NM)
    optimizer = adamw(model, config.optim)
    with LiveBytes() as live:
        for _ in range(2):  # the second step has moments from the beginning
            live.peak = live.now
            hidden_BTD = hidden_states(model, batch.tokens_BT, batch.prefix_P, batch.place_BT)
            hidden_ND = hidden_BTD.flatten(0, 1)[batch.position_N]
            bitopk_loss(hidden_ND, head_weight(model), teacher, k=config.method.k).loss.backward()
            del hidden_BTD, hidden_ND
            optimizer.step()
            optimizer.zero_grad()
    held = [*model.parameters(), cached_NE, head_VE, logits_NM, ids_NM]
    total = live.peak + sum(t.numel() * t.element_size() for t in held)
    return total, plan_batch(config, 1, path, batch).peak


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    # Recomputing leaves so little that the head's workspace, planned at its largest, shows.
    [((), 0.05), (("parallel.checkpointing=full",), 0.12)],
    ids=["off", "full"],
)
def test_peak_of_a_real_step_is_the_planned_one(
    tmp_path: Path, settings: tuple[str, ...], tolerance: float
) -> None:
    path = str(tiny_model(tmp_path / "tiny", tied=False))
    more = ('data.mix={"forget": 4, "general": 20}',)
    found, planned = measured(override(tiny(), [*settings, *more]), path)
    assert planned == pytest.approx(found, rel=tolerance)


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
