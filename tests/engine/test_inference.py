from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
)

from unteach.engine.config import ModelConfig
from unteach.engine.data.tokens import common_length
from unteach.engine.errors import InputError
from unteach.engine.inference import batch_hidden, greedy, share_prefix
from unteach.engine.model import PreTrainedModel, hidden_states, load_model, tiny_model

SHARED = [7, 3, 9, 40, 41, 42]
CONTEXTS = [SHARED + list(range(20, 20 + own)) + [100 + own] for own in (1, 9, 2, 14, 5, 5, 0, 7)]
NO_END = 10_000
VOCAB = 258


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("model")
    loaded = load_model(str(tiny_model(folder / "tiny", tied=False)), ModelConfig())
    with torch.no_grad():
        for weight in loaded.parameters():
            if weight.dim() == 2:
                weight.mul_(4)  # random weights of the usual size would repeat one token
    return loaded


@torch.no_grad()
def one_by_one(model: PreTrainedModel, context: list[int], end: int, length: int) -> list[int]:
    """Greedy from whole forwards of the public model: no cache, no padding, no batch."""
    tokens = list(context)
    for _ in range(length):
        token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(context) :]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_equals_one_by_one(model: PreTrainedModel, shared: bool, batch_size: int) -> None:
    prefix = share_prefix(model, CONTEXTS) if shared else None
    assert prefix is None or prefix.length == len(SHARED)
    answers = greedy(
        model,
        CONTEXTS,
        end=NO_END,
        vocab=VOCAB,
        max_new_tokens=12,
        batch_size=batch_size,
        prefix=prefix,
    )
    assert answers == [one_by_one(model, context, NO_END, 12) for context in CONTEXTS]
    assert len({tuple(answer) for answer in answers}) > 4, "the contexts must tell answers apart"


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_end_leave_the_batch_without_touching_the_others(
    model: PreTrainedModel, shared: bool
) -> None:
    whole = [one_by_one(model, context, NO_END, 12) for context in CONTEXTS]
    # An end token that some answers meet soon, some late, and some never.
    end = max(range(258), key=lambda t: len({a.index(t) if t in a else -1 for a in whole}))
    expected = [a[: a.index(end)] if end in a else a for a in whole]
    assert len({len(answer) for answer in expected}) >= 3
    prefix = share_prefix(model, CONTEXTS) if shared else None
    answers = greedy(
        model, CONTEXTS, end=end, vocab=VOCAB, max_new_tokens=12, batch_size=8, prefix=prefix
    )
    assert answers == expected


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=10),
        Gemma3TextConfig(**SMALL, sliding_window=10, query_pre_attn_scalar=8),
    ],
    ids=["mistral", "gemma3"],
)
def test_padding_takes_no_place_in_a_window(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.5 if "layers" in name else 0.02)
    prefix = share_prefix(model, CONTEXTS)
    assert prefix is not None
    answers = greedy(
        model, CONTEXTS, end=NO_END, vocab=VOCAB, max_new_tokens=8, batch_size=8, prefix=prefix
    )
    assert answers == [one_by_one(model, context, NO_END, 8) for context in CONTEXTS]
    assert len({tuple(answer) for answer in answers}) > 4, "the contexts must tell answers apart"


def test_padding_rows_of_the_head_are_never_chosen(model: PreTrainedModel) -> None:
    options = {"end": NO_END, "max_new_tokens": 6, "batch_size": 8}
    whole = greedy(model, CONTEXTS, vocab=VOCAB, **options)
    vocab = max(token for answer in whole for token in answer)
    answers = greedy(model, CONTEXTS, vocab=vocab, **options)
    assert answers != whole and max(token for answer in answers for token in answer) < vocab


def test_greedy_reports_progress_and_takes_no_contexts(model: PreTrainedModel) -> None:
    done: list[int] = []

    def advance(count: int, note: str = "") -> None:
        done.append(count)

    greedy(
        model, CONTEXTS, end=NO_END, vocab=VOCAB, max_new_tokens=1, batch_size=3, advance=advance
    )
    assert done == [3, 3, 2]
    assert greedy(model, [], end=NO_END, vocab=VOCAB, max_new_tokens=1, batch_size=3) == []


def test_hidden_states_with_a_shared_prefix_equal_whole_forwards(model: PreTrainedModel) -> None:
    prefix = share_prefix(model, CONTEXTS)
    assert prefix is not None
    for _ in range(2):  # a shared cache that was written to would give itself away the second time
        for context, own in zip(CONTEXTS, batch_hidden(model, CONTEXTS, prefix), strict=True):
            whole_TD = hidden_states(model, torch.tensor([context]))[0]
            torch.testing.assert_close(own, whole_TD[len(SHARED) :], rtol=1e-4, atol=1e-4)


def test_common_length_leaves_every_sequence_a_token() -> None:
    assert common_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_length([[1, 2, 3], [1, 2]]) == 1
    assert common_length([[1, 2, 3]]) == 2
    assert common_length([[1], [1]]) == 0
    assert common_length([[1, 2], [3, 4]]) == 0


def test_nothing_shared_gives_no_prefix(model: PreTrainedModel) -> None:
    assert share_prefix(model, [[1, 2], [3, 4]]) is None


def test_damaged_weights_give_no_answers(tmp_path: Path) -> None:
    broken = load_model(str(tiny_model(tmp_path / "tiny", tied=False)), ModelConfig())
    with torch.no_grad():
        broken.get_output_embeddings().weight[0, 0] = float("nan")
    asked = {"end": NO_END, "vocab": VOCAB, "max_new_tokens": 2, "batch_size": 2}
    with pytest.raises(InputError, match="logits are NaN or inf: its weights are damaged"):
        greedy(broken, CONTEXTS, **asked)
