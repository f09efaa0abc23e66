"""Checkpoints by torch's DCP: written aside, renamed when whole, loadable on any world size.

What makes one count is its file `complete`, written last and removed first: the step, the
fingerprint, and size and sha256 of every file, which are checked before anything is loaded.

Only what training changes is stored: trainable parameters and their optimiser state. Frozen
parameters come from the base model, whose fingerprint the checkpoint carries. Every random choice
of training is a function of seed and step, so the step number is all the rest of the state.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from unteach.engine.errors import InputError
from unteach.engine.files import fsync_folder, sha256_of, write_json
from unteach.engine.model import PreTrainedModel
from unteach.engine.progress import say
from unteach.engine.train.lora import is_adapter
from unteach.engine.train.parallel import World, peer_lost

COMPLETE = "complete"

Files = dict[str, dict[str, Any]]  # name → bytes and sha256


class Saver:
    """Writes `folder/step-0000NN` checkpoints of one run, each aside until it is whole.

    In the background, weights and optimiser state are copied to host memory, written and hashed
    while training goes on; the checkpoint counts from the step at which that is seen to have ended.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        world: World,
        *,
        keep: int,
        background: bool,
    ) -> None:
        self.folder, self.fingerprint, self.world = folder, fingerprint, world
        self.keep, self.background = keep, background
        # Its thread must not meet training's own reductions in the same group.
        spread = background and world.mesh is not None
        self._group = dist.new_group(backend="gloo") if spread else None
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[Files]] | None = None

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        trainable: Collection[str],
    ) -> None:
        """Write, or begin to write, what a run is after `step` optimiser steps.

        Raises:
            InputError: the disk is full; the checkpoints before stay whole.
        """
        self.finish()
        if self.world.rank == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.world.wait()
        alone = self.world.mesh is None
        where: dict[str, Any] = {"checkpoint_id": self._partial(step), "no_dist": alone}
        with self._one_sentence(step), _no_warning_alone():
            state = _state(model, optimizer, trainable)
            if self.background:
                future = async_save(state, process_group=self._group, **where)
                assert isinstance(future, Future)
                self._writing = (step, self._hashing.submit(self._written, step, future))
                return
            save(state, **where)
            self._complete(step, self._written(step))

    def poll(self) -> None:
        """Complete the checkpoint in the background if its last byte is written.

        Raises:
            InputError: it could not be written.
        """
        if self._writing is not None and self._writing[1].done():
            self._end()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, on all ranks.

        Raises:
            InputError: it could not be written.
        """
        if self._writing is not None:
            self._end()
        self.world.wait()

    def _end(self) -> None:
        assert self._writing is not None
        step, future = self._writing
        self._writing = None
        with self._one_sentence(step):
            self._complete(step, future.result())

    def _written(self, step: int, write: Future[Any] | None = None) -> Files:
        """Every file of a checkpoint that all ranks have written; known to rank 0 alone."""
        if write is not None:
            # The coordinator's future ends after every rank's: rank 0 need not ask the others.
            write.result()
        if self.world.rank != 0:
            return {}
        return {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(self._partial(step).iterdir())
        }

    def _complete(self, step: int, files: Files) -> None:
        if self.world.rank != 0:
            return
        target, partial = self._target(step), self._partial(step)
        note = {"step": step, "fingerprint": self.fingerprint, "files": files}
        write_json(partial / COMPLETE, note)
        _remove(target)
        partial.rename(target)
        fsync_folder(self.folder)
        found = finished_checkpoints(self.folder)
        # Later steps are of a course that was given up because the newest was damaged.
        kept = found[: found.index(target) + 1][-self.keep :]
        for path in found:
            if path not in kept:
                _remove(path)

    def _target(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:06d}.partial"

    @contextmanager
    def _one_sentence(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if peer_lost(error):
                raise
            shutil.rmtree(self._partial(step), ignore_errors=True)
            raise InputError(
                f"Checkpoint {self._target(step)} cannot be written ({_root_cause(error)}): free "
                "space or choose another run.folder; earlier checkpoints are whole."
            ) from error


def finished_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # step-1000000 is the later


def resume(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    trainable: Collection[str],
    fingerprint: dict[str, Any],
    world: World,
) -> int:
    """Load the newest undamaged checkpoint; return how many steps it has done, 0 without any.

    Raises:
        InputError: the checkpoint belongs to another model, cache, data or setting; none is whole.
    """
    found = finished_checkpoints(folder)
    if not found:
        return 0
    newest = _newest_whole(folder, found, world)
    note = _read_note(newest)
    _check_same(newest, note, fingerprint)
    state = _state(model, optimizer, trainable)
    try:
        with _no_warning_alone():
            load(state, checkpoint_id=newest, no_dist=world.mesh is None)
    except (OSError, RuntimeError, CheckpointException) as error:
        if peer_lost(error):
            raise
        raise InputError(
            f"Checkpoint {newest} cannot be loaded ({_root_cause(error)}): remove it to go on from "
            "the one before."
        ) from error
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(note["step"])


def check_folder(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Refuse a folder that another training would spoil, before anything is written to it.

    Raises:
        InputError: the notes of its checkpoints are of another training, or no training made the
            model that this one would replace.
    """
    model = folder / "model"
    if model.exists() and not (folder / "train.jsonl").exists():
        raise InputError(
            f"{model} is to be replaced and no training of {folder} made it: move it elsewhere, or "
            "choose another run.folder."
        )
    for path in finished_checkpoints(folder / "checkpoints"):
        try:
            note = _read_note(path)
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged, which `resume` tells
        _check_same(path, note, fingerprint)


def _check_same(checkpoint: Path, note: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    stored = note["fingerprint"]
    changed = [key for key in {**stored, **fingerprint} if stored.get(key) != fingerprint.get(key)]
    if changed:
        raise InputError(
            f"Checkpoint {checkpoint} was made with another {', '.join(sorted(changed))}: use "
            f"another run.folder, or remove {checkpoint.parent} to train afresh."
        )


def model_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by its name in the model's files, as it lies on this rank; no adapters."""
    state = get_model_state_dict(model)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in tensors.items() if not is_adapter(name)}


def _newest_whole(folder: Path, found: Sequence[Path], world: World) -> Path:
    """The newest checkpoint whose files are those that were written; rank 0 reads them for all."""
    chosen = torch.zeros((), dtype=torch.int64)
    if world.rank == 0:
        for place, path in reversed([*enumerate(found, start=1)]):
            fault = _fault(path)
            if fault is None:
                chosen += place
                break
            say(f"checkpoint: {path} is damaged ({fault}), so the one before it is tried")
    place = int(world.reduced(chosen))
    if not place:
        raise InputError(f"Every checkpoint is damaged: remove {folder} to train afresh.")
    return found[place - 1]


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint on disk, None where nothing is."""
    try:
        files: Files = _read_note(checkpoint)["files"]
        for name, written in files.items():
            path = checkpoint / name
            if path.stat().st_size != written["bytes"] or sha256_of(path) != written["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror or error}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{COMPLETE} cannot be read"
    return None


def _read_note(checkpoint: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    if checkpoint.name != f"step-{note['step']:06d}" or not isinstance(note["fingerprint"], dict):
        raise ValueError(f"{checkpoint / COMPLETE} is of another checkpoint")
    return note


def remove_checkpoints(folder: Path) -> None:
    """Remove all there are; a kill halfway leaves none that counts and is damaged."""
    for checkpoint in finished_checkpoints(folder):
        _remove(checkpoint)
    if folder.is_dir():
        shutil.rmtree(folder)


def _remove(checkpoint: Path) -> None:
    """Its mark first: a kill halfway leaves nothing that counts as a checkpoint."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, trainable: Collection[str]
) -> dict[str, Any]:
    weights = {k: v for k, v in get_model_state_dict(model).items() if k in trainable}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


@contextmanager
def _no_warning_alone() -> Iterator[None]:
    """DCP warns whenever one process saves without a process group: here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
