"""The data stage: a named source becomes `data/records.jsonl` in the run folder, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unteach.engine.data.hub import commit_of
from unteach.engine.data.records import counts, write_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.rows import SUFFIXES, files_under
from unteach.engine.data.settings import SourceSettings
from unteach.engine.data.sheet import write_sheet
from unteach.engine.data.sources import collect, hub_repo
from unteach.engine.errors import InputError
from unteach.engine.files import (
    alone_in,
    check_apart,
    check_own,
    read_json,
    renamed_into_place,
    sha256_of,
    write_json,
)
from unteach.engine.progress import say

PIN = "revision.json"
OWN = ("records.jsonl", "records.md", "rejected.jsonl", "source.json", PIN)


def prepared(settings: SourceSettings, folder: Path) -> Path:
    """Where the records of a run lie: `data.path`, or what `prepare` makes of `data.source`."""
    return Path(settings.path) if settings.source is None else folder / "data" / "records.jsonl"


def prepare(settings: SourceSettings, folder: Path) -> None:
    """Make records, their sheet and the list of what was left out; skip what is made already.

    The commit of a hub data set is written down before a row is read, and every later preparation
    reads that one; `data.revision` names another.

    Raises:
        InputError: the source cannot be read, other settings made what is there, or it is not ours.
    """
    if settings.source is None:
        return
    check_apart(folder / "data", "data.path", settings.path)
    for name in settings.beside:
        check_apart(folder / "data", "data.beside", name)
    with alone_in(folder, "data", wait=True):
        _prepare(settings, folder / "data")


def _prepare(settings: SourceSettings, output: Path) -> None:
    inputs = _inputs(settings)
    if (output / "source.json").is_file():
        before = read_json(output / "source.json")["inputs"]
        changed = sorted(k for k in {**before, **inputs} if before.get(k) != inputs.get(k))
        if changed:
            raise InputError(
                f"{output} was made with another {', '.join(changed)}: choose another run.folder, "
                f"or remove {output / 'source.json'} to make it again."
            )
        say("data: done before, skipped")
        return
    check_own(output, OWN)
    settings = _pinned(settings, output)
    with renamed_into_place(output) as partial:
        rejects = Rejects(partial / "rejected.jsonl")
        collected = collect(settings, rejects=rejects)
        rejects.close()
        if (output / PIN).is_file():
            (partial / PIN).write_bytes((output / PIN).read_bytes())
        write_records(partial / "records.jsonl", collected.records)
        notes = [f"Source: {settings.source}, {_origin(settings, collected.revision)}."]
        write_sheet(
            partial / "records.md",
            collected.records,
            rejects=rejects,
            near=collected.near,
            notes=notes,
        )
        write_json(partial / "source.json", {"inputs": inputs, "revision": collected.revision})
    say(f"data: {', '.join(f'{key} {n}' for key, n in counts(collected.records).items())}")
    say(
        f"data: left out: {rejects}; {len(collected.near)} test questions nearly equal a training "
        f"question; see {output / 'records.md'}"
    )


def _pinned(settings: SourceSettings, output: Path) -> SourceSettings:
    """The settings at one commit: the one that an earlier preparation wrote down, or today's."""
    repo, path = hub_repo(settings), output / PIN
    if repo is None:
        return settings
    asked = {"repo": repo, "asked": settings.revision}
    pin = read_json(path) if path.is_file() else {}
    if {name: pin.get(name) for name in asked} != asked:
        commit = commit_of(repo, settings.revision)
        if commit is None:
            say(f"data: the hub does not say at which commit {repo} is; rows come from the cache")
            return settings
        pin = {**asked, "commit": commit}
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, pin)
    say(f"data: {repo} at commit {pin['commit']}")
    return settings.model_copy(update={"revision": pin["commit"]})


def _inputs(settings: SourceSettings) -> dict[str, Any]:
    """Everything the records are made of, as JSON; local files by their content."""
    names = ("source", "subset", "revision", "limit", "columns", "test_share")
    chosen = {name: getattr(settings, name) for name in names}
    path = Path(settings.path)
    found = {path.name: path} if path.is_file() else {}
    if settings.path and path.is_dir():
        files = files_under(path, SUFFIXES, Rejects())
        found = {file.relative_to(path).as_posix(): file for file in files}
    content = {name: sha256_of(file) for name, file in found.items()} or settings.path
    beside: dict[str, str] = {}
    for number, name in enumerate(settings.beside):
        key = Path(name).name
        beside[f"{key} {number}" if key in beside else key] = sha256_of(Path(name))
    return {**chosen, "path": content, "beside": beside}


def _origin(settings: SourceSettings, revision: str | None) -> str:
    if settings.path and Path(settings.path).exists():
        return f"read from {Path(settings.path).name} on this machine"
    return f"from the hub at commit {revision or 'of the local cache'}"
