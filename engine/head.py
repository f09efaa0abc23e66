"""The head: the weight, and the rule by which hidden states become logits, read off the config.

Every loss takes its logits by this rule and not from the model, so a model that was loaded whole
is asked once whether it follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unteach.engine.errors import InputError

if TYPE_CHECKING:
    from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 5
LEAST_GAP = 1e-4  # float32 products may be summed in another order, or in TF32
ROUNDINGS = 4  # of a logit after its product: scale, quotient, tanh, soft cap


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: z = softcap·tanh((scale·h·w + bias)/softcap).

    Attributes:
        vocab: ids at or beyond it are padding rows of the head and never selected.
        softcap: Gemma-2's final soft cap, logits; None without.
        scale: factor of h·w (Cohere's logit_scale, 1/Granite's logits_scaling).
    """

    vocab: int
    softcap: float | None
    scale: float


def head_weight(model: PreTrainedModel) -> Tensor:
    """[V, D], the output embedding; the same tensor as the input embedding when tied."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output head.")
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """[V], or None where the head has none."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return bias


def head_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Head:
    """How this model's hidden states become logits."""
    text = model.config.get_text_config()
    return _rule(text, vocab=min(int(text.vocab_size), len(tokenizer)))


def _rule(text: Any, vocab: int) -> Head:
    """The rule of a text config; HyperCLOVA X multiplies by what Granite divides by."""
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    for factor in ("logit_scale", "lm_head_multiplier"):  # Cohere's, Falcon-H1's
        scale *= float(getattr(text, factor, None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    softcap = softcap or getattr(text, "logits_soft_cap", None)  # RecurrentGemma's
    return Head(vocab=vocab, softcap=float(softcap) if softcap else None, scale=scale)


@torch.no_grad()
def check_head(model: PreTrainedModel, body: nn.Module) -> None:
    """Compare the rule with the model's own logits of a few tokens, in one forward.

    Logits of NaN or inf pass: who reads them says what is damaged.

    Args:
        model: in evaluation mode, its weights whole and loaded.
        body: its backbone, whose output the model turns into logits.
    Raises:
        InputError: the logits come about otherwise.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output[0])

    weight_VD, bias_V = head_weight(model), head_bias(model)
    tokens_1T = torch.arange(PROBE_TOKENS, device=weight_VD.device)[None] % len(weight_VD)
    hook = body.register_forward_hook(keep)
    try:
        own_TV = model(input_ids=tokens_1T, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    rule = _rule(model.config.get_text_config(), len(weight_VD))
    # The product is rounded to the model's dtype, as the model's own is.
    rule_TV = rule.scale * linear(kept[-1][0], weight_VD).float() if kept else own_TV[:0]
    if bias_V is not None:
        rule_TV = rule_TV + bias_V.float()
    largest = rule_TV.nan_to_num(0, 0, 0).abs().amax() if kept else 0.0
    if rule.softcap is not None:
        rule_TV = rule.softcap * torch.tanh(rule_TV / rule.softcap)
    allowed = max(ROUNDINGS * torch.finfo(weight_VD.dtype).eps, LEAST_GAP) * largest
    if rule_TV.shape != own_TV.shape or bool(((rule_TV - own_TV).abs() > allowed).any()):
        raise InputError(
            f"A model of type {model.config.model_type} makes its logits otherwise than "
            "softcap·tanh((scale·h·w + bias)/softcap), so that every loss would be wrong: choose a "
            "model of another type."
        )
