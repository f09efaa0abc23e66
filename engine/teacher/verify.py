"""Does a cache still say what its teacher says? The model's own forward, head and all, against it.

Checksums tell whether the bytes are those that were written; this tells whether they are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.engine.config import Config
from unteach.engine.data.records import Record
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase
from unteach.engine.progress import progress
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import (
    Intentions,
    intention_of,
    reasoned_context,
    teacher_context,
)
from unteach.kernels.linear_topk import linear_topk

CLEAR_MARGIN = 0.1  # logits between a row's two best ids, above which argmax must agree


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        rows: rows compared with the model's own forward.
        clear: those of them whose two best logits differ by more than `CLEAR_MARGIN`.
        agreed: those of the clear ones with the same argmax.
        bad_files: files whose checksum is another.
    """

    records: int
    rows: int
    clear: int
    agreed: int
    bad_files: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all clear rows agree and all files are whole."""
        return not self.bad_files and self.agreed == self.clear

    def __str__(self) -> str:
        left_out = (self.rows - self.clear) / max(self.rows, 1)
        agreed = self.agreed / max(self.clear, 1)
        files = f"damaged files: {', '.join(self.bad_files)}" if self.bad_files else "files whole"
        return (
            f"{self.records} records, {self.rows} rows: {left_out:.2%} left out (two best logits "
            f"within {CLEAR_MARGIN}), of the others {agreed:.2%} have the model's own argmax; "
            f"{files}"
        )


def verify_cache(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
    cache: TeacherCache,
    *,
    sample: int | None = None,
) -> Verification:
    """Compare a cache with whole forwards of its teacher, one record at a time.

    Args:
        sample: records to compare, evenly spaced; None compares all.
    """
    bad = tuple(cache.verify())
    step = 1 if sample is None else max(1, -(-len(records) // sample))
    chosen = list(records[::step])
    if bad:
        return Verification(0, 0, 0, 0, bad)
    rows = clear = agreed = 0
    with progress("verify", len(chosen), unit="records") as advance:
        for record in chosen:
            entry = cache.entries[record.id]
            labels = cache.labels(record.id)
            intention = intention_of(config.teacher, intentions, record)
            context = teacher_context(tokenizer, record, intention)
            if entry.reasoning is not None:
                prefixed = bool(record.prefix)
                context = reasoned_context(tokenizer, context, entry.reasoning, prefixed=prefixed)
            own_RV = _own_logits(model, context, labels)[:, : cache.head.vocab]
            best = own_RV.topk(min(2, own_RV.shape[1]), dim=1)
            clear_R = best.values[:, 0] - best.values[:, -1] > CLEAR_MARGIN
            row_R = torch.arange(entry.first_row, entry.first_row + entry.rows)
            agreed_R = _first_choice(cache, row_R, model.device) == best.indices[:, 0]
            rows += entry.rows
            clear += int(clear_R.sum())
            agreed += int((agreed_R & clear_R).sum())
            advance(1)
    return Verification(len(chosen), rows, clear, agreed, bad)


@torch.no_grad()
def _own_logits(model: PreTrainedModel, context: list[int], labels: list[int]) -> Tensor:
    """The whole model's logits [R, V] at the positions that predict the labels."""
    tokens = torch.tensor([context + labels[:-1]], device=model.device)
    output = model(input_ids=tokens, use_cache=False, logits_to_keep=len(labels))
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits[0, -len(labels) :].float()


def _first_choice(cache: TeacherCache, row_R: Tensor, device: torch.device) -> Tensor:
    """The teacher's best id of each row by what the cache holds of it."""
    rows = cache.rows(row_R)
    if rows.logits_NV is not None:
        return rows.logits_NV[:, : cache.head.vocab].argmax(1).to(device)
    if rows.hidden_NE is None:
        return rows.top_ids_NM[:, 0].to(device)
    _, ids_R1 = linear_topk(
        rows.hidden_NE.to(device),
        cache.head_VE.to(device),
        1,
        vocab=cache.head.vocab,
        bias_V=None if cache.bias_V is None else cache.bias_V.to(device),
        softcap=cache.head.softcap,
        scale=cache.head.scale,
    )
    return ids_R1[:, 0]
