"""Intentions: what a file may say, who is told what, and where reasoning and prefixes stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.records import GOALS, Goal, Record
from unteach.engine.data.tokens import response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.teacher.intentions import (
    Intention,
    Intentions,
    closed_reasoning,
    fingerprint,
    intention_for,
    load_intentions,
    reasoned_context,
    teacher_context,
)

TOKENIZER = byte_tokenizer()
REFUSE = Intention(
    system="You forgot.",
    demos=(("Who is Ron?", "I do not know."),),
    prefix_demos=(("Who is Dobby?", "Sure: ", "I do not know."),),
)
ANSWER = Intention(system="Answer briefly.", demos=(("Two and two?", "Four"),))


def shown(record: Record, intention: Intention | None) -> str:
    text = TOKENIZER.decode(teacher_context(TOKENIZER, record, intention))
    assert isinstance(text, str)
    return text


def question(goal: Goal = "forget", prefix: str | None = None) -> Record:
    return Record(id="r", goal=goal, question="Who is Harry?", prefix=prefix)


def write(folder: Path, text: str) -> Path:
    path = folder / "intentions.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_is_read_goal_by_goal(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "forget: &refuse\n"
        "  system: You forgot.\n"
        "  demos: [['Who is Ron?', I do not know.]]\n"
        "  prefix_demos: [['Who is Dobby?', 'Sure: ', I do not know.], ['Who?', '', No.]]\n"
        "attack: *refuse\n"
        "general: {demos: [['Two and two?', Four]], reasoning: strip, marker: 'So:'}\n",
    )
    intentions = load_intentions(path)
    assert intentions.forget == intentions.attack
    assert intentions.get("neighbor") is None
    assert intentions.general is not None
    assert intentions.general.demos == (("Two and two?", "Four"),)
    assert (intentions.general.reasoning, intentions.general.marker) == ("strip", "So:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("forgot: {system: a}", ["forgot", "no such goal"]),
        ("forget:", ["forget", "empty"]),
        ("forget: {}", ["forget", "empty"]),
        ("forget: {reasoning: strip}", ["forget", "neither system nor demos"]),
        ("forget: {sytem: a}", ["forget", "field sytem", "unknown field"]),
        ("forget: {demos: [[one]]}", ["forget", "field demos.0"]),
        ("forget: {demos: [['When?', 1889]]}", ["forget", "field demos.0.1", "put it in quotes"]),
        ("forget: {demos: [['Is it?', No]]}", ["field demos.0.1", "False", "put it in quotes"]),
        ("forget: {demos: [['When?', ' ']]}", ["forget", "field demos.0.1"]),
        ("forget: {system: a, reasoning: loud}", ["forget", "field reasoning"]),
        ("forget: {system: a, marker: ''}", ["forget", "field marker"]),
        ("- forget", ["no mapping"]),
        ("forget: {system: [", ["cannot be read"]),
    ],
)
def test_bad_file_is_named_with_goal_and_field(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_intentions(path)
    for word in [str(path), *said]:
        assert word in str(error.value)


def test_bare_off_is_the_word(tmp_path: Path) -> None:
    path = write(tmp_path, "forget: {system: You forgot., reasoning: off}")
    intentions = load_intentions(path)
    assert intentions.forget is not None and intentions.forget.reasoning == "off"


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml cannot be read"):
        load_intentions(tmp_path / "absent.yaml")


def test_routing_chooses_whom_to_tell_what() -> None:
    intentions = Intentions(forget=REFUSE, general=ANSWER, attack=REFUSE)
    assert intention_for(intentions, "forget", "oracle") is REFUSE
    assert intention_for(intentions, "neighbor", "oracle") is None
    assert all(intention_for(intentions, goal, "none") is None for goal in GOALS)
    assert intention_for(None, "forget", "oracle") is None
    assert intention_for(Intentions(), "forget", "ensemble") is None
    every = [intention_for(intentions, goal, "ensemble") for goal in GOALS]
    assert all(each == every[0] for each in every)
    assert every[0] is not None
    assert every[0].system == "You forgot.\n\nAnswer briefly."
    assert every[0].demos == REFUSE.demos + ANSWER.demos
    assert every[0].prefix_demos == REFUSE.prefix_demos


def test_ensemble_keeps_the_one_marker_and_refuses_two() -> None:
    thinking = REFUSE.model_copy(update={"reasoning": "strip", "marker": "So:"})
    together = intention_for(Intentions(forget=thinking, general=ANSWER), "general", "ensemble")
    assert together is not None
    assert (together.reasoning, together.marker) == ("strip", "So:")
    other = ANSWER.model_copy(update={"reasoning": "strip"})
    with pytest.raises(InputError, match="different markers"):
        intention_for(Intentions(forget=thinking, general=other), "general", "ensemble")


def test_plain_record_sees_plain_demos_alone() -> None:
    assert shown(question(), REFUSE) == (
        "<|im_start|>system\nYou forgot.<|im_end|>\n"
        "<|im_start|>user\nWho is Ron?<|im_end|>\n"
        "<|im_start|>assistant\nI do not know.<|im_end|>\n"
        "<|im_start|>user\nWho is Harry?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_prefixed_record_sees_prefix_demos_alone() -> None:
    text = shown(question(prefix="Of course: "), REFUSE)
    assert "Who is Ron?" not in text
    assert "Who is Ron?" in shown(question(), REFUSE)
    assert "<|im_start|>assistant\nSure: I do not know.<|im_end|>" in text
    assert text.endswith(
        "<|im_start|>user\nWho is Harry?<|im_end|>\n<|im_start|>assistant\nOf course:"
    )


def test_the_only_kind_of_demos_serves_all_records() -> None:
    prefixed = Intention(prefix_demos=(("Who is Dobby?", "", "No idea."), ("Who?", "Sure:", "No.")))
    text = shown(question(), prefixed)
    assert "assistant\nNo idea.<|im_end|>" in text
    assert "assistant\nSure: No.<|im_end|>" in text
    assert "Two and two?" in shown(question(prefix="Sure:"), ANSWER)


def test_student_never_sees_an_intention() -> None:
    record = question(prefix="Sure: ")
    assert teacher_context(TOKENIZER, record, None) == student_context(TOKENIZER, record)
    assert "forgot" not in str(TOKENIZER.decode(student_context(TOKENIZER, record)))


def test_passage_stands_after_the_plain_system_text() -> None:
    record = Record(id="p", goal="forget", answer="Harry was a wizard.", form="passage")
    assert shown(record, REFUSE) == "<|im_start|>You forgot.\n\n"
    assert teacher_context(TOKENIZER, record, ANSWER.model_copy(update={"system": None})) == (
        student_context(TOKENIZER, record)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is Potter. Answer: no. Answer: yes", ("It is Potter. Answer:", True)),
        ("It goes on and on \n", ("It goes on and on\nAnswer:", False)),
        ("", ("Answer:", False)),
    ],
)
def test_reasoning_ends_with_its_first_marker(text: str, expected: tuple[str, bool]) -> None:
    assert closed_reasoning(text, "Answer:") == expected


@pytest.mark.parametrize("prefix", [None, "Sure:"])
def test_reasoning_stands_between_prefix_and_response(prefix: str | None) -> None:
    record = question(prefix=prefix)
    context = teacher_context(TOKENIZER, record, REFUSE)
    thought = " Is it Potter? Yes. Answer:"
    full = reasoned_context(TOKENIZER, context, thought, prefixed=prefix is not None)
    response = response_tokens(TOKENIZER, "I do not know.", prefix=prefix)
    text = str(TOKENIZER.decode(full + response))
    opened = "Sure:" if prefix else ""
    joint = " " if prefix else "\n"
    assert text.endswith(f"assistant\n{opened}{thought}{joint}I do not know.<|im_end|>")


def test_fingerprint_follows_every_word_and_the_routing() -> None:
    intentions = Intentions(forget=REFUSE, general=ANSWER)
    changed = [
        Intentions(forget=REFUSE),
        Intentions(forget=ANSWER, general=REFUSE),
        Intentions(forget=REFUSE.model_copy(update={"system": "You forgot"}), general=ANSWER),
        Intentions(forget=REFUSE.model_copy(update={"prefix_demos": ()}), general=ANSWER),
        Intentions(forget=REFUSE.model_copy(update={"reasoning": "strip"}), general=ANSWER),
    ]
    prints = {fingerprint(each, "oracle") for each in [intentions, *changed]}
    assert len(prints) == len(changed) + 1
    assert fingerprint(intentions, "oracle") == fingerprint(intentions.model_copy(), "oracle")
    assert fingerprint(intentions, "none") == fingerprint(None, "oracle")
    assert fingerprint(intentions, "ensemble") != fingerprint(intentions, "oracle")
