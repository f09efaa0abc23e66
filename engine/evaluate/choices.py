"""Multiple choice by log-probability: options as texts in the assistant turn, MMLU as letters.

Both read label log-probabilities from hidden states through the fused kernel; what several
sequences share (a question's context, a subject's shots) is computed once and its KV reused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unteach.engine.data.records import Record, encodable
from unteach.engine.data.tokens import puts_space
from unteach.engine.errors import InputError, reason
from unteach.engine.evaluate.generate import decoded
from unteach.engine.evaluate.told import NOTHING, Told
from unteach.engine.inference import SharedPrefix, Tokens, batch_hidden, share_prefix
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    head_bias,
    head_of,
    head_weight,
)
from unteach.engine.progress import Advance
from unteach.kernels.linear_logprob import linear_logprob

LETTERS = "ABCD"
SHOTS = 5
OPTION = "{option}"


@dataclass(frozen=True)
class Choice:
    """Log-probability, in nats a token, of every option; the first of the largest is picked."""

    prompt: str
    logps: tuple[float, ...]

    @property
    def picked(self) -> int:
        return self.logps.index(max(self.logps))


@dataclass(frozen=True)
class OptionTokens:
    """A context that all options share, and the tokens of each."""

    context: Tokens
    options: tuple[Tokens, ...]


def option_tokens(
    tokenizer: PreTrainedTokenizerBase, record: Record, sentence: str, told: Told = NOTHING
) -> OptionTokens:
    """A record's options set into the sentence, after its question.

    What the sentence says before the option belongs to the context, like a prefix: its trailing
    space goes over to the option. The option and what follows it are scored.
    """
    assert record.options is not None
    before, _, after = sentence.partition(OPTION)
    lead = _filled(before, record.question, "")
    if record.prefix and record.prefix.strip():
        lead = f"{record.prefix.rstrip()} {lead}"
    context = told.context(tokenizer, record, lead.rstrip() or None)
    space = lead[len(lead.rstrip()) :]
    if puts_space(tokenizer):
        space = space.removesuffix(" ")
    texts = [
        f"{space}{option.strip()}{_filled(after, record.question, option)}"
        for option in record.options
    ]
    options = tuple(list(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    return OptionTokens(context, options)


@torch.no_grad()
def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    sentence: str,
    advance: Advance | None = None,
    told: Told = NOTHING,
) -> list[Choice]:
    """Length-normalised log-probability of every option; a context is computed once a question."""
    choices = []
    for record in records:
        sets = option_tokens(tokenizer, record, sentence, told)
        # All but the context's last token, whose hidden state predicts an option's first.
        prefix = share_prefix(model, [sets.context])
        start = len(sets.context) - 1 - (prefix.length if prefix else 0)
        hidden = batch_hidden(model, [sets.context + o for o in sets.options], prefix)
        rows = [
            h[start : start + len(option)] for h, option in zip(hidden, sets.options, strict=True)
        ]
        logps = label_logps(model, tokenizer, rows, sets.options)
        means = tuple(math.fsum(values) / len(values) for values in logps)
        _check_finite(means, record.id)
        choices.append(Choice(decoded(tokenizer, sets.context), means))
        if advance:
            advance(1)
    return choices


def label_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tensor],
    labels: Sequence[Tokens],
) -> list[list[float]]:
    """Log-probability of each label at its hidden state, list by list."""
    head = head_of(model, tokenizer)
    flat = [label for group in labels for label in group]
    logp_N = linear_logprob(
        torch.cat(list(rows)),
        head_weight(model),
        torch.tensor(flat, dtype=torch.int64, device=model.device),
        bias_V=head_bias(model),
        softcap=head.softcap,
        scale=head.scale,
    )
    values = iter(logp_N.tolist())
    return [[next(values) for _ in group] for group in labels]


def read_mmlu(path: Path) -> list[dict[str, Any]]:
    """MMLU rows from JSON lines: `subject`, `question`, `choices`, `answer`, `split`.

    Rows of split `dev` are shots, the first five of a subject in file order; `test` are scored.

    Raises:
        InputError: names file, line and field, or a subject without shots.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"MMLU file {path} cannot be read: {reason(error)}.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: no whole JSON object ({error}).") from error
        fault = mmlu_fault(row)
        if fault:
            raise InputError(f"{path}, line {number}, field {fault}.")
        rows.append(row)
    check_mmlu(rows)
    return rows


def mmlu_fault(row: Any) -> str | None:
    """What is wrong with one row, or None."""
    if not isinstance(row, dict):
        return "(none): an MMLU row is a JSON object"
    for name in ("subject", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name}: must be a text that is not empty"
    choices = row.get("choices")
    if not isinstance(choices, list) or [type(c) for c in choices] != [str] * len(LETTERS):
        return f"choices: must be a list of {len(LETTERS)} texts"
    if type(row.get("answer")) is not int or not 0 <= row["answer"] < len(LETTERS):
        return f"answer: must be an index from 0 to {len(LETTERS) - 1}"
    if not encodable(row):
        return "(some): holds half a surrogate pair, which no tokenizer reads"
    if row.get("split") not in ("dev", "test"):
        return "split: must be `dev` (a shot) or `test`"
    return None


def check_mmlu(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that are malformed, without test rows, or of a subject without shots."""
    for index, row in enumerate(rows):
        fault = mmlu_fault(row)
        if fault:
            raise InputError(f"MMLU row {index + 1}, field {fault}.")
    tested = {row["subject"] for row in rows if row["split"] == "test"}
    bare = sorted(tested - {row["subject"] for row in rows if row["split"] == "dev"})
    if not tested:
        raise InputError("The MMLU rows hold no row of split `test`: add some or unset data.mmlu.")
    if bare:
        raise InputError(f"MMLU subject {bare[0]} has no row of split `dev` to show as a shot.")


def mmlu_prompt(row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> str:
    """Header, answered shots and the open question, as plain text without a chat template."""
    subject = str(row["subject"]).replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    answered = [f"{_question(shot)} {LETTERS[shot['answer']]}\n\n" for shot in shots]
    return header + "".join(answered) + _question(row)


@torch.no_grad()
def score_mmlu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    *,
    share: bool = True,
    advance: Advance | None = None,
    told: Told = NOTHING,
) -> list[Choice]:
    """Letter log-probabilities of every test row, in order.

    Args:
        share: compute a subject's header and shots once; without it every prompt is run whole.
    """
    shots: dict[str, list[Mapping[str, Any]]] = {}
    tests: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if row["split"] == "test":
            tests.setdefault(row["subject"], []).append(index)
        elif len(shots.setdefault(row["subject"], [])) < SHOTS:
            shots[row["subject"]].append(row)
    letters = [
        tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS
    ]
    choices: dict[int, Choice] = {}
    for subject, indices in tests.items():
        texts = [told.preface() + mmlu_prompt(rows[index], shots[subject]) for index in indices]
        # The tokenizer's own start token, if it has one, belongs to a plain text.
        prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
        prefix = share_prefix(model, prompts) if share else None
        for first in range(0, len(indices), batch_size):
            batch = slice(first, first + batch_size)
            logps = _letter_logps(model, tokenizer, prompts[batch], prefix, letters)
            for index, text, values in zip(indices[batch], texts[batch], logps, strict=True):
                _check_finite(values, f"MMLU row {index + 1}")
                choices[index] = Choice(text, tuple(values))
            if advance:
                advance(len(logps))
    return [choices[index] for index in sorted(choices)]


def _letter_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    prefix: SharedPrefix | None,
    letters: Tokens,
) -> list[list[float]]:
    hidden = batch_hidden(model, prompts, prefix)
    rows = [h[-1:].expand(len(letters), -1) for h in hidden]
    return label_logps(model, tokenizer, rows, [letters] * len(rows))


def _filled(text: str, question: str, option: str) -> str:
    """Both names filled in at once: a question that holds `{option}` stays as it is."""
    values = {"{question}": question.strip(), OPTION: option.strip()}
    return re.sub(r"\{(?:question|option)\}", lambda match: values[match[0]], text)


def _question(row: Mapping[str, Any]) -> str:
    pairs = zip(LETTERS, row["choices"], strict=True)
    lines = [f"{letter}. {choice}" for letter, choice in pairs]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _check_finite(logps: Sequence[float], where: str) -> None:
    if not all(math.isfinite(value) for value in logps):
        raise InputError(
            f"The model's log-probabilities for {where} are NaN or inf: its weights are damaged; "
            "evaluate an earlier checkpoint or lower optim.lr."
        )
