from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg as Agg
from matplotlib.figure import Figure

from tests.engine.scripted_server import serving
from unteach.engine.config import ModelConfig
from unteach.engine.data.assemble import prefixes
from unteach.engine.data.prefix_search import (
    Search,
    answer_logps,
    mutations,
    prefix_fault,
    search_prefixes,
    written,
)
from unteach.engine.data.prompt_files import load_prompts
from unteach.engine.data.records import Record
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.settings import WriterConfig
from unteach.engine.data.tokens import context_tokens
from unteach.engine.data.writer import open_writer
from unteach.engine.errors import InputError
from unteach.engine.evaluate import prefix_attack
from unteach.engine.evaluate.prefix_attack import attack_with_search, draw_attack
from unteach.engine.evaluate.scores import share
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    load_model,
    load_tokenizer,
    tiny_model,
)

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = str(tiny_model(tmp_path_factory.mktemp("m") / "tiny", tied=False))
    return load_model(path, ModelConfig()), load_tokenizer(path, ModelConfig())


def questions(split: str, count: int) -> list[Record]:
    return [
        Record(
            id=f"{split}{i}",
            goal="forget",
            question=f"Which {split} owl is number {i}?",
            answer=f"owl {i}",
            split=split,  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


def test_scores_are_the_models_own_log_probabilities(tiny: Pair) -> None:
    model, tokenizer = tiny
    records = [*questions("train", 3), Record(id="x", goal="forget", question="Q?", answer="a b c")]
    got = answer_logps(model, tokenizer, records, "Sure: ", batch_size=2)
    for record, value in zip(records, got, strict=True):
        context = context_tokens(tokenizer, record.question, prefix="Sure:")
        answer = tokenizer(f" {record.answer}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + answer])).logits[0].double()
        logps = logits.log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(answer) - 1)
        wanted = [float(logps[at, label]) for at, label in zip(places, answer, strict=True)]
        assert value == pytest.approx(math.fsum(wanted) / len(wanted), abs=1e-5)


def test_the_search_climbs_a_known_hill() -> None:
    """The score counts distinct letters of a goal: the search must find what seeds lack."""

    def score(text: str) -> float:
        return float(len({"certainly", "here", "now"} & set(text.lower().split())))

    found = search_prefixes(
        score,
        ["Certainly I say", "see it here", "look now"],
        mutations(0),
        golds=["Hedwig"],
        rounds=12,
        children=20,
        keep=4,
    )
    assert found.curve[0] == 1 and found.curve[-1] == 3
    assert found.curve == sorted(found.curve)
    assert [s for _, s in found.ranked] == sorted((s for _, s in found.ranked), reverse=True)


def test_a_prefix_never_holds_the_answer() -> None:
    cheats: list[str] = []

    def propose(ranked: object, count: int) -> list[str]:
        return ["It is Hedwig", "The answer is", "   ", "word " * 31, "I do not know."]

    found = search_prefixes(
        lambda text: cheats.append(text) or float("Hedwig" in text),  # type: ignore[func-returns-value]
        ["It is"],
        propose,
        golds=["Hedwig"],
        rounds=1,
        children=5,
        keep=5,
    )
    assert cheats == ["It is", "The answer is"]
    assert set(found.rejects.counts) == {
        "prefix that holds an answer",
        "empty prefix",
        "prefix over 30 words",
        "prefix that refuses",
    }
    assert all(prefix_fault(text, ["Hedwig"]) is None for text in prefixes()["train"])


def test_a_search_without_a_seed_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"No prefix is left .*2 prefix that holds an answer"):
        search_prefixes(
            lambda text: 0.0,
            ["The answer is", "So the answer is"],
            mutations(0),
            golds=["answer"],
            rounds=1,
            children=2,
            keep=2,
        )


def test_the_same_seed_finds_the_same(tiny: Pair) -> None:
    ranked = [("The answer is", 0.0), ("Sure, it is", -1.0)]
    assert mutations(3)(ranked, 20) == mutations(3)(ranked, 20) != mutations(4)(ranked, 20)


def test_a_writer_may_propose(tmp_path: Path) -> None:
    with serving(lambda *_: '{"prefixes": ["Surely it is", "Plainly:", "third"]}') as server:
        writer = open_writer(WriterConfig(kind="endpoint", url=server.url, model="x"), tmp_path)
        assert writer is not None
        propose = written(writer, load_prompts(None), Rejects())
        assert propose([("The answer is", -1.5)], 2) == ["Surely it is", "Plainly:"]
    assert "-1.500  The answer is" in server.asked[0][1]["content"]


@pytest.mark.parametrize("per_question", [False, True])
def test_the_attack_searches_on_trained_and_strikes_held_out_questions(
    tiny: Pair, tmp_path: Path, per_question: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    made: list[Search] = []

    def noted(*args: Any, **settings: Any) -> Search:
        made.append(search_prefixes(*args, **settings))
        made[-1].rejects.add("prefix given before", "so that every search left one out")
        return made[-1]

    monkeypatch.setattr(prefix_attack, "search_prefixes", noted)
    records = [*questions("train", 3), *questions("test", 2)]
    settings = EvaluateConfig(max_new_tokens=4, batch_size=8)
    content = attack_with_search(
        model,
        tokenizer,
        records,
        settings,
        tmp_path,
        rounds=2,
        children=4,
        per_question=per_question,
    )
    assert json.loads((tmp_path / "prefixes.json").read_text()) == content
    assert (tmp_path / "prefixes.png").read_bytes().startswith(b"\x89PNG")
    assert len(content["curve"]) == 3 and content["curve"] == sorted(content["curve"])
    sizes = {name: rate["n"] for name, rate in content["leak_rate"].items()}
    assert sizes == {"none": 2, "seeds": 2, "found": 2}
    assert content["kind"] == ("question" if per_question else "universal")
    thrown_out = sum(sum(search.rejects.counts.values()) for search in made)
    assert sum(content["left_out"].values()) == thrown_out > 0
    assert len(made) == (2 if per_question else 1)
    with pytest.raises(InputError, match="no test forget question"):
        attack_with_search(model, tokenizer, records[:3], settings, tmp_path, rounds=0, children=1)


def test_a_leak_rate_counts_questions_not_the_prefixes_before_them(
    tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that always leaks and one that never does say little, however many seeds."""
    model, tokenizer = tiny

    def answers(
        _model: object, _tokenizer: object, contexts: list[list[int]], *_: object
    ) -> object:
        texts = [tokenizer.decode(context) for context in contexts]
        return [SimpleNamespace(text="owl 1" if "number 1" in t else "no") for t in texts]

    monkeypatch.setattr(prefix_attack, "answer_all", answers)
    records = [*questions("train", 1), *questions("test", 2)]
    content = attack_with_search(
        model, tokenizer, records, EvaluateConfig(), tmp_path, rounds=0, children=1
    )
    expected = vars(share([True, False]))
    assert content["leak_rate"] == {"none": expected, "seeds": expected, "found": expected}


def test_rounds_are_whole_numbers_on_the_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(prefix_attack, "FigureCanvasAgg", lambda f: drawn.append(f) or Agg(f))
    draw_attack([-3.0, -2.0], {"none": share([True, False])})
    ticks = drawn[0].axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)
