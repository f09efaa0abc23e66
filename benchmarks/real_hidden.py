"""Real hidden states to measure on: the embedded model reads questions, plain and prompted.

The student sees a question and its answer, the teacher the same behind the prompt that makes it
refuse; the rows are the tokens that both share at the end. Both have the same head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unteach.engine.config import ModelConfig
from unteach.engine.data.records import read_records
from unteach.engine.data.tokens import common_length, response_tokens, student_context
from unteach.engine.model import (
    PreTrainedModel,
    embedded_model,
    head_weight,
    hidden_states,
    load_model,
    load_tokenizer,
)
from unteach.engine.teacher.intentions import load_intentions, teacher_context

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
BATCH = 16


def save_hidden(path: Path, rows: int) -> str:
    """Write student_hidden, teacher_hidden and head of SmolLM2-135M; say what was written."""
    config = ModelConfig()
    folder = str(embedded_model())
    tokenizer, model = load_tokenizer(folder, config), load_model(folder, config)
    intention = load_intentions(DATA / "quickstart_intentions.yaml").forget
    records = [r for r in read_records(DATA / "quickstart.jsonl") if r.goal == "forget"]
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(records), BATCH):
        lines: tuple[list[list[int]], list[list[int]]] = ([], [])
        for record in records[start : start + BATCH]:
            answer = response_tokens(tokenizer, record.answer or "", prefix=record.prefix)
            lines[0].append([*student_context(tokenizer, record), *answer])
            lines[1].append([*teacher_context(tokenizer, record, intention), *answer])
        prompt = common_length(lines[1])
        counts = [min(_common_end(a, b), len(b) - prompt) for a, b in zip(*lines, strict=True)]
        sides[0].append(_read(model, lines[0], counts, prefix=0))
        sides[1].append(_read(model, lines[1], counts, prefix=prompt))
        if sum(map(len, sides[0])) >= rows:
            break
    student, teacher = (torch.cat(side)[:rows].contiguous() for side in sides)
    head = head_weight(model).detach().contiguous()
    save_file({"student_hidden": student, "teacher_hidden": teacher, "head": head}, path)
    return f"{len(student)} rows of {student.shape[1]} numbers and a head of {len(head)} ids"


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both end with, short of the whole of either."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)


@torch.no_grad()
def _read(
    model: PreTrainedModel, lines: Sequence[Sequence[int]], counts: Sequence[int], *, prefix: int
) -> Tensor:
    """Hidden states at the last `count` tokens of each line, the very last left out.

    Args:
        prefix: how many tokens at the beginning are the same in all lines and run once.
    """
    tokens_BT = torch.zeros(len(lines), max(map(len, lines)) - prefix, dtype=torch.int64)
    for row, line in zip(tokens_BT, lines, strict=True):
        row[: len(line) - prefix] = torch.tensor(line[prefix:])
    hidden = hidden_states(model, tokens_BT, torch.tensor(lines[0][:prefix], dtype=torch.int64))
    ends = [len(line) - prefix - 1 for line in lines]
    rows = zip(hidden, ends, counts, strict=True)
    return torch.cat([states[end - count + 1 : end] for states, end, count in rows])
