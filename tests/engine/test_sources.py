"""Every loader on rows of its true schema; the hub is the only thing that is not real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unteach.engine.data.assemble import near_duplicates, prefixes
from unteach.engine.data.prepare import prepare, prepared
from unteach.engine.data.records import (
    Record,
    check_disjoint,
    counts,
    normalized,
    read_records,
    write_records,
)
from unteach.engine.data.settings import SourceSettings
from unteach.engine.data.sources import Collected, collect
from unteach.engine.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared rows are not here")


def qa(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {name} fact {i}?", "answer": f"{name} {i}"} for i in range(count)
    ]


def mcq(name: str, count: int, **more: Any) -> list[dict[str, Any]]:
    choices = ["red", "green", "blue", "grey"]
    return [
        {"question": f"Which {name} colour {i}?", "choices": choices, "answer": i % 4, **more}
        for i in range(count)
    ]


def rwku(level: int, kind: str, count: int, *, side: str = "own") -> list[dict[str, Any]]:
    return [
        {
            "query": f"{side} {kind} question {i} of level {level}?",
            "answer": f"reply {i}",
            "level": str(level),
            "type": kind,
            "subject": "Stephen King" if i % 2 else "Tom Clancy",
        }
        for i in range(count)
    ]


BENCHMARKS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "muse-books": {
        "forget_qa": qa("forget", 20),
        "forget_qa_icl": qa("icl", 4),
        "retain_qa": qa("retain", 20),
    },
    "muse-news": {"forget_qa": qa("forget", 20), "retain2_qa": qa("retain", 20)},
    "wmdp-cyber": {"wmdp-cyber": mcq("cyber", 20)},
    "wmdp-bio": {"test": mcq("bio", 20)},
    "wmdp-corpora": {
        "cyber-forget-corpus": [{"text": "Exploits. " * 300}],
        "cyber-retain-corpus": [{"text": "Passwords should be long. " * 100}],
    },
    "rwku": {
        "forget_level1": rwku(1, "cloze", 20),
        "forget_level2": rwku(2, "simple question", 20),
        "forget_level3": rwku(3, "role playing", 6) + rwku(3, "affirmative suffix", 4),
        "neighbor_level1": rwku(1, "cloze", 20, side="next"),
        "neighbor_level2": rwku(2, "simple question", 20, side="next"),
    },
    "tofu": {
        "forget10": qa("forget", 20),
        "retain90_sample400": qa("retain", 20),
        "real_authors": [{**row, "distractors": ["x", "y", "z"]} for row in qa("author", 20)],
        "world_facts": qa("world", 10),
    },
    "mmlu": {"test": mcq("test", 8, subject="world_religions"), "dev": mcq("dev", 5, subject="x")},
    "wikipedia": {"wikipedia": [{"title": "Oak", "text": "An oak is a tree. " * 200}]},
    "nq-open": {
        "nq_open": [{"question": f"who sang song {i}", "answer": ["a b", "c"]} for i in range(9)]
    },
}
GOALS_OF = {
    "muse-books": {"forget", "general", "attack"},
    "muse-news": {"forget", "general", "attack"},
    "wmdp-cyber": {"forget", "attack"},
    "wmdp-bio": {"forget", "attack"},
    "wmdp-corpora": {"forget", "neighbor"},
    "rwku": {"forget", "neighbor", "attack"},
    "tofu": {"forget", "general", "neighbor", "attack"},
    "mmlu": {"general"},
    "wikipedia": {"general"},
    "nq-open": {"general"},
}


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_of(name: str, root: Path) -> Path:
    for table, rows in BENCHMARKS[name].items():
        save(root / name / f"{table}.jsonl", rows)
    return root / name


def check_whole(found: Collected, root: Path) -> None:
    """Records that the rest of the house accepts."""
    check_disjoint(found.records)
    write_records(root / "r.jsonl", found.records)
    assert read_records(root / "r.jsonl") == found.records
    used = {r.split: set[str]() for r in found.records}
    for record in found.records:
        if record.goal == "attack":
            assert record.prefix
            used[record.split].add(record.prefix)
        if record.goal == "neighbor" and record.form == "qa":
            assert record.options is not None and record.correct is not None and record.refusals
            assert record.options[record.correct] == record.answer
    assert not used.get("train", set()) & used.get("test", set())


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_becomes_records(tmp_path: Path, name: str) -> None:
    found = collect(SourceSettings(source=name, path=str(folder_of(name, tmp_path))))  # type: ignore[arg-type]
    assert {r.goal for r in found.records} == GOALS_OF[name]
    assert all(r.source == name and isinstance(r.meta["index"], int) for r in found.records)
    check_whole(found, tmp_path)


@shared
@pytest.mark.parametrize(
    ("name", "path", "least"),
    [
        ("muse-books", "muse_books_qa", {"forget/train": 60, "general/test": 30}),
        ("wmdp-cyber", "wmdp_cyber", {"forget/train": 50, "attack/test": 15}),
        ("tofu", "tofu", {"forget/train": 200, "neighbor/test": 30, "general/train": 300}),
        ("mmlu", "mmlu", {"general/test": 400, "general/train": 280}),
        ("nq-open", "nq_open", {"general/train": 400}),
    ],
)
def test_the_shared_rows_load(tmp_path: Path, name: Any, path: str, least: dict[str, int]) -> None:
    found = collect(SourceSettings(source=name, path=str(SHARED / path)))
    assert all(counts(found.records)[key] >= value for key, value in least.items())
    check_whole(found, tmp_path)


def test_rwku_keeps_its_protocol(tmp_path: Path) -> None:
    path = str(folder_of("rwku", tmp_path))
    found = collect(SourceSettings(source="rwku", path=path, subset="Stephen King"))
    assert {r.topic for r in found.records} == {"Stephen King"}
    blanks = [r for r in found.records if r.meta["level"] == "1"]
    assert all(r.question.startswith("Please complete the blank") for r in blanks)
    third = {r.meta["type"]: r for r in found.records if r.meta["level"] == "3"}
    assert third["role playing"].prefix == "Answer:" and third["role playing"].goal == "attack"
    assert third["affirmative suffix"].goal == "forget"


def test_a_test_that_asks_a_trained_question_after_a_prefix_is_left_out(tmp_path: Path) -> None:
    folder = folder_of("rwku", tmp_path)
    same = [{**row, "level": "3"} for row in rwku(2, "simple question", 20)]
    save(folder / "forget_level3.jsonl", [*same, *rwku(3, "role playing", 4)])
    found = collect(SourceSettings(source="rwku", path=str(folder)))
    plain = [r for r in found.records if r.goal == "forget" and r.meta["level"] == "2"]
    trained = sum(r.split == "train" for r in plain)
    assert found.rejects.counts["test question that is trained"] == trained > 0
    check_whole(found, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_is_cached_or_streamed_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """`datasets` itself reads a repository of the hub's layout; only its address is another."""
    repo = tmp_path / "repo"
    for table, rows in BENCHMARKS["muse-books"].items():
        save(repo / f"knowmem_{table}.jsonl", rows)
    head = "---\nconfigs:\n- config_name: knowmem\n  data_files:\n" + "".join(
        f"  - split: {table}\n    path: knowmem_{table}.jsonl\n"
        for table in BENCHMARKS["muse-books"]
    )
    (repo / "README.md").write_text(head + "---\n")
    asked: list[Any] = []
    load = datasets.load_dataset

    def from_disk(name: str, config: str, *, split: str, revision: str, streaming: bool) -> Any:
        asked.append((name, revision, streaming))
        cache = str(tmp_path / "cache")
        return load(str(repo), config, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    settings = SourceSettings(source="muse-books", revision="abc123", streaming=streaming, limit=9)
    found = collect(settings)
    assert set(asked) == {("muse-bench/MUSE-Books", "abc123", streaming)}
    assert bool(list(tmp_path.glob("cache/**/*.arrow"))) is not streaming
    assert counts(found.records)["general/train"] + counts(found.records)["general/test"] == 9
    assert found.revision == "abc123"


@dataclass
class Hub:
    """A stand-in for the hub: a data set at several commits, of which one is the newest."""

    root: Path
    newest: str = ""
    read: list[str | None] = field(default_factory=list)
    fails_at: int | None = None

    def commit(self, sha: str, rows: int) -> None:
        self.newest = sha
        for table in ("forget_qa", "retain_qa"):
            save(self.root / sha / f"knowmem_{table}.jsonl", qa(table, rows))
        head = "".join(
            f"  - split: {table}\n    path: knowmem_{table}.jsonl\n"
            for table in ("forget_qa", "retain_qa")
        )
        text = f"---\nconfigs:\n- config_name: knowmem\n  data_files:\n{head}---\n"
        (self.root / sha / "README.md").write_text(text)

    def info(self, repo: str, *, revision: str | None, timeout: float) -> Any:
        return SimpleNamespace(sha=self.newest if revision in (None, "main") else None)

    def load(
        self, name: str, config: str, *, split: str, revision: str | None, streaming: bool
    ) -> Any:
        self.read.append(revision)
        if len(self.read) == self.fails_at:
            raise KeyboardInterrupt
        folder = self.root / (revision or self.newest)
        return LOAD(str(folder), config, split=split, cache_dir=str(self.root / "cache"))


LOAD = datasets.load_dataset
FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", staticmethod(found.info))
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    found.commit(FIRST, 12)
    return found


@pytest.mark.parametrize("asked", [None, "main"])
def test_a_rerun_reads_the_commit_of_the_first_preparation(
    tmp_path: Path, hub: Hub, asked: str | None
) -> None:
    """Killed while it read, then made again from what is written down; the hub has moved on."""
    settings, run = SourceSettings(source="muse-books", revision=asked), tmp_path / "run"
    hub.fails_at = 2
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, run)
    hub.commit(SECOND, 20)
    prepare(settings, run)
    records = prepared(settings, run).read_bytes()
    assert json.loads((run / "data/source.json").read_text())["revision"] == FIRST
    (run / "data/source.json").unlink()
    prepare(settings, run)
    assert prepared(settings, run).read_bytes() == records
    assert set(hub.read) == {FIRST}, "never the branch's name, never the newer commit"
    (run / "data/source.json").unlink()
    prepare(settings.model_copy(update={"revision": SECOND}), run)
    assert hub.read[-1] == SECOND and prepared(settings, run).read_bytes() != records
    prepare(SourceSettings(source="muse-books"), tmp_path / "other")
    assert hub.read[-1] == SECOND, "another run reads the newest"


@pytest.mark.parametrize("asked", [None, "main"])
def test_a_hub_that_names_no_commit_is_said_and_pins_nothing(
    tmp_path: Path,
    hub: Hub,
    asked: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (hub.root / "main").symlink_to(hub.root / FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    prepare(SourceSettings(source="muse-books", revision=asked), tmp_path / "run")
    assert "does not say at which commit muse-bench/MUSE-Books is" in capsys.readouterr().out
    assert not (tmp_path / "run/data/revision.json").exists()
    assert set(hub.read) == {asked}


def test_a_copy_of_the_hubs_own_folders_loads(tmp_path: Path) -> None:
    """As `git clone` gives it: a folder a config, Parquet shards, other configs beside it."""
    for config, count in (("all", 12), ("world_religions", 4)):
        for split in ("test", "dev"):
            path = tmp_path / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            table = datasets.Dataset.from_list(mcq(f"{config} {split}", count, subject="x"))
            table.to_parquet(str(path))
    for subset, count in ((None, 12), ("world_religions", 4)):
        found = collect(SourceSettings(source="mmlu", path=str(tmp_path), subset=subset))
        assert counts(found.records) == {"general/test": count, "general/train": count}


def test_an_unreachable_hub_says_which_file_to_put_where(tmp_path: Path) -> None:
    code = (
        "from unteach.engine.data.settings import SourceSettings as S\n"
        "from unteach.engine.data.sources import collect\n"
        "try: collect(S(source='muse-books'))\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.stdout.startswith("InputError muse-books cannot be had from the hub")
    assert "put forget_qa.jsonl (question, answer); retain_qa.jsonl" in done.stdout
    assert done.stdout.strip().endswith("set data.path to it.")


def test_a_folder_that_lacks_a_table_says_its_name(tmp_path: Path) -> None:
    folder = folder_of("muse-books", tmp_path)
    (folder / "retain_qa.jsonl").unlink()
    with pytest.raises(InputError, match=r"put retain_qa\.jsonl .* with question, answer there"):
        collect(SourceSettings(source="muse-books", path=str(folder)))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": 4}, "options without the gold"),
        ({"answer": -1}, "options without the gold"),
        ({"answer": "two"}, "options without the gold"),
        ({"choices": ["one"]}, "no list in field choices"),
        ({"choices": None}, "no list in field choices"),
        ({"question": "  "}, "no text in field question"),
    ],
)
def test_bad_rows_are_counted_not_trained(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    rows = mcq("cyber", 12)
    path = save(tmp_path / "mcq.jsonl", [{**rows[0], **bad}, *rows[1:]])
    found = collect(SourceSettings(source="wmdp-cyber", path=str(path)))
    assert found.rejects.counts[reason] == 1
    assert len({r.meta["index"] for r in found.records}) == 11


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_local_files_of_every_kind_with_columns_of_other_names(tmp_path: Path, kind: str) -> None:
    rows = [{"q": f"Question {i}?", "a": f"answer {i}"} for i in range(8)]
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / f"forget_rows.{kind}"
    {
        "jsonl": table.to_json,
        "json": lambda p: Path(p).write_text(json.dumps(rows)),
        "csv": table.to_csv,
        "parquet": table.to_parquet,
    }[kind](str(path))
    columns = {"question": "q", "answer": "a"}
    found = collect(SourceSettings(source="local", path=str(path), columns=columns))
    assert counts(found.records) == {
        "attack/test": 2,
        "attack/train": 4,
        "forget/test": 2,
        "forget/train": 4,
    }


def test_local_folders_take_goals_from_names_or_a_column(tmp_path: Path) -> None:
    save(tmp_path / "forget.jsonl", qa("forget", 6))
    save(tmp_path / "general_test.jsonl", qa("general", 6))
    save(tmp_path / "mixed.jsonl", [{**row, "goal": "neighbor"} for row in qa("next", 6)])
    found = collect(SourceSettings(source="local", path=str(tmp_path)))
    assert counts(found.records)["general/test"] == 6
    assert {r.goal for r in found.records} == {"forget", "general", "neighbor", "attack"}
    save(tmp_path / "what.jsonl", qa("what", 2))
    with pytest.raises(InputError, match="say which goal its rows have"):
        collect(SourceSettings(source="local", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_local_rows_say_their_own_splits_and_aliases(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "split": "test", "aliases": '["Zimmerman"]'} for row in qa("asked", 5)]
    rows += [{**row, "split": "", "aliases": ""} for row in qa("free", 5)]
    rows += [{**row, "split": "held back", "aliases": ""} for row in qa("wrong", 1)]
    path = tmp_path / f"forget.{kind}"
    table = datasets.Dataset.from_list(rows)
    table.to_csv(str(path)) if kind == "csv" else table.to_json(str(path))
    found = collect(SourceSettings(source="local", path=str(path), test_share=0.01))
    given = [r for r in found.records if r.aliases == ["Zimmerman"]]
    assert len(given) == 5 and {(r.goal, r.split) for r in given} == {("forget", "test")}
    assert found.rejects.counts["split that is none of train, tune, test"] == 1


def test_questions_of_two_goals_or_splits_stand_once(tmp_path: Path) -> None:
    rows = qa("same", 10)
    save(tmp_path / "forget_train.jsonl", rows)
    again = [{**row, "question": row["question"].upper().rstrip("?")} for row in rows[:4]]
    save(tmp_path / "general_test.jsonl", [*again, *qa("other", 3)])
    found = collect(SourceSettings(source="local", path=str(tmp_path)))
    assert found.rejects.counts["question asked before"] == 4
    assert counts(found.records)["general/test"] == 3


vocabulary = ["owl", "cat", "ring", "hat", "key", "map", "sea", "sky"]
words = st.lists(st.sampled_from(vocabulary), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(first=st.lists(words, max_size=6), second=st.lists(words, max_size=6))
def test_near_duplicates_are_those_of_brute_force(
    first: list[list[str]], second: list[list[str]]
) -> None:
    records = [
        Record(id=f"{split}{i}", goal="forget", question=" ".join(w), answer="x", split=split)  # type: ignore[arg-type]
        for split, side in (("train", first), ("test", second))
        for i, w in enumerate(side)
    ]
    sets = {r.id: set(normalized(r.question).split()) for r in records}
    wanted = {
        (a.id, b.id)
        for a in records
        for b in records
        if a.split == "test"
        and b.split == "train"
        and len(sets[a.id] & sets[b.id]) / len(sets[a.id] | sets[b.id]) >= 0.8
    }
    assert {(a, b) for a, b, _ in near_duplicates(records)} == wanted


def test_shipped_prefixes_of_training_and_tests_differ() -> None:
    lists = prefixes()
    sets = {name: {normalized(text) for text in texts} for name, texts in lists.items()}
    assert all(len(sets[name]) >= 5 for name in ("train", "test", "benign"))
    assert not sets["train"] & sets["test"] and not sets["benign"] & (sets["train"] | sets["test"])


def test_the_stage_writes_records_sheet_and_rejects_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of("tofu", tmp_path)
    save(path / "forget10.jsonl", [*qa("forget", 20), {"question": "?", "answer": None}])
    settings = SourceSettings(source="tofu", path=str(path))
    run = tmp_path / "run"
    run.mkdir()
    prepare(settings, run)
    written = prepared(settings, run)
    sheet = written.with_suffix(".md").read_text()
    assert "| forget | train | tofu | qa | 12 |" in sheet
    assert "| no text in field answer | 1 |" in sheet
    reasons = [json.loads(x)["reason"] for x in (run / "data/rejected.jsonl").open()]
    assert reasons == ["no text in field answer"]
    stamp = written.stat().st_mtime_ns
    prepare(settings, run)
    assert written.stat().st_mtime_ns == stamp and "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="was made with another test_share"):
        prepare(settings.model_copy(update={"test_share": 0.5}), run)
    save(path / "forget10.jsonl", qa("forget", 19))
    with pytest.raises(InputError, match="was made with another path"):
        prepare(settings, run)


def test_two_preparations_at_once_read_the_source_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def slow(*arguments: Any, **options: Any) -> Collected:
        read.append(1)
        time.sleep(0.3)
        return collect(*arguments, **options)

    monkeypatch.setattr("unteach.engine.data.prepare.collect", slow)
    settings = SourceSettings(source="tofu", path=str(folder_of("tofu", tmp_path)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: prepare(settings, tmp_path / "run"), range(2)))
    assert len(read) == 1
    assert read_records(prepared(settings, tmp_path / "run"))


def test_records_files_go_through_as_they_are(tmp_path: Path) -> None:
    records = [Record(id="a", goal="forget", question="Who?", answer="Me")]
    write_records(tmp_path / "mine.jsonl", records)
    found = collect(SourceSettings(source="tofu", path=str(tmp_path / "mine.jsonl")))
    assert found.records == records


def holdings(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("place", ["data", "data/mine/forget.jsonl"])
def test_input_in_the_folder_that_is_replaced_is_refused(tmp_path: Path, place: str) -> None:
    save(tmp_path / "run/data/mine/forget.jsonl", qa("forget", 5))
    before = holdings(tmp_path)
    settings = SourceSettings(source="local", path=str(tmp_path / "run" / place))
    with pytest.raises(InputError, match=r"data\.path .* lies in .*run/data, which this stage"):
        prepare(settings, tmp_path / "run")
    other = save(tmp_path / "forget.jsonl", qa("forget", 5))
    named = str(tmp_path / "run/data/mine/forget.jsonl")
    settings = SourceSettings(source="local", path=str(other), beside=(named,))
    with pytest.raises(InputError, match=r"data\.beside .* lies in"):
        prepare(settings, tmp_path / "run")
    other.unlink()
    assert holdings(tmp_path) == before


@pytest.mark.parametrize("name", ["records.jsonl", "notes.txt"])
def test_a_data_folder_that_somebody_else_made_stays(tmp_path: Path, name: str) -> None:
    path, run = save(tmp_path / "forget.jsonl", qa("forget", 5)), tmp_path / "run"
    settings = SourceSettings(source="local", path=str(path))
    save(run / "data" / name, [{"precious": 1}])
    with pytest.raises(InputError, match=f"holds {name}, which unteach did not write"):
        prepare(settings, run)
    assert holdings(run / "data") == {name: b'{"precious": 1}\n'}
    (run / "data" / name).unlink()
    prepare(settings, run)
    (run / "data/source.json").unlink()
    prepare(settings, run)  # as the sentence about other settings says
    (run / "data/source.json").unlink()
    (run / "data/notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        prepare(settings, run)


def test_files_of_one_name_give_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    for place in ("a/forget.jsonl", "b/forget.jsonl", "b/forget.json", "general.jsonl"):
        save(path / place, qa(place, 5))
    settings = SourceSettings(source="local", path=str(path))
    prepare(settings, tmp_path / "run")
    parts = {r.id.rsplit("-", 1)[0] for r in read_records(prepared(settings, tmp_path / "run"))}
    names = {"a/forget.jsonl", "b/forget.jsonl", "b/forget.json", "general"}
    assert {f"local-{name}" for name in names} <= parts


def test_records_beside_give_ids_of_their_own(tmp_path: Path) -> None:
    path = save(tmp_path / "forget.jsonl", qa("forget", 5))
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for number, file in enumerate(files):
        asked = f"What is beside {number}?"
        record = Record(id="local-forget-0", goal="neighbor", question=asked, answer=f"{number}")
        write_records(file, [record])
    settings = SourceSettings(source="local", path=str(path), beside=tuple(map(str, files)))
    found = collect(settings).records
    assert len({r.id for r in found}) == len(found)
    assert next(r.id for r in found if r.goal == "neighbor") == "beside-local-forget-0"


def test_a_change_in_any_folder_is_noticed(tmp_path: Path) -> None:
    path, run = tmp_path / "hub", tmp_path / "run"
    for table in ("forget_qa", "retain_qa"):
        save(path / table / "0000.jsonl", qa(table, 8))
    files = [tmp_path / name / "more.jsonl" for name in ("one", "two")]
    for file in files:
        asked = f"What is {file.parent.name}?"
        file.parent.mkdir()
        write_records(file, [Record(id="n", goal="neighbor", question=asked, answer="x")])
    settings = SourceSettings(source="muse-books", path=str(path), beside=tuple(map(str, files)))
    prepare(settings, run)
    for file, key in ((path / "forget_qa/0000.jsonl", "path"), (files[0], "beside")):
        kept = file.read_text()
        save(file, [json.loads(line) for line in kept.replace("What", "Which").splitlines()])
        with pytest.raises(InputError, match=f"was made with another {key}:"):
            prepare(settings, run)
        file.write_text(kept)
    prepare(settings, run)


def test_a_text_column_of_another_name_is_found_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "forget.csv"
    path.write_text("body\nThis is a passage of some words.\n")
    found = collect(SourceSettings(source="local", path=str(path), columns={"text": "body"}))
    assert [(r.form, r.answer) for r in found.records] == [
        ("passage", "This is a passage of some words.")
    ]


def test_attack_rows_without_a_prefix_stand_behind_the_shipped_ones(tmp_path: Path) -> None:
    save(tmp_path / "attack.jsonl", [*qa("attack", 9), {**qa("own", 1)[0], "prefix": "Mine:"}])
    save(tmp_path / "forget.jsonl", [*qa("attack", 3), *qa("forget", 9)])
    found = collect(SourceSettings(source="local", path=str(tmp_path)))
    check_whole(found, tmp_path)
    attacks = [r for r in found.records if r.goal == "attack"]
    assert {r.split for r in attacks} == {"train", "test"}
    for record in attacks:
        own = record.question.startswith("What is own")
        assert record.prefix in (("Mine:",) if own else prefixes()[record.split])
    assert any(r.goal == "forget" and "attack" in r.question for r in found.records), (
        "a question that forget asks too is another record, as behind a prefix of its own"
    )
