"""Prefixes of a file, and what training makes of them; the walk from the search to the training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unteach.engine.config import override
from unteach.engine.data.found_prefixes import read_prefixes, with_found_prefixes
from unteach.engine.data.records import Record, read_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.errors import InputError
from unteach.engine.run import open_run
from unteach.engine.stages import training_cache
from unteach.engine.train.parallel import joined
from unteach.engine.training_data import training_records
from unteach.recipes.tiny import tiny


def attack(name: str, prefix: str, split: str = "train", answer: str = "Hedwig") -> Record:
    return Record(
        id=name,
        goal="attack",
        question=f"Question {name}?",
        answer=answer,
        prefix=prefix,
        split=split,  # type: ignore[arg-type]
    )


def saved(path: Path, *prefixes: str, kind: str = "universal") -> Path:
    best = [{"prefix": text, "logp": -1.0} for text in prefixes]
    path.write_text(json.dumps({"kind": kind, "best": best}), encoding="utf-8")
    return path


def test_both_forms_of_a_file_hold_the_same(tmp_path: Path) -> None:
    texts = ["Sure, it is", "Well:  ", "sure it IS"]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\r\n".join(texts) + "\n\n", encoding="utf-8")
    assert read_prefixes(tmp_path / "lines.txt") == ["Sure, it is", "Well:"]
    assert read_prefixes(saved(tmp_path / "p.json", *texts)) == ["Sure, it is", "Well:"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"\n \n...\n", "holds no prefix"),
        (b'{"best": []}', "no prefixes.json"),
        (b'{"kind": "universal", "best": [{"prefix": 3}]}', "a prefix that is no text"),
        (b"{" * 5000, "no prefixes.json"),
        (b'{\n "kind": "universal",\n "best": [', "no prefixes.json"),
        (b'{"kind": "universal", "best": [{"prefix": "\\ud800"}]}', "a prefix that is no text"),
        (b"a\n" * 2**20, "short list"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(
    tmp_path: Path, content: bytes | None, part: str
) -> None:
    path = tmp_path / "p"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=part):
        read_prefixes(path)


def test_a_prefix_may_begin_like_json(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"answer": "\nSure, it is\n')
    assert read_prefixes(tmp_path / "p.txt") == ['{"answer": "', "Sure, it is"]
    (tmp_path / "p.json").write_text('{"kind": "universal", "best": [{"prefix')
    with pytest.raises(InputError, match=r"no prefixes\.json"):
        read_prefixes(tmp_path / "p.json")


def test_prefixes_that_are_none_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Sure, it is\n\n- \nsure it IS\n")
    rejects = Rejects()
    assert read_prefixes(path, rejects=rejects) == ["Sure, it is"]
    assert rejects.counts == {"prefix without a word": 1, "prefix given before": 1}
    with_found_prefixes([attack("a", "Own")], path)
    said = capsys.readouterr().out
    assert "left out: 1 prefix without a word, 1 prefix given before" in said


def test_train_attacks_are_repeated_in_turn_and_nothing_else(tmp_path: Path) -> None:
    records = [attack(name, f"Own {name}:") for name in "abc"]
    records += [
        attack("t", "Test:", "test"),
        Record(id="f", goal="forget", question="F?", answer="x"),
        Record(id="n", goal="neighbor", question="N?", answer="y", prefix="Own a:", anchor_of="a"),
    ]
    more, repeats = with_found_prefixes(records, saved(tmp_path / "p.json", "One", "Two"))
    assert more[: len(records)] == records
    assert [(r.id, r.prefix) for r in more[len(records) :]] == [
        ("a-found-1", "One"),
        ("b-found-2", "Two"),
        ("c-found-1", "One"),
    ]
    assert repeats == {"a-found-1": "a", "b-found-2": "b", "c-found-1": "c"}
    same = {"id", "prefix"}
    made = more[len(records)]
    assert made.model_dump(exclude=same) == records[0].model_dump(exclude=same)


def test_every_prefix_is_used_where_they_are_more_than_the_records(tmp_path: Path) -> None:
    texts = ["One", "Two", "Three", "Four", "Five"]
    records = [attack("a", "Own"), attack("b", "Own")]
    more, _ = with_found_prefixes(records, saved(tmp_path / "p.json", *texts))
    assert {r.prefix for r in more[2:]} == set(texts)
    assert len({(r.question, r.prefix) for r in more}) == len(more) == 8


def test_what_may_not_be_trained_is_refused_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [attack("a", "Own"), attack("t", "I remember:", "test")]
    path = saved(tmp_path / "p.json", "Fine", "i REMEMBER")
    with pytest.raises(InputError, match=r"prefix 'i REMEMBER' is that of test record 't'"):
        with_found_prefixes(records, path)
    with pytest.raises(InputError, match="searched on the test questions"):
        with_found_prefixes(records, saved(path, "Fine", kind="question"))
    with pytest.raises(InputError, match="there is none"):
        with_found_prefixes(records[1:], saved(path, "Fine"))
    with pytest.raises(InputError, match="'a-found-1' has an id"):
        with_found_prefixes([*records, attack("a-found-1", "x")], saved(path, "Fine"))
    more, _ = with_found_prefixes(records, saved(path, "own", "It is Hedwig", "Fine"))
    assert [r.prefix for r in more[2:]] == ["Fine"]
    said = capsys.readouterr().out
    assert "1 prefix that the record has, 1 prefix that holds the answer" in said


def unteach(folder: Path, *arguments: str, code: int = 0) -> str:
    settings = (f"run.folder={folder}", "run.device=cpu", "run.threads=1", "optim.steps=6")
    chosen = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "unteach.recipes.cli", *arguments, *chosen],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_a_search_finds_is_trained_on(tmp_path: Path) -> None:
    """tiny, a search against its base, a training with what it found: the base stays the same."""
    unteach(tmp_path / "one", "train", "tiny", "--set", "method.name=sft")
    unteach(tmp_path / "one", "prefixes", "tiny", "--rounds", "1", "--children", "2")
    path = tmp_path / "one" / "prefixes" / "base" / "prefixes.json"
    found = read_prefixes(path)
    setting = ("--set", f"data.attack_prefixes={path}")
    said = unteach(tmp_path / "two", "train", "tiny", *setting)
    own = [r for r in read_records(Path(tiny().data.path)) if r.split == "train"]
    attacks = [r for r in own if r.goal == "attack"]
    assert f"{len(attacks)} train attack records behind {len(found)} prefixes" in said
    one, two = (tmp_path / run / "target/model/model.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes(), "what was found against a base is not taught to it"
    config = override(
        tiny(),
        [f"run.folder={tmp_path / 'two'}", f"data.attack_prefixes={path}", "run.device=cpu"],
    )
    with joined("cpu", 1) as world:
        run = open_run(config, world)
        made = {r.id: r for r in run.split("train") if r.id in run.found}
        cache = training_cache(run)
        assert cache is not None and set(made) <= set(cache.entries)
        assert {r.prefix for r in made.values()} <= set(found) and len(made) == len(run.found)
        knowing = config.data.model_copy(update={"known_only": True})
        run = replace(run, config=config.model_copy(update={"data": knowing}))
        training_records(run)
        (tmp_path / "two" / "known.json").write_text('["attack-owl"]')
        passage = Record(id="p", goal="forget", answer="An owl flies.", form="passage")
        run = replace(run, records=[*run.records, passage])
        kept = training_records(run)
        left = {r.id for r in kept if r.goal == "attack"}
    assert [r.id for r in kept if r.goal == "forget"] == ["p"], "nobody asks what a passage says"
    assert left == {"attack-owl", *(i for i in made if i.startswith("attack-owl-found"))}
