"""Forward passes without gradients: hidden states and greedy answers, with a shared prompt prefix
computed once and its keys and values reused by every batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unteach.engine.backbone_pass import backbone_pass
from unteach.engine.data.tokens import common_length
from unteach.engine.errors import InputError
from unteach.engine.model import PreTrainedModel, backbone, head_bias, head_weight
from unteach.engine.progress import Advance

Tokens = list[int]


@dataclass(frozen=True)
class SharedPrefix:
    """The first `length` tokens of every sequence, as keys and values of batch size 1."""

    length: int
    past: Any

    def expanded(self, batch: int) -> Any:
        """A fresh KV cache for `batch` rows; the shared one is never written to."""
        past = copy.deepcopy(self.past)
        past.batch_repeat_interleave(batch)
        return past


@torch.no_grad()
def share_prefix(model: PreTrainedModel, sequences: Sequence[Tokens]) -> SharedPrefix | None:
    """Run the common beginning of all sequences once; None when they share nothing."""
    length = common_length(sequences)
    if length == 0:
        return None
    tokens = torch.tensor([sequences[0][:length]], device=model.device)
    _, past = backbone_pass(backbone(model), input_ids=tokens, use_cache=True)
    return SharedPrefix(length, past)


@torch.no_grad()
def batch_hidden(
    model: PreTrainedModel, sequences: Sequence[Tokens], prefix: SharedPrefix | None = None
) -> list[Tensor]:
    """Hidden states [T, D] after the final norm of each whole sequence's own tokens, one batch.

    With a prefix, the states of the shared tokens are not computed again and not returned: entry t
    of a result belongs to token prefix.length + t.
    """
    start = prefix.length if prefix else 0
    own = [s[start:] for s in sequences]
    width = max(len(s) for s in own)
    tokens_BT = torch.tensor([s + [0] * (width - len(s)) for s in own], device=model.device)
    past = prefix.expanded(len(own)) if prefix else None
    hidden_BTD, _ = backbone_pass(
        backbone(model), past, input_ids=tokens_BT, use_cache=past is not None
    )
    return [hidden_BTD[b, : len(s)] for b, s in enumerate(own)]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    contexts: Sequence[Tokens],
    *,
    end: int,
    vocab: int,
    max_new_tokens: int,
    batch_size: int,
    prefix: SharedPrefix | None = None,
    advance: Advance | None = None,
) -> list[list[int]]:
    """Greedy answers, `end` token excluded, in the order of `contexts`.

    Batches are made of contexts of like length, the same ones whatever else is asked, so that the
    answers do not depend on what they are scored with. `advance` is told how many are done.

    Args:
        vocab: ids at or beyond it are padding rows of the head and never chosen.
    """
    if _forgets_within(model, max(map(len, contexts), default=0) + max_new_tokens):
        # The padding between a shared prefix and a row's own tokens would fill a part of the row's
        # window, which transformers counts in cache slots. In front of a whole context it does not.
        prefix = None
    order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), contexts[i]))
    answers: list[list[int]] = [[] for _ in contexts]
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        own = [contexts[i] for i in chosen]
        batch = _greedy_batch(model, own, end, vocab, max_new_tokens, prefix)
        for index, answer in zip(chosen, batch, strict=True):
            answers[index] = answer
        if advance:
            advance(len(chosen))
    return answers


def _forgets_within(model: PreTrainedModel, length: int) -> bool:
    """Whether some layer sees less than the last `length` tokens."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is not None and window < length


def _check_finite(logits: Tensor) -> None:
    """Refuse a broken model: what it says is no answer, and would pass for one forgotten."""
    if bool((logits.isnan() | (logits == torch.inf)).any()):  # -inf is a bias that bans an id
        raise InputError(
            "The model's logits are NaN or inf: its weights are damaged; evaluate an earlier "
            "checkpoint or lower optim.lr."
        )


def _greedy_batch(
    model: PreTrainedModel,
    contexts: Sequence[Tokens],
    end: int,
    vocab: int,
    max_new_tokens: int,
    prefix: SharedPrefix | None,
) -> list[list[int]]:
    start = prefix.length if prefix else 0
    own = [c[start:] for c in contexts]
    width = max(len(c) for c in own)
    device = model.device
    tokens = torch.tensor([[0] * (width - len(c)) + c for c in own], device=device)
    pads = torch.tensor([width - len(c) for c in own], device=device)
    mask = torch.ones(len(own), start + width, dtype=torch.int64, device=device)
    columns = torch.arange(width, device=device)
    mask[:, start:] = (columns[None] >= pads[:, None]).long()
    positions = (start + columns[None] - pads[:, None]).clamp_min(0)
    past = prefix.expanded(len(own)) if prefix else None
    body, head, bias = backbone(model), head_weight(model), head_bias(model)
    rows = torch.arange(len(own), device=device)  # the unfinished ones; others leave the batch
    answers = torch.full((len(own), max_new_tokens), end, dtype=torch.int64, device=device)
    for step in range(max_new_tokens):
        hidden_BTD, past = backbone_pass(
            body,
            past,
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
        )
        # Scale and soft cap are monotone: they cannot move the argmax.
        logits = torch.nn.functional.linear(hidden_BTD[:, -1], head, bias)
        if step == 0:
            _check_finite(logits[:, :vocab])
        token = logits[:, :vocab].argmax(-1)
        answers[rows, step] = token
        going = (token != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):
            past.batch_select_indices(going)
            rows, token, mask, positions = rows[going], token[going], mask[going], positions[going]
        tokens = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [row[: row.index(end)] if end in row else row for row in answers.tolist()]
