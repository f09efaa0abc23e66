"""Benchmarks and local files as QA records: from the hub, its cache, or this machine.

`datasets` fetches and caches; benchmarks.py knows each schema; here rows are found, read, mapped,
split and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from unteach.engine.data.assemble import (
    attack_records,
    near_duplicates,
    split_records,
    with_options,
    with_prefixes,
    without_duplicates,
)
from unteach.engine.data.benchmarks import (
    Fields,
    Part,
    RowError,
    Source,
    choice_row,
    find_source,
    from_cell,
    qa_row,
    text_row,
)
from unteach.engine.data.hub import commit_of, hub_rows
from unteach.engine.data.records import GOALS, Goal, Record, Split, check_disjoint, read_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.rows import SUFFIXES, Row, files_under, read_rows
from unteach.engine.data.settings import SourceSettings
from unteach.engine.errors import InputError

LOCAL_FIELDS = ("question", "answer")


@dataclass
class Collected:
    """A whole set of records and what is to be said about it."""

    records: list[Record]
    rejects: Rejects
    near: list[tuple[str, str, float]] = field(default_factory=list)
    revision: str | None = None


def collect(settings: SourceSettings, *, rejects: Rejects | None = None) -> Collected:
    """Read a source, make records, split them, and add what stands beside it.

    Raises:
        InputError: the rows cannot be reached or read; says which file to put where.
    """
    assert settings.source is not None
    rejects = rejects or Rejects()
    if is_records(Path(settings.path)):
        records = read_records(Path(settings.path))
        check_disjoint(records)
        return Collected(records, rejects, near_duplicates(records))
    drafts: list[Record] = []
    fixed: dict[str, Split] = {}
    confusable: dict[str, list[str]] = {}
    revision = None
    if settings.source == "local":
        parts: list[tuple[Part, Iterator[Row]]] = list(_local_parts(settings, rejects))
        name = "local"
    else:
        source = find_source(settings.source, settings.subset)
        name = source.name
        if settings.path and Path(settings.path).exists():
            parts = list(_source_files(source, settings, rejects))
        else:
            revision, parts = _hub_parts(source, settings)
    for part, rows in parts:
        for record, wrong in _records(name, part, rows, settings, rejects):
            drafts.append(record)
            if "split" in record.model_fields_set:  # the row says it
                fixed[record.id] = record.split
            elif part.held is not None:
                fixed[record.id] = part.held
            if wrong:
                confusable[record.id] = wrong
    if not drafts:
        raise InputError(
            f"{settings.path or settings.source} gives no record (left out: {rejects}): look at "
            "its fields, data.subset and data.columns."
        )
    records = list(without_duplicates(drafts, rejects))
    records = split_records(records, fixed, settings.test_share, rejects)
    records = with_prefixes(with_options(records, confusable))
    if not any(r.goal == "attack" and r.split == "train" for r in records):
        records = attack_records(records, stay=fixed)
    records = beside(records, settings.beside, rejects)
    check_disjoint(records)
    return Collected(records, rejects, near_duplicates(records), revision)


def hub_repo(settings: SourceSettings) -> str | None:
    """The hub id that the rows come from; None where they are on this machine."""
    if settings.source in (None, "local") or (settings.path and Path(settings.path).exists()):
        return None
    return settings.path or find_source(settings.source, settings.subset).repo


def beside(records: list[Record], paths: tuple[str, ...], rejects: Rejects) -> list[Record]:
    """Add records of goals that the source has no rows for; questions asked already are left out.

    Raises:
        InputError: a file is no file of QA records.
    """
    present = {(r.goal, r.split) for r in records if r.form == "qa"}
    extra = [
        record
        for path in paths
        for record in read_records(Path(path))
        if (record.goal, record.split) not in present
        and record.goal in ("general", "neighbor")
        and record.anchor_of is None
    ]
    names = {record.id for record in records}
    renamed = []
    for record in extra:
        name = record.id
        while name in names:
            name = f"beside-{name}"
        names.add(name)
        renamed.append(record.model_copy(update={"id": name}))
    merged = list(without_duplicates([*records, *renamed], rejects))
    return split_records(merged, {r.id: r.split for r in merged}, 0.5, rejects)


def is_records(path: Path) -> bool:
    """Whether a file holds QA records already, by its first line."""
    if not path.is_file() or path.suffix.lower() != ".jsonl":
        return False
    first = next(read_rows(path, Rejects()), {})
    return "id" in first and first.get("goal") in GOALS


def _records(
    name: str, part: Part, rows: Iterator[Row], settings: SourceSettings, rejects: Rejects
) -> Iterator[tuple[Record, list[str]]]:
    """The records of one part; `index` in meta is the row's place in the benchmark."""
    found = 0
    for index, row in enumerate(islice(rows, settings.limit)):
        try:
            for piece, fields in enumerate(part.read(_renamed(row, settings.columns))):
                wrong = fields.pop("confusable", [])
                mark = f"{index}" if piece == 0 else f"{index}.{piece}"
                yield _record(name, part, mark, index, fields), wrong
                found += 1
        except RowError as error:
            rejects.add(str(error), row)
        except ValidationError as error:
            rejects.add(error.errors()[0]["msg"].removeprefix("Value error, "), row)
    if not found and not part.optional and settings.subset is None:
        raise InputError(
            f"{part.name} of {name} gives no record (left out: {rejects}): its rows need "
            f"{', '.join(part.columns or LOCAL_FIELDS)}."
        )


def _record(name: str, part: Part, mark: str, index: int, fields: Fields) -> Record:
    meta = {"index": index, "part": part.name, **fields.get("meta", {})}
    row = {"id": f"{name}-{part.name}-{mark}", "goal": part.goal, "source": name, **fields}
    return Record.model_validate({**row, "meta": meta})


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    for name, column in columns.items():
        if column not in row:
            raise RowError(f"no column {column}")
        row = {**row, name: row[column]}
    return row


def _source_files(
    source: Source, settings: SourceSettings, rejects: Rejects
) -> Iterator[tuple[Part, Iterator[Row]]]:
    path = Path(settings.path)
    if path.is_file():
        part = source.parts[0]
        yield part, read_rows(path, rejects, require=_required(part, settings))
        return
    files = files_under(path, SUFFIXES, rejects)
    for part in source.parts:
        chosen = _files_of(part, files, path)
        if chosen:
            yield part, _chain(chosen, part, settings, rejects)
        elif not part.optional:
            raise InputError(
                f"{path} has no file for {part.name} of {source.name}: put {part.name}.jsonl "
                f"(or .json, .csv, .parquet) with {', '.join(part.columns)} there."
            )


def _chain(
    files: list[Path], part: Part, settings: SourceSettings, rejects: Rejects
) -> Iterator[Row]:
    for file in files:
        yield from read_rows(file, rejects, require=_required(part, settings))


def _required(part: Part, settings: SourceSettings) -> list[str]:
    return [settings.columns.get(name, name) for name in part.columns]


def _files_of(part: Part, files: list[Path], folder: Path) -> list[Path]:
    """Files called as the part: `part.jsonl`, `part_sample400.jsonl`, `part/0000.parquet`.

    Where the hub's folder of its config is there too, only files inside it count.
    """
    inside = [file for file in files if part.config in file.relative_to(folder).parts[:-1]]
    files = inside or files
    for name in (part.name, *part.others):
        exact = [file for file in files if file.stem == name]
        if exact:
            return exact
        shards = [
            file
            for file in files
            if file.stem.startswith((f"{name}-0", f"{name}_sample"))
            or name in file.relative_to(folder).parts[:-1]
        ]
        if shards:
            return shards
    return []


def _hub_parts(
    source: Source, settings: SourceSettings
) -> tuple[str | None, list[tuple[Part, Iterator[Row]]]]:
    repo = settings.path or source.repo
    revision = settings.revision or commit_of(repo, None)
    streaming = settings.streaming or source.stream
    return revision, [
        (part, hub_rows(source, repo, part, revision, streaming=streaming)) for part in source.parts
    ]


def _local_parts(
    settings: SourceSettings, rejects: Rejects
) -> Iterator[tuple[Part, Iterator[Row]]]:
    """Files of any names: the goal is a column, or what the file's name begins with."""
    path = Path(settings.path)
    if not settings.path or not path.exists():
        raise InputError(
            f"data.path {settings.path or '(empty)'} does not exist: name a file or folder."
        )
    files = [path] if path.is_file() else files_under(path, SUFFIXES, rejects)
    if not files:
        raise InputError(f"{path} holds no file of {', '.join(SUFFIXES)}.")
    stems = Counter(file.stem for file in files)
    for file in files:
        # Ids are made of it: files of one name in two folders, or of two kinds, are told apart.
        name = file.stem if stems[file.stem] == 1 else file.relative_to(path).as_posix()
        stem = file.stem.lower()
        goal = next((g for g in GOALS if stem.startswith(g)), None)
        if goal is None and "goal" not in settings.columns and not _has_goal(file):
            raise InputError(
                f"{file}: say which goal its rows have, by a column `goal`, by --set "
                f"data.columns.goal=COLUMN, or by a name that begins with {', '.join(GOALS)}."
            )
        held: Split | None = next((s for s in get_args(Split) if f"_{s}" in stem), None)
        part = Part(name, None, "train", goal or "forget", _local_row, (), held=held)
        require = [settings.columns.get(name, name) for name in LOCAL_FIELDS]
        is_text = settings.columns.get("text", "text") in _first(file)
        yield part, read_rows(file, rejects, require=[] if is_text else require)


def _first(file: Path) -> Row:
    return next(read_rows(file, Rejects()), {})


def _has_goal(file: Path) -> bool:
    return _first(file).get("goal") in GOALS


def _local_row(row: Row) -> Iterator[Fields]:
    """Question and answer, multiple choice, or text, by the fields that a row has."""
    read = choice_row if "choices" in row else text_row if "text" in row else qa_row
    for fields in read(row):
        goal: Goal | None = row.get("goal") if row.get("goal") in GOALS else None
        if "goal" in row and goal is None:
            raise RowError(f"goal that is none of {', '.join(GOALS)}")
        extra: Fields = {"goal": goal} if goal else {}
        if isinstance(row.get("prefix"), str) and row["prefix"].strip():
            extra["prefix"] = row["prefix"]
        if isinstance(row.get("topic"), str) and row["topic"].strip():
            extra["topic"] = row["topic"]
        if row.get("aliases"):
            extra["aliases"] = [*fields.get("aliases", []), *_texts(row["aliases"])]
        if row.get("split"):
            if row["split"] not in get_args(Split):
                raise RowError(f"split that is none of {', '.join(get_args(Split))}")
            extra["split"] = row["split"]
        yield {**fields, **extra}


def _texts(given: Any) -> list[str]:
    """Texts of a list; a CSV cell holds it as JSON, or is one text."""
    found = from_cell(given)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RowError("aliases that are no list of texts")
    return [text for text in found if text.strip()]
