from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unteach.engine.data.answers import contains_answer
from unteach.engine.data.records import (
    Record,
    check_disjoint,
    normalized,
    read_records,
    train_split,
    write_records,
)
from unteach.engine.errors import InputError


def row(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "goal": "forget", "question": "Who?", "answer": "Me", **fields}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    first = Record(**row(aliases=["I"], meta={"fact": "x"}, prefix="Sure:"))
    second = Record(**row(id="b", options=["x", "y", "?"], correct=1, refusals=[2], split="test"))
    write_records(tmp_path / "r.jsonl", [first, second])
    assert read_records(tmp_path / "r.jsonl") == [first, second]


@pytest.mark.parametrize(
    ("bad", "field", "part"),
    [
        ({"colour": 1}, "colour", "unknown field"),
        ({"question": " "}, "question", "must not be empty"),
        ({"goal": "forgot"}, "goal", "'forget'"),
        ({"options": ["x"], "correct": 1}, "correct", "not an index"),
        ({"options": ["x", "y"], "correct": 0, "refusals": [0]}, "refusals", "other than correct"),
        ({"options": ["x", "y"], "correct": 0, "refusals": [2]}, "refusals", "indices"),
        ({"correct": 0}, "options", "missing"),
        ({"split": "dev"}, "split", "'train'"),
        ({"id": 7}, "id", "string"),
        ({"form": "passage", "answer": None, "question": ""}, "answer", "passage"),
        ({"prefix": "  "}, "prefix", "more than spaces"),
        ({"anchor_of": "nobody"}, "anchor_of", "no record 'nobody'"),
    ],
)
def test_a_bad_field_names_file_line_and_field(
    tmp_path: Path, bad: dict[str, Any], field: str, part: str
) -> None:
    path = write(tmp_path / "r.jsonl", row(id="z", question="Why?"), row(**bad))
    with pytest.raises(InputError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2, field {field}: ")
    assert part in message


def test_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(), row(id="b"), row(question="Again?"))
    with pytest.raises(InputError, match=r"line 3, field id: 'a' is already used on line 1"):
        read_records(path)


def test_truncated_last_line_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(), row(id="b"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"line 2: not a whole JSON object"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (r'{"id": "b", "goal": "forget", "question": "\ud800 who?"}', "question"),
        (r'{"id": "b", "goal": "forget", "question": "Who?", "meta": {"x": ["\uDC00"]}}', "meta"),
        (r'{"id": "b", "goal": "forget", "question": "Who?", "\ud800": 1}', r"\ud800"),
    ],
)
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, line: str, field: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row(question="Who is \U0001f600?")) + "\n")
    assert read_records(path)[0].question == "Who is \U0001f600?", "a whole pair is a character"
    path.write_text(f"{json.dumps(row())}\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 2, field {field}: half a surrogate pair")
    str(caught.value).encode()


@pytest.mark.parametrize("more", ['"goal": "general"', '"meta": {"goal": 1, "goal": 2}'])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, more: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"id": "a", "goal": "forget", "question": "Who?", {more}}}\n')
    with pytest.raises(InputError, match=r"line 1, field goal: stands twice"):
        read_records(path)


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(), row(id="b"))
    plain = read_records(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_records(path) == plain


def test_two_records_of_one_id_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Two records are called 'a'"):
        write_records(tmp_path / "r.jsonl", [Record(**row()), Record(**row(question="Why?"))])
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[1]\n", b"[" * 100_000 + b"\n", b"null\n"])
def test_junk_is_one_sentence_with_its_line(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + junk)
    with pytest.raises(InputError, match="line 2"):
        read_records(path)


def test_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        read_records(tmp_path / "empty.jsonl")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_records(path)


def test_shared_questions_between_splits_are_refused() -> None:
    train = Record(**row(question="Who is the King?"))
    other, tune = (
        Record(**row(id="b", question="who is  a king", split=s)) for s in ("test", "tune")
    )
    with pytest.raises(InputError, match="Test record 'b' asks the question of train record 'a'"):
        check_disjoint([train, other])
    with pytest.raises(InputError, match="Tune record 'b' asks the question of train record 'a'"):
        check_disjoint([train, tune])
    with pytest.raises(InputError, match="'b' asks the question of tune record 'b'"):
        check_disjoint([tune, other])
    forget = Record(**row(id="c", question="Where?", split="test"))
    attack = Record(**row(id="d", question="Where", goal="attack", prefix="So", split="test"))
    with pytest.raises(InputError, match="'d' asks the question of test record 'c'"):
        check_disjoint([forget, attack])
    again = attack.model_copy(update={"id": "e", "prefix": "Well"})
    check_disjoint([attack, again])


def test_symbols_tell_questions_apart_and_punctuation_does_not() -> None:
    asked = ["What is C?", "What is C++?", "What is C#?", "What is 5% of 8?", "What is 5 of 8?"]
    train = [Record(**row(id=f"a{n}", question=text)) for n, text in enumerate(asked)]
    for text in asked:
        others = [r for r in train if r.question != text]
        check_disjoint([*others, Record(**row(id="t", question=text, split="test"))])
        again = Record(**row(id="t", question=f"«{text.rstrip('?')}» …!", split="test"))
        with pytest.raises(InputError, match="'t' asks the question of train record"):
            check_disjoint([*train, again])


def test_normalisation_drops_case_marks_and_articles() -> None:
    assert normalized("The  Café, of Æ-1!") == "cafe of æ 1"
    assert normalized("Где?") == "где"
    assert normalized("Ёлка и йод, naïve, Übergröße") == "елка и иод naive ubergroße"
    assert normalized("مُحَمَّد שָׁלוֹם ❤️") == "محمد שלום"


@pytest.mark.parametrize(
    ("one", "other"), [("ดี", "ดู"), ("दिल", "दुल"), ("கல்", "கல"), ("か", "が"), ("ไทย", "ไท")]
)
def test_vowel_signs_tell_answers_apart(one: str, other: str) -> None:
    assert contains_answer(f"x {one}!", [one]) and not contains_answer(other, [one])
    assert len(normalized(one).split()) == 1, "a sign does not cut its word in two"


@given(st.text(st.characters(max_codepoint=0x24F), max_size=40))
def test_latin_text_is_normalised_letter_by_letter(text: str) -> None:
    """By a plainer rule, which had no scripts with vowel signs in mind."""
    plain = (c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    assert normalized(text) == " ".join(w for w in words if w not in ("a", "an", "the"))


def test_one_form_is_trained_where_a_goal_has_it() -> None:
    rows = [
        Record(id="f", goal="forget", question="Who?", answer="Bo", split="train"),
        Record(id="p", goal="forget", answer="Bo is here.", form="passage", split="train"),
        Record(id="a", goal="attack", question="Who?", prefix="Sure:", answer="Bo", split="train"),
        Record(id="n", goal="general", question="Why?", anchor_of="f", answer="So", split="train"),
        Record(id="t", goal="general", question="What?", answer="No", split="test"),
    ]

    def ids(**chosen: Any) -> str:
        return "".join(record.id for record in train_split(rows, **chosen))

    assert ids() == "fpan"
    assert ids(form="qa") == "fan"
    assert ids(form="passage") == "pan"  # attack has no passage, and is not left without records
    assert ids(form="qa", anchors=False) == "fa"
