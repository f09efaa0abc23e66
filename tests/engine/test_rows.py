from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unteach.engine.data.chunks import chunked, passages
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.rows import files_under, read_rows
from unteach.engine.errors import InputError

here = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def rows_of(path: Path, *require: str) -> tuple[list[dict[str, Any]], Rejects]:
    rejects = Rejects()
    return list(read_rows(path, rejects, require=require)), rejects


@here
@given(rows=st.lists(st.dictionaries(plain, plain | st.integers() | st.none()), max_size=6))
def test_json_lines_survive_a_round_trip(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [{"first": 1}, *rows]), encoding="utf-8")
    got, rejects = rows_of(path)
    assert got == [{"first": 1}, *rows] and not rejects.counts


@here
@given(junk=st.binary(min_size=1, max_size=200))
def test_any_bytes_give_rows_or_counts_or_one_sentence(tmp_path: Path, junk: bytes) -> None:
    for name in ("r.jsonl", "r.json", "r.csv", "r.parquet"):
        path = tmp_path / name
        path.write_bytes(junk)
        try:
            got, rejects = rows_of(path)
        except InputError as error:
            assert str(error).strip() and "\n" not in str(error).strip()
            continue
        assert all(isinstance(row, dict) for row in got)
        if name == "r.jsonl":  # every line that is not blank is a row or is counted
            lines = [line for line in junk.split(b"\n") if not _blank(line)]
            assert len(got) + sum(rejects.counts.values()) == len(lines)


def _blank(line: bytes) -> bool:
    try:
        return not line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return False


@here
@given(
    cells=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20),
            st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_csv_survives_a_round_trip(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    path = tmp_path / "r.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("question", "answer"), *cells])
    got, _ = rows_of(path, "question", "answer")
    assert [(row["question"], row["answer"]) for row in got] == cells


def test_a_line_of_100_mb_is_counted_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as stream:
        for _ in range(100):
            stream.write(b"x" * 2**20)
        stream.write(b'\n{"question": "after"}\n')
    got, rejects = rows_of(path)
    assert got == [{"question": "after"}]
    assert rejects.counts == {"line over 16 MiB": 1}


def test_a_damaged_csv_row_is_left_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b'question,answer\n"good \n\xff bad\nmore",b\nnext,c\nlast\xff,d\n')
    got, rejects = rows_of(path, "question")
    assert got == [{"question": "next", "answer": "c"}] and rejects.counts == {"invalid UTF-8": 2}
    path.write_bytes(b"question,\xff\na,b\n")
    with pytest.raises(InputError, match="a column name that is not UTF-8"):
        rows_of(path)


def test_a_csv_cell_may_hold_a_long_text(tmp_path: Path) -> None:
    path, text = tmp_path / "r.csv", "word " * 40_000
    path.write_text(f'text\n"{text}"\n')
    assert rows_of(path, "text")[0] == [{"text": text}]


def test_parquet_is_read_by_its_name_and_not_by_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "mine [v2]" / "what?.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list([{"question": "a"}]).to_parquet(str(path))
    datasets.Dataset.from_list([{"question": "b"}]).to_parquet(str(path.with_stem("whats")))
    assert rows_of(path)[0] == [{"question": "a"}]


def test_half_a_surrogate_pair_is_counted(tmp_path: Path) -> None:
    lines = [r'{"a": "\ud800"}', r'{"a": "\ud83d\ude00"}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.json").write_text(f"[{','.join(lines)}]")
    for name in ("r.jsonl", "r.json"):
        got, rejects = rows_of(tmp_path / name)
        assert got == [{"a": "\U0001f600"}]
        assert rejects.counts == {"row with half a surrogate pair": 1}


def test_invalid_utf8_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n{"a": "ok"}\n')
    got, rejects = rows_of(path)
    assert got == [{"a": "ok"}] and rejects.counts == {"invalid UTF-8": 1}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("r.jsonl", b"", "is empty"),
        ("r.jsonl.gz", b"\x1f\x8b", "is compressed"),
        ("r.zip", b"PK", "is compressed"),
        ("r.csv", b"question,reply\na,b\n", "no column answer"),
        ("r.csv", b'question,answer\n"open,b\n', "no CSV"),
        ("r.json", b"[1, 2", "no JSON"),
        ("r.json", b"7", "no list of rows"),
        ("r.parquet", b"PAR1 not", "no Parquet"),
        ("r.xlsx", b"PK", "is none of"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=part):
        rows_of(path, "question", "answer")


def test_json_of_lines_and_of_a_list_read_alike(tmp_path: Path) -> None:
    rows = [{"question": "a"}, {"question": "b"}]
    (tmp_path / "lines.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "inside.json").write_text(json.dumps({"version": 1, "data": rows}))
    for name in ("lines", "list", "inside"):
        assert rows_of(tmp_path / f"{name}.json")[0] == rows


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "secret.jsonl", tmp_path / "data"
    outside.write_text("{}\n")
    folder.mkdir()
    (folder / "inside.jsonl").write_text("{}\n")
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "bomb.jsonl.gz").write_bytes(b"\x1f\x8b")
    rejects = Rejects()
    assert files_under(folder, (".jsonl",), rejects) == [folder / "inside.jsonl"]
    assert rejects.counts == {"link out of the folder": 1, "compressed file": 1}


@here
@given(text=st.text(max_size=400), words=st.integers(1, 30))
def test_chunks_keep_every_word_in_order_and_no_more_than_asked(text: str, words: int) -> None:
    pieces = list(chunked(text, words))
    assert " ".join(pieces).split() == text.split()
    assert all(0 < len(piece.split()) <= words for piece in pieces)


def test_chunks_end_with_sentences_not_with_initials() -> None:
    text = 'It was read by J. K. Rowling. "Stop!" she said. Then 7 owls came.'
    assert list(chunked(text, 7)) == [
        "It was read by J. K. Rowling.",
        '"Stop!" she said. Then 7 owls came.',
    ]


def test_a_text_without_an_empty_line_is_not_held_whole() -> None:
    held = 0

    def lines() -> Any:
        nonlocal held
        for index in range(10_000):
            held = index
            yield f"Sentence number {index} stands here.\n"

    first = next(passages(lines(), 20))
    assert len(first.split()) <= 20 and held < 100
