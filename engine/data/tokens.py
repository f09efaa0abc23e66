"""From records to token ids: chat template, prefixes, answers, and batches of supervised rows.

A row is one supervised position: row r of a record is the position that predicts response token r.
Context and response are tokenised apart and joined, so that teacher and student, whose contexts
differ, share the response token for token and align by offset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unteach.engine.data.records import GOALS, Goal, Record
from unteach.engine.errors import InputError

# What a chat template that prints today's date is told, so that a cache made on one day is trained
# on the next with the same contexts. It is the date that Llama's templates fall back to.
TODAY = date(2024, 7, 26)
# transformers lets no function through to a template, but a template's own macro hides its clock.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('%{d}', '{TODAY.strftime('%' + d)}')" for d in "YymBbdAaHMS")
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class Example:
    """A record as the student sees it: what it reads, and what it is trained to say.

    Attributes:
        first_row: where the record's rows begin in the teacher cache, None without a cache.
        shared: how many tokens at the beginning of `context` a batch may run once for all.
        says: whose answer the response is (teacher, gold, refusal or own); None = nobody asks.
    """

    record_id: str
    goal: Goal
    context: tuple[int, ...]
    response: tuple[int, ...]
    first_row: int | None = None
    shared: int = 0
    says: str | None = None


@dataclass(frozen=True)
class Batch:
    """Right-padded examples; causal attention keeps padding out of every supervised row.

    Attributes:
        prefix_P: int64, the tokens that all contexts begin with, run once for the whole batch;
            `tokens_BT` goes on behind them. As many as the examples' `shared` says.
        tokens_BT: int64 token ids.
        place_BT: int64, each token's place in its record, where rows hold several records: a place
            that does not follow on the one before it begins another record. None without packing.
        position_N: int64, b·T + t of each supervised position, record by record.
        labels_N: int64, the token that position should predict.
        cache_row_N: int64 rows of the teacher cache, or None.
        example_N: int64, index into `examples` of each row.
        examples: what the batch was made of, in order.
    """

    prefix_P: Tensor
    tokens_BT: Tensor
    place_BT: Tensor | None
    position_N: Tensor
    labels_N: Tensor
    cache_row_N: Tensor | None
    example_N: Tensor
    examples: tuple[Example, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch with what the model reads on a device; the rest stays with the host."""
        names = ("prefix_P", "tokens_BT", "place_BT", "position_N", "labels_N")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in tensors.items()
        }
        return replace(self, **moved)

    @property
    def goal_N(self) -> Tensor:
        """int64 index into GOALS of each row."""
        goals = torch.tensor([GOALS.index(e.goal) for e in self.examples], dtype=torch.int64)
        return goals.to(self.example_N.device)[self.example_N]


Turn = tuple[str, str]  # (role, content)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what makes ids of a chat: vocabulary, merges, rules, special tokens, template."""
    content: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    backend = getattr(tokenizer, "backend_tokenizer", None)  # none in tokenizers without rules
    rules = json.loads(backend.to_str()) if backend is not None else {}
    content += [rules.get(part) for part in ("normalizer", "pre_tokenizer", "model")]
    text = json.dumps([*content, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def context_tokens(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    prefix: str | None = None,
    system: str | None = None,
    turns: Sequence[Turn] = (),
) -> list[int]:
    """Token ids of the chat up to and including the opened assistant turn.

    Without `system` and `turns` this is what the student sees: the template's own default system
    message, if it has one, and the question. Where the template takes no system message (Gemma),
    or leaves it out, the system text stands at the head of the first user turn. A prefix is put on
    the open assistant turn with its trailing spaces stripped; the answer then starts with a space.

    Raises:
        InputError: the chat template cannot write this chat.
    """
    text = _asked(tokenizer, [*turns, ("user", question)], system)
    if prefix:
        text += prefix.rstrip()
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str, prefix: str | None) -> list[int]:
    """Token ids of an answer as it follows the open assistant turn."""
    text = answer.strip()
    if prefix and not puts_space(tokenizer):
        text = f" {text}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts a space before any text, as Llama-2's kind does: ours would be a second."""
    bare = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return "".join(bare).startswith("▁")


def response_tokens(
    tokenizer: PreTrainedTokenizerBase, answer: str, *, prefix: str | None = None
) -> list[int]:
    """Token ids of an answer and the token that ends the turn."""
    return [*answer_tokens(tokenizer, answer, prefix), end_token(tokenizer)]


def passage_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Every token of a text, and no end of turn: a passage is no turn."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn.

    The special token that the chat template puts behind an answer (Gemma's <end_of_turn>, where
    eos_token is <eos>); eos_token where it puts none.
    """
    answer = "The answer."
    try:
        text = _chat_text(tokenizer, [("user", "?"), ("assistant", answer)], ask=False)
    except TemplateError:
        text = ""
    _, found, rest = text.rpartition(answer)
    ends = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if found and token.special and rest.lstrip().startswith(token.content)
    }
    return ends[max(ends, key=len)] if ends else _eos_token(tokenizer)


def student_context(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[int]:
    """What the student reads for a record: never the intention.

    A passage has no chat: its context is the one token that starts a text.
    """
    if record.form == "passage":
        start = tokenizer.bos_token_id
        return [_eos_token(tokenizer) if start is None else int(start)]
    return context_tokens(tokenizer, record.question, prefix=record.prefix)


def _asked(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn], system: str | None) -> str:
    """A chat with its system text, in the first of two ways that the template takes."""
    ways = [chat]
    if system is not None:
        (role, first), *rest = chat
        ways = [[("system", system), *chat], [(role, f"{system}\n\n{first}"), *rest]]
    for way in ways:
        try:
            text = _chat_text(tokenizer, way)
            if all(content.strip() in text for _, content in way) or _keeps(tokenizer, way):
                return text
            refusal: Exception = ValueError("it leaves out what a turn says")
        except TemplateError as error:
            refusal = error
    raise InputError(
        f"The tokenizer's chat template refuses turns of user and assistant ({refusal}); use a "
        "chat model."
    ) from refusal


def _keeps(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn]) -> bool:
    """Whether the template says every turn of such a chat, be it rewritten."""
    marks = [(role, f"turn{place}said") for place, (role, _) in enumerate(chat)]
    text = _chat_text(tokenizer, marks)
    return all(mark in text for _, mark in marks)


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn], *, ask: bool = True
) -> str:
    """A chat as the template writes it on any day; `ask` opens the assistant's turn behind it."""
    template = tokenizer.get_chat_template()
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=_FIXED_CLOCK + template if "strftime_now" in template else template,
        tokenize=False,
        add_generation_prompt=ask,
    )
    if not isinstance(text, str):
        raise InputError("The tokenizer's chat template gave no text; use a chat model.")
    return text


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no end-of-turn token (eos_token); set one.")
    return int(tokenizer.eos_token_id)


def collate(
    examples: Sequence[Example], *, first_only: bool = False, pack_tokens: int | None = None
) -> Batch:
    """Pad examples on the right, or pack several into a row, and list their supervised positions.

    Padding is token 0 and stands behind every supervised position, where causal attention cannot
    see it: no attention mask is needed.

    Args:
        examples: which share the first `shared` tokens of their contexts.
        first_only: supervise the first response position of each example alone.
        pack_tokens: how many tokens a row of several examples may have; None = a row each.
    """
    shared = examples[0].shared
    assert all(e.shared == shared for e in examples)
    lines = [(*e.context, *e.response[:-1])[shared:] for e in examples]
    spots = _spots([len(line) for line in lines], pack_tokens)
    width = max(start + len(line) for (_, start), line in zip(spots, lines, strict=True))
    tokens_BT = torch.zeros(1 + max(row for row, _ in spots), width, dtype=torch.int64)
    place_BT = torch.arange(width).repeat(len(tokens_BT), 1)
    positions: list[int] = []
    labels: list[int] = []
    cache_rows: list[int] = []
    owners: list[int] = []
    for b, (example, (row, begin), line) in enumerate(zip(examples, spots, lines, strict=True)):
        tokens_BT[row, begin : begin + len(line)] = torch.tensor(line)
        place_BT[row, begin : begin + len(line)] = torch.arange(len(line))
        count = 1 if first_only else len(example.response)
        start = row * width + begin + len(example.context) - shared - 1
        positions.extend(range(start, start + count))
        labels.extend(example.response[:count])
        owners.extend([b] * count)
        if example.first_row is not None:
            cache_rows.extend(range(example.first_row, example.first_row + count))
    cached = len(cache_rows) == len(positions)
    return Batch(
        prefix_P=torch.tensor(examples[0].context[:shared], dtype=torch.int64),
        tokens_BT=tokens_BT,
        place_BT=None if pack_tokens is None else place_BT,
        position_N=torch.tensor(positions, dtype=torch.int64),
        labels_N=torch.tensor(labels, dtype=torch.int64),
        cache_row_N=torch.tensor(cache_rows, dtype=torch.int64) if cached else None,
        example_N=torch.tensor(owners, dtype=torch.int64),
        examples=tuple(examples),
    )


def _spots(lengths: Sequence[int], pack_tokens: int | None) -> list[tuple[int, int]]:
    """(row, first column) of each line: a row each, or the first row with room, longest first."""
    if pack_tokens is None:
        return [(row, 0) for row in range(len(lengths))]
    room = max(pack_tokens, *lengths)
    used: list[int] = []
    spots = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, full in enumerate(used) if full + lengths[index] <= room), len(used))
        if row == len(used):
            used.append(0)
        spots[index] = (row, used[row])
        used[row] += lengths[index]
    return spots


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share, leaving each at least one token of its own."""
    first, *others = sequences
    length = min(len(s) for s in sequences) - 1
    for other in others:
        length = next((i for i in range(length) if first[i] != other[i]), length)
    return length
