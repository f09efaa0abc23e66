"""Rows of local files, one at a time and in constant memory, whatever the file holds.

JSON lines, JSON, CSV and Parquet. A damaged line is counted and left out; a file that gives no row
at all is an error. Nothing is unpacked and no link is followed out of the folder that was named.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unteach.engine.data.records import encodable
from unteach.engine.data.rejects import Rejects
from unteach.engine.errors import InputError, reason

Row = dict[str, Any]
MAX_LINE = 16 * 2**20
MAX_JSON = 256 * 2**20
MAX_ROW_GROUP = 2 * 2**30
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NO_TEXT = "row with half a surrogate pair"
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br"}


def read_rows(path: Path, rejects: Rejects, *, require: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of one file, lazily.

    Args:
        require: columns that a CSV or Parquet file must have.
    Raises:
        InputError: the file is compressed, empty, of no known kind, or lacks a column.
    """
    kind = path.suffix.lower()
    if kind in COMPRESSED:
        raise InputError(f"{path} is compressed: unpack it, look at its size, and name the files.")
    if kind not in SUFFIXES:
        raise InputError(f"{path} is none of {', '.join(SUFFIXES)}: save its rows as one of them.")
    try:
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} is empty: it gives no row.")
        readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
        yield from readers[kind](path, rejects, require)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}.") from error


def files_under(folder: Path, suffixes: Sequence[str], rejects: Rejects) -> list[Path]:
    """Files of these kinds in a folder, sorted; links that lead out of it are counted, not read."""
    root, found = folder.resolve(), []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            rejects.add("link out of the folder", str(path))
        elif path.suffix.lower() in COMPRESSED:
            rejects.add("compressed file", str(path))
        elif path.suffix.lower() in suffixes:
            found.append(path)
    return found


def text_lines(path: Path, rejects: Rejects, *, damaged: bool = False) -> Iterator[str]:
    """Lines of a UTF-8 file, line ends kept; those over 16 MiB or not UTF-8 are counted.

    Args:
        damaged: give lines that are not UTF-8 too, a lone surrogate for every bad byte, uncounted.
    """
    errors = "surrogateescape" if damaged else "strict"
    with path.open("rb") as stream:
        first = True
        while raw := stream.readline(MAX_LINE + 1):
            if len(raw) > MAX_LINE:
                rejects.add("line over 16 MiB", f"{path}: {raw[:80]!r}")
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE)
                continue
            try:
                text = raw.decode("utf-8-sig" if first else "utf-8", errors)
            except UnicodeDecodeError:
                rejects.add("invalid UTF-8", f"{path}: {raw[:80]!r}")
                continue
            finally:
                first = False
            yield text


def _jsonl(path: Path, rejects: Rejects, require: Sequence[str]) -> Iterator[Row]:
    for line in text_lines(path, rejects):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            rejects.add("line that is no JSON", f"{path}: {line}")
            continue
        if not isinstance(row, dict):
            rejects.add("row that is no object", f"{path}: {line}")
        elif "\\u" in line and not encodable(row):
            rejects.add(NO_TEXT, f"{path}: {line}")
        else:
            yield row


def _json(path: Path, rejects: Rejects, require: Sequence[str]) -> Iterator[Row]:
    if _one_object_a_line(path):  # as the hub's own .json files often are
        yield from _jsonl(path, rejects, require)
        return
    if path.stat().st_size > MAX_JSON:
        raise InputError(f"{path} is one JSON value of over 256 MiB: save it as JSON lines.")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON in UTF-8 ({error}): save it anew.") from error
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise InputError(f"{path} holds no list of rows.")
    for row in value:
        if not isinstance(row, dict):
            rejects.add("row that is no object", row)
        elif not encodable(row):
            rejects.add(NO_TEXT, f"{path}")
        else:
            yield row


def _one_object_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        line = stream.readline(MAX_LINE)
    try:
        return isinstance(json.loads(line), dict) and path.stat().st_size > len(line)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, rejects: Rejects, require: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)  # of the whole process; 128 KiB of its own would refuse texts
    # A line of a quoted cell must not fall out alone: its row is known by what stands in its place.
    reader = csv.DictReader(text_lines(path, rejects, damaged=True), strict=True)
    try:
        names = reader.fieldnames or []
        if not encodable(names):
            raise InputError(f"{path} has a column name that is not UTF-8: save it as UTF-8.")
        _check_columns(path, names, require)
        for row in reader:
            if not encodable(row):
                rejects.add("invalid UTF-8", f"{path}: {row}")
            elif None in row or None in row.values():
                rejects.add("CSV row with too many or too few fields", f"{path}: {row}")
            else:
                yield row
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: no CSV ({error}); quote fields that hold commas, "
            "quotes or line breaks."
        ) from error


def _parquet(path: Path, rejects: Rejects, require: Sequence[str]) -> Iterator[Row]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        meta = file.metadata
        groups = [meta.row_group(index).total_byte_size for index in range(meta.num_row_groups)]
        if max(groups, default=0) > MAX_ROW_GROUP:
            raise InputError(f"{path} unpacks to over 2 GiB in one row group: split it.")
        _check_columns(path, file.schema_arrow.names, require)
        files = [glob.escape(str(path))]  # `datasets` takes a name for a pattern
        table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for row in table:
            yield dict(row)
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"{path} is no Parquet file: {str(error).splitlines()[0]}.") from error


def _check_columns(path: Path, names: Sequence[str], require: Sequence[str]) -> None:
    missing = [name for name in require if name not in names]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]} (it has {', '.join(names) or 'none'}): rename it, "
            f"or say --set data.columns.{missing[0]}=NAME."
        )
