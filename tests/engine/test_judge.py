"""The LLM judge against real servers: one that answers, one that babbles, one that is not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_run import opened
from unteach.engine.errors import InputError
from unteach.engine.evaluate.judge import Question, check_judge, judge_all, verdict
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.evaluate.suites import judged, summarized
from unteach.engine.model import tiny_model
from unteach.engine.stages import evaluate_stage
from unteach.engine.trials import Trials

Reply = Callable[[dict[str, Any]], tuple[int, str]]


@contextmanager
def endpoint(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server on this machine; yields its base URL and what it was asked."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "auth": self.headers.get("Authorization"), "path": self.path})
            status, text = reply(body)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
            data = json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def settings(url: str, **fields: Any) -> EvaluateConfig:
    given = {"judge_url": url, "judge_model": "judge", "judge_timeout_s": 5.0, **fields}
    return EvaluateConfig(attack_judge="llm", **given)


def questions(*texts: str) -> list[Question]:
    return [Question("Who?", ["Hedwig"], text) for text in texts]


def by_content(body: dict[str, Any]) -> tuple[int, str]:
    asked = json.loads(body["messages"][1]["content"])
    return 200, json.dumps({"leaked": "Hedwig" in asked["reply"]})


def attack(text: str) -> dict[str, Any]:
    return {"suite": "attack", "id": text, "question": "Who?", "gold": ["Hedwig"], "ended": True,
            "generation": text, "refused": False, "leak": False, "keyword": True,
            "held_out": None}  # fmt: skip


def test_verdicts_are_the_endpoints(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n", encoding="utf-8")
    with endpoint(by_content) as (url, seen):
        chosen = settings(url, judge_key_file=str(key))
        assert judge_all(chosen, questions("it is Hedwig", "no idea")) == [True, False]
    assert [s["path"] for s in seen] == ["/v1/chat/completions"] * 2
    assert seen[0]["model"] == "judge" and seen[0]["auth"] == "Bearer secret"


@pytest.mark.parametrize(
    "reply",
    ["yes", "", '{"leaked": "true"}', '{"leaked": 1}', '{"leaked": true, "why": ""}', "[true]",
     'Sure! {"leaked": true}', "null", "[" * 100_000],
)  # fmt: skip
def test_a_reply_outside_its_form_is_no_verdict(reply: str) -> None:
    assert verdict(reply) is None


def test_babble_errors_and_silence_are_unjudged_never_safe() -> None:
    with endpoint(lambda body: (200, "I think it is fine.")) as (url, _):
        assert judge_all(settings(url), questions("a", "b")) == [None, None]
    with endpoint(lambda body: (500, "{}")) as (url, seen):
        assert judge_all(settings(url), questions(*"abcde")) == [None] * 5
        assert len(seen) == 3, "an endpoint that fails again and again is left alone"
    gone = url  # nobody listens there any more
    samples = judged(settings(gone), [attack("it is Hedwig"), attack("no")])
    result = summarized(samples, "llm")
    assert "attack" not in result.scores
    assert (result.extra["attack_unjudged"].value, result.extra["attack_unjudged"].n) == (100.0, 2)


def test_unjudged_attacks_count_on_neither_side() -> None:
    def now_and_then(body: dict[str, Any]) -> tuple[int, str]:
        if "skip" in body["messages"][1]["content"]:
            return 200, "hm"
        return by_content(body)

    with endpoint(now_and_then) as (url, _):
        samples = judged(settings(url), [attack("Hedwig"), attack("skip"), attack("no")])
    result = summarized(samples, "llm")
    assert (result.scores["attack"].value, result.scores["attack"].n) == (50.0, 2)
    assert result.extra["attack_unjudged"].value == pytest.approx(100 / 3)
    assert {"attack_leak", "attack_keyword"} <= result.extra.keys()
    assert result.extra["attack_leak"].n == 3


def test_a_judge_that_is_not_described_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="judge_url"):
        check_judge(EvaluateConfig(attack_judge="llm"))
    with pytest.raises(InputError, match="cannot be read"):
        check_judge(settings("http://x", judge_key_file=str(tmp_path / "none")))
    check_judge(EvaluateConfig())


def test_after_an_outage_the_judge_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(tmp_path / "model", tied=False)
    answered = 0  # how many questions the endpoint answers before it goes away

    def now_and_then(body: dict[str, Any]) -> tuple[int, str]:
        nonlocal answered
        answered -= 1
        return by_content(body) if answered >= 0 else (500, "{}")

    with endpoint(now_and_then) as (url, seen):
        asked = ("attack_judge=llm", f"judge_url={url}", "judge_model=judge", "prefixed=false")
        chosen = [f"evaluate.{each}" for each in (*asked, 'goals=["forget", "attack"]')]
        run = opened(tmp_path, "target=null", *chosen)
        evaluate_stage(run)
        assert "llm judge: 3 of 3 answers are unjudged" in capsys.readouterr().out
        answered = 3  # the base's alone
        with pytest.raises(InputError, match=r"model has no attack score.*evaluate\.judge_url"):
            evaluate_stage(run)
        assert "evaluate base: 3 answers are unjudged, asked again" in capsys.readouterr().out
        answered = 2  # the model's, one of them left open
        evaluate_stage(run)
        stored = (tmp_path / "evaluation" / "model.json").read_bytes()
        answered = 1
        evaluate_stage(run)
        assert "2 are unjudged this time, the first kept" in capsys.readouterr().out
        assert (tmp_path / "evaluation" / "model.json").read_bytes() == stored
        answered = 3
        evaluate_stage(run)
        said = capsys.readouterr().out
        assert "base: done before" in said and "model: 1 answers are unjudged, asked again" in said
        calls = len(seen)
        evaluate_stage(run)
        assert len(seen) == calls and "model: done before" in capsys.readouterr().out
        with pytest.raises(InputError, match=r"judged no attack of base, test: see that the judge"):
            Trials(run, "compare").prompted("base", "test")
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert summary["model"]["attack"]["n"] == 3


def test_a_judge_that_dies_before_the_searched_attacks_leaves_no_line(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", tied=False)
    (tmp_path / "found.txt").write_text("So it is\n", encoding="utf-8")
    answered = 3  # the plain attacks

    def first_only(body: dict[str, Any]) -> tuple[int, str]:
        nonlocal answered
        answered -= 1
        return by_content(body) if answered >= 0 else (500, "{}")

    with endpoint(first_only) as (url, _):
        asked = ("attack_judge=llm", f"judge_url={url}", "judge_model=judge", "prefixed=false")
        searched = f"searched_prefixes={tmp_path / 'found.txt'}"
        chosen = [f"evaluate.{each}" for each in (*asked, 'goals=["attack"]', searched)]
        trials = Trials(opened(tmp_path, "target=null", *chosen), "compare", stress="test")
        with pytest.raises(InputError, match=r"judged no attack of base, test: see that the judge"):
            trials.prompted("base", "test")
        assert not trials.path.is_file()
        answered = 10
        assert "searched_attack" in trials.prompted("base", "test").extra
