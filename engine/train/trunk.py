"""Frozen lower blocks run once a record: every later epoch starts in the middle of the model.

Below the lowest trainable parameter nothing changes, so its outputs are kept: D values for each
token of each example, in memory. With the upper half trainable this saves a quarter of a step's
FLOPs. The outputs are made in fixed batches, so that a resumed run reads the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unteach.engine.data.sampler import Stream
from unteach.engine.data.tokens import Batch, Example, collate
from unteach.engine.model import PreTrainedModel, blocks, hidden_states
from unteach.engine.progress import progress

BATCH = 32


def frozen_depth(model: PreTrainedModel) -> int:
    """How many of the lowest blocks nothing trainable stands in or below."""
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    layers = blocks(model)
    trains = [any(p.requires_grad for p in block.parameters()) for block in layers]
    return trains.index(True) if True in trains else len(layers)


@dataclass
class FrozenOutputs:
    """What the frozen blocks of one training returned, for the next one that asks for the same.

    Attributes:
        made_by: the weights, the depth and the examples, in order, that these are of.
        own: for each example, its own tokens' outputs [T, D].
        prompts: for each shared prompt, its outputs [P, D].
    """

    made_by: object = None
    own: dict[Example, Tensor] = field(default_factory=dict)
    prompts: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class Trunk:
    """Outputs of the `depth` lowest blocks for every example of a run; shared prompts once.

    Args:
        kept: holds the outputs of an earlier training, and those of this one afterwards.
        weights: names the weights of the frozen blocks among all that `kept` may have met.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        depth: int,
        streams: Sequence[Stream],
        kept: FrozenOutputs | None = None,
        weights: object = None,
    ) -> None:
        self.model, self.depth = model, depth
        kept = FrozenOutputs() if kept is None else kept
        examples = sorted(
            {e for stream in streams for e in stream.examples},
            key=lambda e: (len(e.context) + len(e.response), e.record_id, e.response),
        )
        made_by = (weights, depth, examples)
        if kept.made_by == made_by:
            self.own, self.prompts = kept.own, kept.prompts
            return
        kept.made_by, kept.own, kept.prompts = None, {}, {}
        self.own, self.prompts = kept.own, kept.prompts
        self._capture_all(examples)
        kept.made_by = made_by

    def _capture_all(self, examples: Sequence[Example]) -> None:
        groups: dict[tuple[int, ...], list[Example]] = {}
        for example in examples:
            groups.setdefault(example.context[: example.shared], []).append(example)
        total = sum(len(group) for group in groups.values())
        with progress("frozen blocks", total) as advance:
            for prompt, group in groups.items():
                for first in range(0, len(group), BATCH):
                    self._capture(prompt, group[first : first + BATCH])
                    advance(len(group[first : first + BATCH]))

    @torch.no_grad()
    def _capture(self, prompt: tuple[int, ...], examples: Sequence[Example]) -> None:
        layers = blocks(self.model)
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept.append(output)

        hook = layers[self.depth - 1].register_forward_hook(keep)
        upper = list(range(self.depth, len(layers)))
        device = self.model.device
        batch = collate(examples)
        try:
            with replaced(layers, {index: Skip(index) for index in upper}):
                hidden_states(self.model, batch.tokens_BT.to(device), batch.prefix_P.to(device))
        finally:
            hook.remove()
        if prompt:
            self.prompts[prompt] = kept[0][0]
        for b, example in enumerate(examples):
            length = len(example.context) + len(example.response) - 1 - example.shared
            self.own[example] = kept[-1][b, :length].clone()

    @contextmanager
    def replaying(self, batch: Batch) -> Iterator[None]:
        """The frozen blocks return what they returned before; the upper ones run on it."""
        own = [self.own[example] for example in batch.examples]
        own_BTD = nn.utils.rnn.pad_sequence(own, batch_first=True)
        outputs = [own_BTD]
        if len(batch.prefix_P):
            outputs.insert(0, self.prompts[tuple(batch.prefix_P.tolist())][None])
        stand_ins: dict[int, nn.Module] = {index: Skip(index) for index in range(1, self.depth)}
        with replaced(blocks(self.model), {0: Replay(outputs), **stand_ins}):
            yield


class Skip(nn.Module):
    """A block that does nothing, but for keys and values without content in the KV cache.

    The length of the past is read off the first block of each kind of attention.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        """The input; the KV cache has either name, as transformers calls it."""
        past = past_key_values if cache is None else cache
        if past is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past.update(empty, empty, self.index)
        return hidden_states


class Replay(Skip):
    """A lowest block that returns kept outputs, one a call."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__(0)
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """The next kept output; the input only has its shape."""
        super().forward(hidden_states, *args, **options)
        output = self.outputs.pop(0)
        assert output.shape == hidden_states.shape
        return output


@contextmanager
def replaced(layers: nn.ModuleList, stand_ins: dict[int, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some blocks, for one forward."""
    before = {index: layers[index] for index in stand_ins}
    for index, module in stand_ins.items():
        layers[index] = module
    try:
        yield
    finally:
        for index, module in before.items():
            layers[index] = module
