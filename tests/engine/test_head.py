"""The rule from hidden states to logits against the models' own logits, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unteach.engine.config import ModelConfig
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.errors import InputError
from unteach.engine.head import Head, check_head
from unteach.engine.inference import greedy, share_prefix
from unteach.engine.model import (
    PreTrainedModel,
    backbone,
    blocks,
    empty_model,
    export_model,
    head_bias,
    head_of,
    head_weight,
    hidden_states,
    load_model,
    weight_files,
)
from unteach.kernels.linear_logprob import linear_logprob

TOKENIZER = byte_tokenizer()
SMALL: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
# model type, settings of its own → scale, soft cap
FAMILIES = [
    ("llama", {}, 1.0, None),
    ("gemma3_text", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, 1.0, 3.0),
    ("cohere", {"logit_scale": 0.25}, 0.25, None),
    ("granite", {"logits_scaling": 8.0}, 0.125, None),
    ("hyperclovax", {"logits_scaling": 0.125}, 0.125, None),
    ("falcon_h1", {"lm_head_multiplier": 0.05, **MAMBA}, 0.05, None),
    ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32}, 1.0, 2.0),
    ("phi", {}, 1.0, None),  # with a bias
]


def write(folder: Path, model_type: str, **settings: Any) -> str:
    """A random model of a family, as a Hugging Face folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def write_gemma3(folder: Path, **settings: Any) -> str:
    """A random Gemma 3 with a vision tower, whose language model has settings of its own."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28}
    text = {**SMALL, "query_pre_attn_scalar": 8, **settings}
    return write(folder, "gemma3", text_config=text, vision_config=vision)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "settings", "scale", "softcap"), FAMILIES)
def test_the_rule_gives_the_models_own_log_probabilities(
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    scale: float,
    softcap: float | None,
    dtype: Any,
) -> None:
    model = load_model(write(tmp_path, family, **settings), ModelConfig(dtype=dtype))
    head = head_of(model, TOKENIZER)
    assert head == Head(len(TOKENIZER), softcap, pytest.approx(scale))  # type: ignore[arg-type]
    tokens, labels = torch.randint(3, 96, (1, 9)), torch.randint(3, 96, (9,))
    with torch.no_grad():
        own = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(1)
        logp = linear_logprob(
            hidden_states(model, tokens)[0],
            head_weight(model),
            labels,
            bias_V=head_bias(model),
            softcap=head.softcap,
            scale=head.scale,
        )
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logp, own.gather(1, labels[:, None])[:, 0], **close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_another_rule_is_refused(tmp_path: Path, dtype: Any) -> None:
    """The Gemma 3 that sees takes no soft cap from its config, the one that reads does."""
    path = write_gemma3(tmp_path, final_logit_softcapping=3.0)
    with pytest.raises(InputError, match="of type gemma3 makes its logits otherwise"):
        load_model(path, ModelConfig(dtype=dtype))
    empty = empty_model(path, ModelConfig(dtype=dtype))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_check_draws_nothing_and_passes_damaged_weights(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, "granite", logits_scaling=8.0), ModelConfig())
    before = torch.get_rng_state()
    check_head(model, backbone(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert not backbone(model)._forward_hooks
    with torch.no_grad():
        head_weight(model)[0, 0] = float("nan")
        head_weight(model)[1, 0] = float("inf")
    check_head(model, backbone(model))


def answers(model: PreTrainedModel, contexts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of whole forwards."""
    found = []
    for context in contexts:
        line = list(context)
        for _ in range(6):
            line.append(int(model(input_ids=torch.tensor([line])).logits[0, -1].argmax()))
        found.append(line[len(context) :])
    return found


def test_the_language_model_beside_a_vision_tower_is_used_and_exported(tmp_path: Path) -> None:
    model = load_model(write_gemma3(tmp_path / "in"), ModelConfig())
    assert len(blocks(model)) == 3 and head_of(model, TOKENIZER) == Head(258, None, 1.0)
    contexts = [list(range(5, 5 + length)) for length in (30, 25, 40)]
    options = {"end": -1, "vocab": 258, "max_new_tokens": 6, "batch_size": 3}
    prefix = share_prefix(model, contexts)
    assert greedy(model, contexts, prefix=prefix, **options) == answers(model, contexts)
    first, second = (torch.randint(3, 96, (1, length)) for length in (9, 7))
    places = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = hidden_states(model, torch.cat([first, second], dim=1), place_BT=places)
    alone = torch.cat([hidden_states(model, first), hidden_states(model, second)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    export_model(model, TOKENIZER, model.state_dict(), tmp_path / "out")
    again = load_model(str(tmp_path / "out"), ModelConfig()).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    names = {
        name for name, _ in empty_model(str(tmp_path / "in"), ModelConfig()).named_parameters()
    }
    assert names <= weight_files(str(tmp_path / "out"), ModelConfig()).keys()


def test_a_model_without_a_cache_to_hand_out_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, "recurrent_gemma", logits_soft_cap=2.0, lru_width=32)
    model = load_model(path, ModelConfig())
    with pytest.raises(InputError, match="RecurrentGemmaModel hands out no KV cache"):
        share_prefix(model, [[5, 6, 7], [5, 6, 8]])
