"""Records that share a row know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unteach.engine.config import ModelConfig, ParallelConfig
from unteach.engine.data.tokens import Example, collate
from unteach.engine.model import PreTrainedModel, hidden_states, load_model, tiny_model
from unteach.engine.train.parallel import World, shard_model

EXAMPLES = [
    Example("a", "forget", tuple(range(3, 14)), (20, 21, 22), 0),
    Example("b", "general", (40, 41, 42), (43,), 3),
    Example("c", "attack", tuple(range(60, 90)), (91, 92), 4),
    Example("d", "neighbor", (5, 6), (7, 8, 9, 10), 6),
]


@pytest.fixture(scope="module", params=["off", "full"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedModel:
    path = tiny_model(tmp_path_factory.mktemp("m") / "tiny", tied=False)
    model = load_model(str(path), ModelConfig())
    alone = World(0, 1, torch.device("cpu"), None)
    shard_model(model, ParallelConfig(checkpointing=request.param), alone)
    return model.train()


def rows(model: PreTrainedModel, examples: list[Example], pack_tokens: int | None) -> Tensor:
    batch = collate(examples, pack_tokens=pack_tokens)
    hidden_BTD = hidden_states(model, batch.tokens_BT, place_BT=batch.place_BT)
    return hidden_BTD.flatten(0, 1)[batch.position_N]


@pytest.mark.parametrize("pack_tokens", [1, 36, 200])
def test_packed_rows_are_those_of_each_record_alone(
    model: PreTrainedModel, pack_tokens: int
) -> None:
    alone = torch.cat([rows(model, [example], None) for example in EXAMPLES])
    torch.testing.assert_close(rows(model, EXAMPLES, pack_tokens), alone, rtol=1e-4, atol=1e-5)


def test_nothing_leaks_forward_or_backward(model: PreTrainedModel) -> None:
    other = Example("a", "forget", tuple(range(103, 114)), (20, 21, 22), 0)
    before = rows(model, EXAMPLES, 200)[3:]
    after = rows(model, [other, *EXAMPLES[1:]], 200)[3:]
    assert torch.equal(before, after)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    (gradient,) = torch.autograd.grad(rows(model, EXAMPLES, 200)[3:].sum(), embedding)
    of_a, of_c = gradient[11:14].abs().sum(), gradient[60:90].abs().sum()
    assert float(of_a) == 0 and float(of_c) > 0


def test_rows_are_filled_and_every_label_follows_its_position() -> None:
    batch = collate(EXAMPLES, pack_tokens=40)
    assert batch.tokens_BT.shape == (2, 39)  # c, d, b: 31 + 5 + 3; a: 13
    assert batch.place_BT is not None
    flat, places = batch.tokens_BT.flatten(), batch.place_BT.flatten()
    for n, (position, owner) in enumerate(
        zip(batch.position_N.tolist(), batch.example_N.tolist(), strict=True)
    ):
        example = EXAMPLES[owner]
        line = (*example.context, *example.response)
        place = int(places[position])
        assert line[place] == flat[position] and line[place + 1] == batch.labels_N[n]
    plain = collate(EXAMPLES)
    assert plain.place_BT is None and plain.tokens_BT.shape == (4, 31)
    assert plain.cache_row_N is not None and batch.cache_row_N is not None
    assert torch.equal(plain.cache_row_N, batch.cache_row_N)
