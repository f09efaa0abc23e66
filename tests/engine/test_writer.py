from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.scripted_server import Fault, serving
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.replies import Choices, Pairs, ReplyError, parse_reply
from unteach.engine.data.settings import WriterConfig
from unteach.engine.data.writer import Writer, open_writer
from unteach.engine.errors import InputError

GOOD = '{"pairs": [{"question": "Who is the owl?", "answer": "Hedwig"}]}'
CHAT = (("system", "s"), ("user", "u"))


def open_at(url: str, folder: Path, **fields: Any) -> Writer:
    fast = {"kind": "endpoint", "model": "scripted", "backoff_s": 0.01, "timeout_s": 5, **fields}
    writer = open_writer(WriterConfig(url=url, **fast), folder)
    assert writer is not None
    return writer


def test_a_reply_is_asked_once_and_kept(tmp_path: Path) -> None:
    with serving(lambda messages, number: GOOD) as server:
        first = open_at(server.url, tmp_path)
        assert first.ask(CHAT) == GOOD
        assert first.spent["calls"] == 1 and first.spent["tokens"] == 50
        again = open_at(server.url, tmp_path)
        assert again.ask(CHAT) == GOOD
        assert again.spent["kept"] == 1 and again.spent["calls"] == 0
        assert len(server.asked) == 1
        other = open_at(server.url, tmp_path, max_new_tokens=7)
        other.ask(CHAT)
        assert len(server.asked) == 2
    assert server.asked[0] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    ]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(tmp_path: Path, status: int) -> None:
    with serving(lambda _, number: Fault(status) if number < 2 else GOOD) as server:
        assert open_at(server.url, tmp_path).ask(CHAT) == GOOD
        assert len(server.asked) == 3


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    with serving(lambda _, number: Fault(429, after="0.6") if number == 0 else GOOD) as server:
        assert open_at(server.url, tmp_path).ask(CHAT) == GOOD
    assert server.times[1] - server.times[0] >= 0.6


@pytest.mark.parametrize("after", ["-1", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_is_no_wait_is_ignored(tmp_path: Path, after: str) -> None:
    with serving(lambda _, number: Fault(429, after=after) if number == 0 else GOOD) as server:
        assert open_at(server.url, tmp_path).ask(CHAT) == GOOD
    assert server.times[1] - server.times[0] < 5


def test_a_silent_server_times_out_and_is_asked_again(tmp_path: Path) -> None:
    with serving(lambda _, number: Fault(silent_s=1.5) if number == 0 else GOOD) as server:
        assert open_at(server.url, tmp_path, timeout_s=0.3).ask(CHAT) == GOOD
        assert len(server.asked) == 2


def test_waits_double(tmp_path: Path) -> None:
    with serving(lambda *_: Fault(500)) as server:
        with pytest.raises(InputError, match=r"says 500, 4 times over: what it wrote is kept"):
            open_at(server.url, tmp_path, retries=3, backoff_s=0.2).ask(CHAT)
        gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, wait in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert wait / 2 <= gap


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_one_sentence_at_once(tmp_path: Path, status: int) -> None:
    with serving(lambda *_: Fault(status)) as server:
        with pytest.raises(InputError, match=rf"says {status}: check writer.url"):
            open_at(server.url, tmp_path).ask(CHAT)
        assert len(server.asked) == 1


def test_nobody_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not answer"):
        open_at("http://127.0.0.1:9/v1", tmp_path, retries=1).ask(CHAT)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTEACH_WRITER_KEY", "sk-secret-of-the-test")
    with serving(lambda *_: GOOD) as server:
        open_at(server.url, tmp_path).ask(CHAT)
    assert server.headers[0]["authorization"] == "Bearer sk-secret-of-the-test"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes()


def test_the_hub_token_is_never_sent_to_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.delenv("UNTEACH_WRITER_KEY", raising=False)
    with serving(lambda *_: GOOD) as server:
        open_at(server.url, tmp_path).ask(CHAT)
    assert "hf_of_the_user" not in json.dumps(server.headers)


def test_many_at_once_but_no_more_than_asked_and_in_order(tmp_path: Path) -> None:
    def slow(messages: list[dict[str, str]], number: int) -> Any:
        time.sleep(0.05)
        return messages[-1]["content"]

    with serving(slow) as server:
        writer = open_at(server.url, tmp_path, concurrency=4)
        items = [f"item {i}" for i in range(24)]
        got = list(writer.map(lambda text: writer.ask((("user", text),)), items))
    assert got == [(text, text) for text in items]
    assert 2 <= server.most_at_once <= 4


def test_the_same_question_at_once_is_asked_once(tmp_path: Path) -> None:
    def slow(messages: list[dict[str, str]], number: int) -> Any:
        time.sleep(0.05)
        return GOOD

    with serving(slow) as server:
        writer = open_at(server.url, tmp_path, concurrency=8)
        assert [text for _, text in writer.map(writer.ask, [CHAT] * 8)] == [GOOD] * 8
    assert len(server.asked) == 1 and writer.spent["kept"] == 7


def test_the_rate_is_kept(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as server:
        writer = open_at(server.url, tmp_path, requests_per_minute=600)  # one in 0.1 s
        list(writer.map(lambda i: writer.ask((("user", f"{i}"),)), range(5)))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] >= 0.35 and min(gaps) > 0.02


@pytest.mark.parametrize("budget", [{"max_calls": 3}, {"max_tokens": 150}])
def test_the_budget_ends_the_work_and_a_second_run_goes_on(
    tmp_path: Path, budget: dict[str, int]
) -> None:
    with serving(lambda messages, _: messages[-1]["content"]) as server:
        for run in (1, 2):
            writer = open_at(server.url, tmp_path, concurrency=1, **budget)
            chats = [(("user", f"{i}"),) for i in range(20)]
            got = list(writer.map(writer.ask, chats))
            assert [chat for chat, _ in got] == chats[: 3 * run]
            assert writer.spent["stopped"] == 1 and writer.spent["kept"] == 3 * (run - 1)
        assert len(server.asked) == 6


def test_a_bad_reply_is_repaired_once_then_counted(tmp_path: Path) -> None:
    rejects = Rejects()
    with serving(lambda _, number: "not JSON" if number == 0 else GOOD) as server:
        writer = open_at(server.url, tmp_path)
        value = writer.fill(CHAT, Pairs, rejects)
        assert value is not None and value.pairs[0].answer == "Hedwig"
        assert writer.spent["repaired"] == 1 and not rejects.counts
        assert server.asked[1][-2] == {"role": "assistant", "content": "not JSON"}
        assert "could not be read" in server.asked[1][-1]["content"]
    with serving(lambda *_: '{"pairs": [{"question": "only"}]}') as server:
        assert open_at(server.url, tmp_path / "b").fill(CHAT, Pairs, rejects) is None
        assert len(server.asked) == 2
    assert rejects.counts == {"reply that is no JSON of the shape": 1}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (GOOD, False),
        (f"```json\n{GOOD}\n```", True),
        (f"Sure! Here it is:\n{GOOD}\nHope this helps {{smile}}.", True),
        (f'{{"thought": 1}} {GOOD}', True),
    ],
)
def test_markup_around_json_is_taken_off(text: str, cleaned: bool) -> None:
    value, was = parse_reply(text, Pairs)
    assert value.pairs[0].question == "Who is the owl?" and was is cleaned


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"pairs": "none"}',
        '{"pairs": [{"question": "q?", "answer": 7}]}',
        '{"pairs": [{"question": "  ", "answer": "a"}]}',
        '{"pairs": [{"question": "q?", "answer": NaN}]}',
        GOOD + GOOD,
        "[" * 100_000,
        '{"a":' * 50_000,
        "x" * 300_000,
    ],
)
def test_what_is_no_reply_is_refused(text: str) -> None:
    with pytest.raises(ReplyError):
        parse_reply(text, Pairs)


PLAIN = "Q: Who flies?\nA: An owl\n\nQ:  What is tall? \nA: A  tower"


@pytest.mark.parametrize("cut", ["", "\nQ: And who", "\nQ:", "\nQ", "\nQ: Who?\nA"])
def test_small_models_may_reply_in_lines(cut: str) -> None:
    value, cleaned = parse_reply(PLAIN + cut, Pairs)
    found = [(pair.question, pair.answer) for pair in value.pairs]
    assert found == [("Who flies?", "An owl"), ("What is tall?", "A tower")] and not cleaned


@pytest.mark.parametrize(
    "text",
    [
        f"Here you are:\n{PLAIN}",
        f"{PLAIN}\nI hope this helps.\nBye",
        PLAIN.replace("A: An owl", "A:"),
        PLAIN.replace("Q: Who", "Who"),
        "Q: Who?\nQ: What?\nA: An owl\nA: A tower",
        "A: An owl",
        "Q: Who?",
        f"Q: Who?\nA: {'x' * 2001}",
    ],
)
def test_lines_of_another_shape_are_none(text: str) -> None:
    with pytest.raises(ReplyError):
        parse_reply(text, Pairs)
    with pytest.raises(ReplyError):
        parse_reply(PLAIN, Choices)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200) | st.binary(max_size=80).map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_shape_or_a_reply_error(text: str) -> None:
    for shape in (Pairs, Choices):
        try:
            value, _ = parse_reply(text, shape)
        except ReplyError:
            continue
        assert isinstance(value, shape)


word = st.text(min_size=1, max_size=12).filter(lambda s: s.strip())


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(word, word), max_size=4), noise=st.sampled_from(["", "Well: "]))
def test_every_right_reply_is_read_back(pairs: list[tuple[str, str]], noise: str) -> None:
    rows = [{"question": q, "answer": a} for q, a in pairs]
    value, cleaned = parse_reply(noise + json.dumps({"pairs": rows}), Pairs)
    assert [(p.question, p.answer) for p in value.pairs] == [
        (" ".join(q.split()), " ".join(a.split())) for q, a in pairs
    ]
    assert cleaned is bool(noise)


def test_text_that_utf8_cannot_hold_is_no_reply(tmp_path: Path) -> None:
    rejects = Rejects()
    with serving(
        lambda *_: '{"pairs": [{"question": "a\\ud800b", "answer": "c\ud800"}]}'
    ) as server:
        assert open_at(server.url, tmp_path).fill(CHAT, Pairs, rejects) is None
    assert rejects.counts == {"reply that is no JSON of the shape": 1}
    value, _ = parse_reply('{"pairs": [{"question": "a\\t b", "answer": "c\\n d"}]}', Pairs)
    assert value.pairs[0].question == "a b" and value.pairs[0].answer == "c d"


def test_a_damaged_kept_reply_is_asked_again(tmp_path: Path) -> None:
    with serving(lambda *_: GOOD) as server:
        open_at(server.url, tmp_path).ask(CHAT)
        (path,) = tmp_path.rglob("*.json")
        path.write_text('{"reply": 7}')
        assert open_at(server.url, tmp_path).ask(CHAT) == GOOD
        assert len(server.asked) == 2
