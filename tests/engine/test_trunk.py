from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from unteach.engine.config import ModelConfig, OptimConfig
from unteach.engine.data.sampler import Stream, share_contexts
from unteach.engine.data.tokens import Example, collate
from unteach.engine.model import PreTrainedModel, hidden_states, load_model, tiny_model
from unteach.engine.train.optim import choose_trainable
from unteach.engine.train.trunk import FrozenOutputs, Trunk, frozen_depth


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())


@pytest.mark.parametrize(
    ("pattern", "depth"),
    [(r".*", 0), (r"model\.layers\.1\..*", 1), (r"model\.layers\.0\..*", 0), (r"model\.norm.*", 2)],
)
def test_frozen_depth_ends_below_the_lowest_trainable_block(
    model: PreTrainedModel, pattern: str, depth: int
) -> None:
    choose_trainable(model, OptimConfig(trainable=pattern))
    assert frozen_depth(model) == depth


@pytest.mark.parametrize("shared", [True, False])
def test_replayed_blocks_give_the_same_states_and_gradients(
    model: PreTrainedModel, shared: bool
) -> None:
    choose_trainable(model, OptimConfig(trainable=r"model\.layers\.1\..*"))
    examples = tuple(
        Example(f"e{i}", "forget", (1, 2, *range(5, 8 + i)), (7, 9, 4)[: 1 + i % 3])
        for i in range(5)
    )
    streams = (Stream(examples, 5),)
    streams = share_contexts(streams) if shared else streams
    trunk = Trunk(model, 1, streams)
    batch = collate(streams[0].examples[::-1][:3])
    results = []
    for replay in (False, True):
        model.zero_grad()
        if replay:
            with trunk.replaying(batch):
                states = hidden_states(model, batch.tokens_BT, batch.prefix_P)
        else:
            states = hidden_states(model, batch.tokens_BT, batch.prefix_P)
        rows = states.flatten(0, 1)[batch.position_N]
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((rows.detach(), grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_kind_of_attention_reads_the_length_of_a_shared_prompt(depth: int) -> None:
    """Sliding and full blocks in turn, the window shorter than the prompt."""
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = tuple(
        Example(f"e{i}", "forget", (*range(3, 23), *range(30, 34 + 3 * i)), (7, 9, 4)[: 1 + i % 3])
        for i in range(4)
    )
    streams = share_contexts((Stream(examples, 4),))
    batch = collate(streams[0].examples)
    assert len(batch.prefix_P) > config.sliding_window
    with Trunk(model, depth, streams).replaying(batch):
        replayed = hidden_states(model, batch.tokens_BT, batch.prefix_P)
    own = hidden_states(model, batch.tokens_BT, batch.prefix_P)
    rows = [states.flatten(0, 1)[batch.position_N] for states in (replayed, own)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


def test_the_model_is_whole_again_after_a_replay(model: PreTrainedModel) -> None:
    choose_trainable(model, OptimConfig(trainable=r"model\.layers\.1\..*"))
    names = list(model.state_dict())
    streams = (Stream((Example("a", "forget", (1, 2, 3), (4,)),), 1),)
    trunk = Trunk(model, 1, streams)
    with trunk.replaying(collate(streams[0].examples)):
        hidden_states(model, torch.tensor([[1, 2, 3]]))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("weights", "depth", "response", "taken_over"),
    [
        ("taught", 1, (7, 9), True),
        ("retaught", 1, (7, 9), False),
        ("taught", 2, (7, 9), False),
        ("taught", 1, (7, 4), False),
    ],
)
def test_outputs_are_taken_over_by_a_training_of_the_same_weights_and_examples(
    model: PreTrainedModel, weights: str, depth: int, response: tuple[int, ...], taken_over: bool
) -> None:
    def streams(last: tuple[int, ...]) -> tuple[Stream, ...]:
        responses = [(7, 9), (4,), last]
        examples = (
            Example(f"e{i}", "forget", (1, 2, *range(5, 8 + i)), r) for i, r in enumerate(responses)
        )
        return share_contexts((Stream(tuple(examples), 3),))

    kept = FrozenOutputs()
    first = Trunk(model, 1, streams((7, 9)), kept, "taught")
    with torch.no_grad():  # so that only outputs that were taken over can be those of before
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = Trunk(model, depth, streams(response), kept, weights)
    assert (second.own is first.own) == taken_over
    last = streams(response)[0].examples[-1]
    fresh = Trunk(model, depth, streams(response)).own[last]
    assert torch.equal(second.own[last], fresh) != taken_over
