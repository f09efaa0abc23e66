"""Files that are whole or absent: write under a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from unteach.engine.errors import InputError

# What a file system that knows no locks answers: nobody can be kept out there.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# How the name of a folder ends that another is about to take the place of.
REPLACED = ".old.partial"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """sha256 over config and weights of a model folder; of name and revision for a hub id.

    A file that nobody has touched since is not read again: stages ask for the same weights.
    """
    folder = Path(path)
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update((path if revision is None else f"{path}@{revision}").encode())
        return digest.hexdigest()
    for file in sorted(folder.glob("*")):
        if file.name == "config.json" or file.suffix == ".safetensors":
            digest.update(f"{file.name} {known_sha256(file)}\n".encode())
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """`sha256_of`, which reads a file again only once somebody has touched it."""
    now = path.stat()
    return _sha256_once(path, now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=2**10)
def _sha256_once(path: Path, inode: int, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step, durable before it is visible.

    Raises:
        InputError: the disk is full or the folder cannot be written; the old file stays whole.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(unwritable(path, error)) from error


def sweep_partials(folder: Path) -> None:
    """Remove what killed processes had half written for `write_atomic`, up to three levels down."""
    for depth in range(4):
        for left in folder.glob("*/" * depth + ".*.partial"):
            process = left.suffixes[-2][1:] if len(left.suffixes) > 1 else ""
            if left.is_file() and process.isdecimal() and not _runs(int(process)):
                left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or a number of no process of ours
        pass
    return True


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it to make it again.") from error


def check_apart(folder: Path, key: str, path: str | None) -> None:
    """Refuse input that lies in a folder which is about to be replaced.

    Raises:
        InputError: names the config key and where the file should not be.
    """
    if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{key} {path} lies in {folder}, which this stage replaces: move it elsewhere, or "
            "choose another run.folder."
        )


def check_own(folder: Path, names: Sequence[str]) -> None:
    """Refuse to replace a folder that an earlier run of the stage did not make.

    Args:
        names: of the files that the stage writes.
    Raises:
        InputError: names what would be lost.
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    there = [name for name in there if not name.endswith(".partial")]  # of a run that was killed
    foreign = [name for name in there if name not in names]
    # Somebody's own records may be called like ours, but they lie without the list of rejects.
    if there and not foreign and not {"rejected.jsonl", "source.json", "revision.json"} & {*there}:
        foreign = there
    if foreign:
        raise InputError(
            f"{folder} is to be replaced and holds {foreign[0]}, which unteach did not write: move "
            "it elsewhere, or choose another run.folder."
        )


@contextmanager
def alone_in(folder: Path, stage: str, *, wait: bool = False) -> Iterator[None]:
    """Keep every other process out of a stage of this folder; a kill lets the next one in.

    Args:
        wait: until another process has ended it, in place of an error.
    Raises:
        InputError: another process is at it, or the folder cannot be written.
    """
    path = folder / f".{stage}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("a", encoding="ascii")
    except OSError as error:
        raise InputError(unwritable(path, error)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another unteach command is at stage {stage} of {folder}: wait until it has "
                "ended, or choose another run.folder."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise InputError(unwritable(path, error)) from error
        yield


@contextmanager
def renamed_into_place(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without error.

    What a killed writer of the same folder left beside it is removed, or put back where nothing
    took its place.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _sweep(folder, "*")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if folder.exists():  # aside first: a kill finds it missing for a moment at most
            folder.rename(partial.with_suffix(REPLACED))
        partial.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise InputError(unwritable(folder, error)) from error
    finally:
        _sweep(folder, str(os.getpid()))


def _sweep(folder: Path, writer: str) -> None:
    """Leave nothing half written or replaced beside a folder by this writer, or by any (`*`)."""
    name = f".{glob.escape(folder.name)}.{writer}"
    for left in [*folder.parent.glob(f"{name}.partial"), *folder.parent.glob(name + REPLACED)]:
        if left.name.endswith(REPLACED) and not folder.exists():
            left.rename(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> str:
    """One sentence about a write that failed."""
    reason = error.strerror or error
    return f"{path} cannot be written ({reason}): free space or choose another run.folder."


def fsync_folder(folder: Path) -> None:
    """Make a rename within a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
