"""The three forms in which a frozen teacher answers: what was kept of it decides what it can say.

A teacher first names its top-K set; later it is asked for its logit at ids of the student's
choosing. Hidden states and a head, or full logits, answer for any id. A list of ids with logits
answers for these ids only, which makes the loss an approximation with a coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unteach.kernels.checks import check_device, check_ids, check_linear, valid_ids
from unteach.kernels.logit_source import (
    ExactSource,
    GivenSource,
    LinearSource,
    LogitSource,
    soft_cap,
)
from unteach.kernels.topk_filter import exact_topk, tile_width
from unteach.kernels.topk_rank import first_occurrences


@dataclass(frozen=True, eq=False)
class HiddenTeacher:
    """Final hidden states (after the norm) and the frozen head: exact for any id.

    Args:
        ids_NM: top ids, sorted by logit; the first K are the set. None: they are searched for.
        logits_NM: final logits (soft cap applied) at `ids_NM`. None: computed.
    """

    hidden_NE: Tensor
    head_VE: Tensor
    ids_NM: Tensor | None = None
    logits_NM: Tensor | None = None
    bias_V: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogitsTeacher:
    """Full logits of each row, final."""

    logits_NV: Tensor


@dataclass(frozen=True, eq=False)
class SparseTeacher:
    """Top ids, sorted by logit, and their final logits; nothing is known beside them.

    The first K are the set. Ids of the student outside the list carry no loss.
    """

    ids_NM: Tensor
    logits_NM: Tensor


Teacher = HiddenTeacher | LogitsTeacher | SparseTeacher


@dataclass(frozen=True)
class TeacherRows:
    """What a teacher says of one block of rows before the student is known."""

    ids_NM: Tensor  # int64, each id once in a row, -1 elsewhere
    logits_NM: Tensor  # final logits at these ids
    source: ExactSource | None  # answers for other ids; None where nothing is known
    softcap: float | None  # to apply to what the source says
    fallback: int

    def logits_at(self, ids_NU: Tensor) -> Tensor:
        """Final logits at ids of the student's choosing; 0 where the id is -1."""
        assert self.source is not None
        return soft_cap(self.source.at(ids_NU), self.softcap)


def check_teacher(teacher: Teacher, k: int, rows: int, device: torch.device) -> int | None:
    """Check shapes, dtypes and devices; return the teacher's vocabulary size where it has one."""
    if isinstance(teacher, LogitsTeacher):
        _check_rows("teacher.logits_NV", teacher.logits_NV, rows, device)
        return teacher.logits_NV.shape[1]
    if isinstance(teacher, SparseTeacher):
        _check_top_ids(teacher.ids_NM, teacher.logits_NM, k, rows, device)
        return None
    if not isinstance(teacher, HiddenTeacher):
        raise ValueError(
            "teacher must be a HiddenTeacher, LogitsTeacher or SparseTeacher, "
            f"got {type(teacher).__name__}"
        )
    names = ("teacher.hidden_NE", "teacher.head_VE", "teacher.bias_V")
    check_linear(teacher.hidden_NE, teacher.head_VE, teacher.bias_V, names=names)
    _check_rows("teacher.hidden_NE", teacher.hidden_NE, rows, device)
    if teacher.ids_NM is not None:
        _check_top_ids(teacher.ids_NM, teacher.logits_NM, k, rows, device)
    elif teacher.logits_NM is not None:
        raise ValueError("teacher.logits_NM needs teacher.ids_NM to say which ids it speaks of")
    return teacher.head_VE.shape[0]


def teacher_operands(teacher: Teacher) -> list[Tensor | None]:
    """The floating tensors of a teacher that decide which code path can read it."""
    if isinstance(teacher, LogitsTeacher):
        return [teacher.logits_NV]
    if isinstance(teacher, SparseTeacher):
        return [teacher.logits_NM]
    return [teacher.hidden_NE, teacher.head_VE, teacher.logits_NM]


class TeacherReader:
    """Reads a teacher block by block; a HiddenTeacher's head is measured once for all blocks."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        k: int,
        vocab: int,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self.teacher, self.k, self.vocab = teacher, k, vocab
        self.softcap, self.dtype = softcap, dtype
        self.source: LogitSource | None = None
        if isinstance(teacher, HiddenTeacher):
            hidden, head = teacher.hidden_NE.detach(), teacher.head_VE.detach()
            bias = None if teacher.bias_V is None else teacher.bias_V.detach()
            wide = torch.promote_types(dtype, hidden.dtype)
            self.source = LinearSource(hidden, head, bias, scale, wide)
        elif isinstance(teacher, LogitsTeacher):
            self.source, self.softcap = GivenSource(teacher.logits_NV.detach(), dtype), None

    def read(self, rows: slice | Tensor) -> TeacherRows:
        """The teacher's set for these rows, and all it knows beside it."""
        source = None if self.source is None else self.source.take(rows)
        if isinstance(self.teacher, LogitsTeacher) or self.teacher.ids_NM is None:
            assert source is not None
            tile = tile_width(self.k, self.vocab)
            top = exact_topk(source, self.k, self.vocab, tile=tile)
            logits = soft_cap(top.raw_NK, self.softcap).to(self.dtype)
            return TeacherRows(top.ids_NK, logits, source, self.softcap, top.fallback)
        given = self.teacher.logits_NM
        ids_NM = self.teacher.ids_NM.to(torch.int64)[rows]
        if given is None:
            ids_NM = ids_NM[:, : self.k]
        ids_NM = first_occurrences(valid_ids(ids_NM, self.vocab))
        if given is not None:
            logits = given.detach()[rows].to(self.dtype)
            return TeacherRows(ids_NM, logits, source, self.softcap, 0)
        assert source is not None
        logits = soft_cap(source.at(ids_NM), self.softcap).to(self.dtype)
        return TeacherRows(ids_NM, logits, source, self.softcap, 0)


def _check_rows(name: str, tensor: Tensor, rows: int, device: torch.device) -> None:
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise ValueError(
            f"{name} must have two dimensions and {rows} rows like hidden_ND, "
            f"got shape {tuple(tensor.shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    check_device(name, tensor, device)


def _check_top_ids(
    ids_NM: Tensor, logits_NM: Tensor | None, k: int, rows: int, device: torch.device
) -> None:
    check_ids("teacher.ids_NM", ids_NM, rows, device)
    if ids_NM.shape[1] < k:
        raise ValueError(f"teacher.ids_NM has {ids_NM.shape[1]} ids a row, fewer than k={k}")
    if logits_NM is None:
        return
    if logits_NM.shape != ids_NM.shape:
        raise ValueError(
            f"teacher.logits_NM has shape {tuple(logits_NM.shape)}, expected "
            f"{tuple(ids_NM.shape)} like teacher.ids_NM"
        )
    if not logits_NM.dtype.is_floating_point:
        raise ValueError(f"teacher.logits_NM must be floating point, got {logits_NM.dtype}")
    check_device("teacher.logits_NM", logits_NM, device)
