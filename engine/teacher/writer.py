"""The teacher cache, written: whole shards only, listed after they are on the disk.

A kill at any instant loses at most the shards in flight; whatever the manifest does not list is
swept away and made again, and gets the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from unteach.engine.errors import InputError
from unteach.engine.files import unwritable, write_atomic
from unteach.engine.model import Head
from unteach.engine.teacher.cache import bad_files, check_fingerprints
from unteach.engine.teacher.manifest import (
    HEAD,
    Entry,
    HeadFile,
    Manifest,
    Shard,
    read_manifest,
    remedy,
    write_manifest,
)

_OURS = re.compile(
    r"rows-\d{5,}\.safetensors"
    r"|\.(rows-\d{5,}\.safetensors|head\.safetensors|manifest\.json)\.\d+\.partial"
)


class CacheWriter:
    """One cache folder in the making. Rank 0 resumes and lists; every rank writes shards."""

    def __init__(self, folder: Path, fresh: Manifest) -> None:
        self.folder = folder
        self.manifest = fresh

    def resume(self, *, rebuild: bool) -> None:
        """Take over what an earlier run finished and sweep away what it did not.

        Args:
            rebuild: drop what is damaged, or everything where other inputs made it, instead of
                refusing to go on.
        Raises:
            InputError: the folder holds a damaged cache, or one made of something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(unwritable(self.folder, error)) from error
        before = self._usable(rebuild)
        if before is not None:
            bad = bad_files(self.folder, before)
            if bad and not rebuild:
                raise InputError(
                    f"{self.folder / bad[0]} is damaged or missing ({len(bad)} such files): "
                    f"{remedy(self.folder)}."
                )
            kept = [shard for shard in before.shards if shard.file not in bad]
            if HEAD in bad:
                before = before.model_copy(update={"head": None})
            complete = before.complete and not bad
            self.manifest = before.with_shards(kept, complete=complete)
        if before is None or self.manifest != before:
            write_manifest(self.folder, self.manifest)
        self._sweep()

    def missing(self) -> list[int]:
        """Indices of the shards that are still to be made."""
        listed = {shard.index for shard in self.manifest.shards}
        return [index for index in range(self.manifest.shards_total) if index not in listed]

    def write_head(self, rule: Head, weight_VE: Tensor, bias_V: Tensor | None) -> None:
        """Write W_t once, and list it."""
        if self.manifest.head is not None:
            return
        tensors = {"weight": weight_VE} | ({} if bias_V is None else {"bias": bias_V})
        size, digest = _write(self.folder / HEAD, tensors)
        head = HeadFile(
            sha256=digest,
            bytes=size,
            bias=bias_V is not None,
            vocab=rule.vocab,
            softcap=rule.softcap,
            scale=rule.scale,
        )
        self.manifest = self.manifest.model_copy(update={"head": head})
        write_manifest(self.folder, self.manifest)

    def write_shard(
        self, index: int, tensors: Mapping[str, Tensor], entries: Iterable[Entry]
    ) -> Shard:
        """Write one shard, durable under its name; it counts once it is listed."""
        records = tuple(entries)
        rows = sum(entry.rows for entry in records)
        shard = Shard(index=index, sha256="0" * 64, bytes=1, rows=rows, records=records)
        size, digest = _write(self.folder / shard.file, tensors)
        return shard.model_copy(update={"sha256": digest, "bytes": size})

    def list_shards(self, shards: Iterable[Shard]) -> None:
        """Add written shards to the manifest."""
        self.manifest = self.manifest.with_shards([*self.manifest.shards, *shards])
        write_manifest(self.folder, self.manifest)

    def finish(self) -> None:
        """Call the cache complete."""
        if not self.manifest.complete:
            self.manifest = self.manifest.with_shards(self.manifest.shards, complete=True)
            write_manifest(self.folder, self.manifest)

    def _usable(self, rebuild: bool) -> Manifest | None:
        try:
            before = read_manifest(self.folder)
            if before is not None:
                check_fingerprints(self.folder, before, self.manifest.fingerprints)
        except InputError:
            if not rebuild:
                raise
            return None
        return before

    def _sweep(self) -> None:
        listed = {shard.file for shard in self.manifest.shards}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in listed:
                path.unlink()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(whole)
    write_atomic(path, data)
    return len(data), hashlib.sha256(data).hexdigest()
