"""`unteach standardize`: text in, `standardized/records.jsonl` out, with sheet, rejects and gap."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from unteach.engine.config import Config
from unteach.engine.data.assemble import near_duplicates
from unteach.engine.data.domain_gap import FOLDS, Gap, measure_gap
from unteach.engine.data.prompt_files import load_prompts
from unteach.engine.data.records import GOALS, Record, check_disjoint, read_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.settings import StandardizeConfig
from unteach.engine.data.sheet import write_sheet
from unteach.engine.data.standardize import Standardizer
from unteach.engine.data.texts import read_passages
from unteach.engine.data.writer import Writer, open_writer
from unteach.engine.device import pick_device
from unteach.engine.errors import InputError
from unteach.engine.files import (
    alone_in,
    check_apart,
    check_own,
    renamed_into_place,
    sweep_partials,
)
from unteach.engine.model import load_model, load_tokenizer, resolve_model
from unteach.engine.progress import progress, say

OWN = ("records.jsonl", "records.md", "rejected.jsonl", "domain_gap.png")


def standardize(config: Config) -> Path:
    """Make records of raw text; the writer's replies are kept, so a killed run goes on.

    Returns:
        The file of records, for `data.path`.
    Raises:
        InputError: no text, no record, a writer that cannot be used, a folder that is not ours, or
            one that another process writes to.
    """
    folder = Path(config.run.folder)
    with alone_in(folder, "standardize"):
        sweep_partials(folder)
        return _standardize(config, folder)


def _standardize(config: Config, folder: Path) -> Path:
    settings = config.standardize
    output, prompts = folder / "standardized", load_prompts(settings.prompts)
    check_apart(output, "standardize.forget", settings.forget)
    check_apart(output, "standardize.general", settings.general)
    check_own(output, OWN)
    writer = open_writer(config.writer, folder, pick_device(config.run.device))
    start = time.monotonic()
    # Without a writer it is over before a bar says anything.
    todo = 0 if writer is None else _passages(settings)
    with (
        renamed_into_place(output) as partial,
        progress("standardize", max(todo, 1), unit="passages") as bar,
    ):
        advance = _silent if writer is None else bar
        rejects = Rejects(partial / "rejected.jsonl")
        maker = Standardizer(settings, prompts, writer, rejects, advance)
        path = partial / "records.jsonl"
        total = _write(path, maker.records())
        rejects.close()
        if total == 0:
            raise InputError(f"No record came out (left out: {rejects}): see writer and text.")
        elapsed_s = time.monotonic() - start
        near = []
        if writer is not None:
            records = read_records(path)
            check_disjoint(records)
            near = near_duplicates(records)
        gap = None if settings.gap_records is None else _gap(config, path, writer, folder)
        write_sheet(
            partial / "records.md",
            _records_of(path),
            rejects=rejects,
            near=near,
            notes=_notes(config, writer),
            gap=gap,
        )
    say(
        f"standardize: {total} records in {elapsed_s:.1f} s ({total / max(elapsed_s, 1e-9):.0f} "
        f"records/s); left out: {rejects}"
    )
    if writer is not None:
        say(f"standardize: {_spent(writer)}")
    say(f"standardize: {output / 'records.jsonl'}, described in {output / 'records.md'}")
    return output / "records.jsonl"


def _silent(count: int, note: str = "") -> None:
    """Nobody waits long enough to be told."""


def _passages(settings: StandardizeConfig) -> int:
    """How many passages and concepts there are to write about, by one pass over the text."""
    total = settings.neighbors
    for text in (settings.forget, settings.general):
        if text is not None:
            found = read_passages(Path(text), settings.chunk_words, Rejects())
            total += sum(1 for _ in islice(found, settings.max_chunks))
    return total


def _write(path: Path, records: Iterable[Record]) -> int:
    total = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            row = record.model_dump(exclude_defaults=True)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += 1
    return total


def _records_of(path: Path) -> Iterator[Record]:
    """Records that were just written, one at a time."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield Record.model_validate_json(line)


def _gap(config: Config, path: Path, writer: Writer | None, folder: Path) -> Gap:
    """The domain gap before, over passages where there are any, and after, over records."""
    settings, size = config.standardize, config.standardize.gap_records or 0
    after = _some_of_each(_records_of(path), size)
    before = dict(after)
    for goal, text in (("forget", settings.forget), ("general", settings.general)):
        if text is not None and writer is not None:
            found = read_passages(Path(text), settings.chunk_words, Rejects())
            before[goal] = [
                Record(id=f"{p.number}", goal="forget", answer=p.text, form="passage")
                for p in islice(found, size)
            ]
    goals = [goal for goal in after if min(len(before[goal]), len(after[goal])) >= FOLDS]
    if len(goals) < 2:
        raise InputError(
            f"The domain gap needs two goals of at least {FOLDS} records each: give more text or "
            "set standardize.gap_records=null."
        )
    name = resolve_model(config.model.path, folder)
    tokenizer = load_tokenizer(name, config.model)
    model = load_model(name, config.model, device=pick_device(config.run.device))
    sides = [{goal: side[goal] for goal in goals} for side in (before, after)]
    return measure_gap(model, tokenizer, *sides, name=config.model.path)


def _some_of_each(records: Iterable[Record], size: int) -> dict[str, list[Record]]:
    chosen: dict[str, list[Record]] = {goal: [] for goal in GOALS}
    for record in records:
        if record.anchor_of is None and len(chosen[record.goal]) < size:
            chosen[record.goal].append(record)
    return {goal: rows for goal, rows in chosen.items() if rows}


def _notes(config: Config, writer: Writer | None) -> list[str]:
    if writer is None:
        return ["No writer: passages as they are, no question was written."]
    return [f"Written by {config.writer.model} ({config.writer.kind}).", f"{_spent(writer)}."]


def _spent(writer: Writer) -> str:
    spent = writer.spent
    text = (
        f"{spent['calls']} calls and {spent['tokens']} tokens spent, {spent['kept']} replies were "
        f"there already, {spent['cleaned']} freed of markup, {spent['repaired']} repaired"
    )
    if spent["stopped"]:
        text += "; stopped at the budget: raise writer.max_calls or writer.max_tokens to go on"
    return text
