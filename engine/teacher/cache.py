"""The teacher cache, read: rows of any records in any order, straight from memory-mapped shards.

A shard's checksum is compared when the first of its rows is asked for; only the pages of the rows
asked for are kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unteach.engine.errors import InputError
from unteach.engine.files import sha256_of
from unteach.engine.model import Head
from unteach.engine.teacher.manifest import (
    HEAD,
    Entry,
    Fingerprints,
    HeadFile,
    Manifest,
    Shard,
    read_manifest,
    remedy,
)
from unteach.kernels.bitopk import HiddenTeacher, LogitsTeacher, SparseTeacher


@dataclass(frozen=True)
class CacheRows:
    """Some rows of a cache, on the CPU; None where the form does not hold it.

    Attributes:
        student_ids_NS: int32 top ids of the same weights without the intention.
        reference_logp_N: float32 log-probability of the label under the same, nats.
    """

    hidden_NE: Tensor | None
    logits_NV: Tensor | None
    top_ids_NM: Tensor
    top_logits_NM: Tensor | None
    student_ids_NS: Tensor
    labels_N: Tensor
    reference_logp_N: Tensor


class TeacherCache:
    """A finished cache folder, opened for reading; rows are numbered through all shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        assert manifest.head is not None
        self.folder, self.manifest = folder, manifest
        self.head: Head = manifest.head.rule()
        self.rows_total = manifest.rows
        self.entries = {entry.id: entry for shard in manifest.shards for entry in shard.records}
        rows_S = torch.tensor([shard.rows for shard in manifest.shards], dtype=torch.int64)
        self._last_row_S = rows_S.cumsum(0)
        self._opened: dict[int, dict[str, Tensor]] = {}
        self._heads: dict[torch.device, Tensor] = {}
        self._biases: dict[torch.device, Tensor | None] = {}

    @classmethod
    def open(cls, folder: Path, *, expected: Fingerprints | None = None) -> TeacherCache:
        """Open a finished cache.

        Args:
            expected: what it must have been made of; None takes it as it is.
        Raises:
            InputError: there is none, it is unfinished, damaged, or made of something else.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"{folder} holds no teacher cache: `unteach teach` makes one.")
        if expected is not None:
            check_fingerprints(folder, manifest, expected)
        if not manifest.complete:
            raise InputError(
                f"The teacher cache in {folder} is unfinished ({len(manifest.shards)} of "
                f"{manifest.shards_total} shards): `unteach teach` goes on with it."
            )
        for shard in manifest.shards:
            _check_size(folder / shard.file, shard.bytes)
        assert manifest.head is not None
        _check_size(folder / HEAD, manifest.head.bytes)
        return cls(folder, manifest)

    @property
    def head_VE(self) -> Tensor:
        """The frozen head W_t in the teacher's compute dtype, on the CPU."""
        return self._head_tensors["weight"]

    @property
    def bias_V(self) -> Tensor | None:
        """The head's bias, where it has one."""
        return self._head_tensors.get("bias")

    def labels(self, record_id: str) -> list[int]:
        """The response tokens that a record's rows predict.

        Raises:
            InputError: the cache has no such record.
        """
        entry = self.entries.get(record_id)
        if entry is None:
            raise InputError(
                f"The teacher cache in {self.folder} has no record {record_id!r}: "
                f"{remedy(self.folder)}."
            )
        if entry.rows == 0:
            return []
        number = int(torch.searchsorted(self._last_row_S, entry.first_row, right=True))
        start = entry.first_row - self._first_row(number)
        return self._shard(number)["labels"][start : start + entry.rows].tolist()

    def rows(self, row_N: Tensor) -> CacheRows:
        """Any rows in any order, repeated ones too.

        Args:
            row_N: int64 on the CPU.
        Raises:
            ValueError: a row that the cache does not have.
            InputError: a shard that is damaged.
        """
        if row_N.numel() and not 0 <= int(row_N.min()) <= int(row_N.max()) < self.rows_total:
            raise ValueError(f"rows must be from 0 to {self.rows_total - 1}, got {row_N.tolist()}")
        number_N = torch.searchsorted(self._last_row_S, row_N, right=True)
        parts = {
            name: torch.zeros(row_N.numel(), *shape, dtype=_DTYPES[dtype])
            for name, (dtype, shape) in self.manifest.tensors().items()
        }
        for number in number_N.unique().tolist():
            places = (number_N == number).nonzero()[:, 0]
            inside = row_N[places] - self._first_row(number)
            for name, tensor in self._shard(number).items():
                parts[name][places] = tensor[inside]
        return CacheRows(
            hidden_NE=parts.get("hidden"),
            logits_NV=parts.get("logits"),
            top_ids_NM=parts["top_ids"],
            top_logits_NM=parts.get("top_logits"),
            student_ids_NS=parts["student_ids"],
            labels_N=parts["labels"],
            reference_logp_N=parts["reference_logp"],
        )

    def teacher(
        self, rows: CacheRows, device: torch.device
    ) -> HiddenTeacher | LogitsTeacher | SparseTeacher:
        """The frozen teacher of these rows, as the loss takes it; the head is moved there once."""
        ids_NM = rows.top_ids_NM.to(device)
        if rows.logits_NV is not None:
            return LogitsTeacher(rows.logits_NV.to(device))
        assert rows.top_logits_NM is not None
        logits_NM = rows.top_logits_NM.to(device)
        if rows.hidden_NE is None:
            return SparseTeacher(ids_NM, logits_NM)
        if device not in self._heads:
            self._heads[device] = self.head_VE.to(device)
            self._biases[device] = None if self.bias_V is None else self.bias_V.to(device)
        return HiddenTeacher(
            hidden_NE=rows.hidden_NE.to(device),
            head_VE=self._heads[device],
            ids_NM=ids_NM,
            logits_NM=logits_NM,
            bias_V=self._biases[device],
        )

    def verify(self) -> list[str]:
        """Names of the files whose bytes are not those that were written."""
        return bad_files(self.folder, self.manifest)

    @cached_property
    def _head_tensors(self) -> dict[str, Tensor]:
        head = self.manifest.head
        assert head is not None
        return open_head(self.folder, head)

    def _first_row(self, number: int) -> int:
        return int(self._last_row_S[number]) - self.manifest.shards[number].rows

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._opened:
            shard = self.manifest.shards[number]
            self._opened[number] = _open_shard(self.folder, self.manifest, shard)
        return self._opened[number]


def check_fingerprints(folder: Path, manifest: Manifest, expected: Fingerprints) -> None:
    """Refuse a cache that was made of something else.

    Raises:
        InputError: says what changed.
    """
    changed = manifest.fingerprints.changed(expected)
    if changed:
        raise InputError(
            f"The teacher cache in {folder} was made with other {', '.join(changed)}: "
            f"{remedy(folder)}, or choose another run.folder."
        )


def bad_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of listed files that are missing or not what the manifest says, shards first."""
    files = [(shard.file, shard.bytes, shard.sha256) for shard in manifest.shards]
    if manifest.head is not None:
        files.append((HEAD, manifest.head.bytes, manifest.head.sha256))
    return [name for name, size, digest in files if not _is_whole(folder / name, size, digest)]


def open_head(folder: Path, head: HeadFile) -> dict[str, Tensor]:
    """The head's tensors, memory-mapped.

    Raises:
        InputError: the file is missing or damaged.
    """
    return _open(folder / HEAD, head.bytes, head.sha256)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32}


def _open_shard(folder: Path, manifest: Manifest, shard: Shard) -> dict[str, Tensor]:
    path = folder / shard.file
    tensors = _open(path, shard.bytes, shard.sha256)
    wanted = {
        name: (_DTYPES[dtype], (shard.rows, *shape))
        for name, (dtype, shape) in manifest.tensors().items()
    }
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if held != wanted:
        raise InputError(
            f"{path} holds other tensors than its manifest says: {remedy(path.parent)}."
        )
    labels = tensors["labels"]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < manifest.head_rows:
        raise InputError(f"{path} holds labels outside the vocabulary: {remedy(path.parent)}.")
    return tensors


def _open(path: Path, size: int, digest: str) -> dict[str, Tensor]:
    _check_size(path, size)
    try:
        if sha256_of(path) != digest:
            raise InputError(f"{path} is damaged (its sha256 is another): {remedy(path.parent)}.")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy(path.parent)}.") from error


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: {remedy(path.parent)}.")
    if path.stat().st_size != size:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes and not {size}, it was cut or altered: "
            f"{remedy(path.parent)}."
        )


def _is_whole(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == digest


__all__ = ["CacheRows", "Entry", "Fingerprints", "TeacherCache", "bad_files", "check_fingerprints"]
