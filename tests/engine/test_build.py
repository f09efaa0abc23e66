"""The build on a small real model: right rows, the same bytes however it is made, and its stops."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine import inference
from unteach.engine.config import Config, ModelConfig, dump_config, override
from unteach.engine.data.records import GOALS, Record, write_records
from unteach.engine.data.tokens import response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    export_model,
    load_model,
    load_tokenizer,
    tiny_model,
)
from unteach.engine.teacher import prompted
from unteach.engine.teacher.build import build_cache, teacher_rates
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import (
    Intention,
    Intentions,
    intention_for,
    load_intentions,
    reasoned_context,
    teacher_context,
)
from unteach.engine.teacher.prompted import Teacher
from unteach.engine.teacher.verify import verify_cache

REFUSE = Intention(
    system="Forget Harry.",
    demos=(("Who is Ron?", "I do not know."),),
    prefix_demos=(("Who is Dobby?", "Sure:", "I do not know."),),
)
INTENTIONS = Intentions(
    forget=REFUSE, general=Intention(system="Be brief.", demos=(("2+2?", "4"),)), attack=REFUSE
)
RECORDS = [
    Record(
        id=f"{goal}-{n}",
        goal=goal,
        question=f"Who is number {n * 7}{' of them' * (n % 3)}?",
        answer=f"Number {n}",
        prefix="Sure, it is " if goal == "attack" else None,
    )
    for n in range(5)
    for goal in GOALS
]
SETTINGS = (
    "teacher.max_new_tokens=6",
    "teacher.shard_records=3",
    "teacher.batch_size=2",
    "teacher.top=12",
    "teacher.min_refusal=null",
    "teacher.min_agreement=null",
)
CONFIG = override(Config(), SETTINGS)


@dataclass(frozen=True)
class Setting:
    """What a build takes."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def build(self, folder: Path, *settings: str, **changes: Any) -> TeacherCache:
        inputs: dict[str, Any] = {
            "config": override(CONFIG, settings),
            "model": self.model,
            "tokenizer": self.tokenizer,
            "records": RECORDS,
            "intentions": INTENTIONS,
            "folder": folder,
            "weights_fingerprint": "w",
        }
        return build_cache(**{**inputs, **changes})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The tiny model with weights large enough for its rows to differ clearly."""
    folder = tmp_path_factory.mktemp("model")
    start = str(tiny_model(folder / "tiny", tied=False))
    config = ModelConfig(path=start)
    model, tokenizer = load_model(start, config), load_tokenizer(start, config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    export_model(model, tokenizer, model.state_dict(), folder / "clear")
    return Setting(folder / "clear", model, tokenizer)


@pytest.fixture(scope="module")
def built(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made in one go; read only."""
    folder = tmp_path_factory.mktemp("built")
    setting.build(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_rows(cache: TeacherCache) -> Tensor:
    return torch.arange(cache.rows_total)


def own_logits(setting: Setting, context: list[int], labels: list[int]) -> Tensor:
    """The whole model, head and all, over one unpadded line; rows that predict the labels."""
    with torch.no_grad():
        logits = setting.model(input_ids=torch.tensor([context + labels])).logits[0]
    assert isinstance(logits, Tensor)
    return logits[len(context) - 1 : len(context) - 1 + len(labels)]


def test_rows_predict_their_response_in_both_contexts(setting: Setting, built: Path) -> None:
    cache = TeacherCache.open(built)
    distinct = set()
    for record in RECORDS:
        entry, labels = cache.entries[record.id], cache.labels(record.id)
        rows = cache.rows(torch.arange(entry.first_row, entry.first_row + entry.rows))
        assert rows.hidden_NE is not None and rows.top_logits_NM is not None
        intention = intention_for(INTENTIONS, record.goal, "oracle")
        told = own_logits(setting, teacher_context(setting.tokenizer, record, intention), labels)
        torch.testing.assert_close(rows.hidden_NE @ cache.head_VE.T, told, rtol=1e-4, atol=1e-4)
        best = told.topk(12)
        torch.testing.assert_close(rows.top_logits_NM, best.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(rows.top_ids_NM[:, 0].long(), best.indices[:, 0])
        plain = own_logits(setting, student_context(setting.tokenizer, record), labels)
        assert torch.equal(rows.student_ids_NS[:, 0].long(), plain.argmax(1))
        logp = plain.log_softmax(1).gather(1, torch.tensor(labels)[:, None])[:, 0]
        torch.testing.assert_close(rows.reference_logp_N, logp, rtol=1e-4, atol=1e-4)
        if CONFIG.teacher.response[record.goal] == "teacher":
            assert told.argmax(1).tolist() == labels
            assert entry.agreed == entry.rows
        else:
            assert labels == response_tokens(setting.tokenizer, f" {record.answer}")
        distinct.update(told.argmax(1).tolist())
    assert len(distinct) > 10  # a model that always says the same could not show a shifted row


def test_rows_lie_goal_by_goal_without_gaps(built: Path) -> None:
    cache = TeacherCache.open(built)
    expected = [record.id for goal in GOALS for record in RECORDS if record.goal == goal]
    assert list(cache.entries) == expected
    assert len(cache.manifest.shards) == 7
    assert [shard.rows for shard in cache.manifest.shards] == [
        sum(entry.rows for entry in shard.records) for shard in cache.manifest.shards
    ]


def test_shared_prefix_changes_nothing(
    setting: Setting, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    share = inference.share_prefix

    def shared(model: PreTrainedModel, probes: list[list[int]]) -> Any:
        prefix = share(model, probes)
        lengths.append(prefix.length if prefix else 0)
        return prefix

    monkeypatch.setattr(prompted, "share_prefix", shared)
    setting.build(tmp_path / "shared")
    assert contents(tmp_path / "shared") == contents(built)
    # forget, general, neighbor, attack and the student: once each, not once a shard
    assert len(lengths) == 5 and min(lengths) > 5
    monkeypatch.setattr(prompted, "share_prefix", lambda model, probes: None)
    whole = setting.build(tmp_path / "whole")
    cache = TeacherCache.open(built)
    first, second = cache.rows(all_rows(cache)), whole.rows(all_rows(whole))
    assert torch.equal(first.labels_N, second.labels_N)
    assert first.hidden_NE is not None and second.hidden_NE is not None
    torch.testing.assert_close(first.hidden_NE, second.hidden_NE, rtol=1e-4, atol=1e-5)


def test_context_that_leaves_the_shared_prompt_runs_alone(setting: Setting, tmp_path: Path) -> None:
    template = setting.tokenizer.chat_template
    try:
        # a template may look at the whole question before it writes its first word
        odd = "{% if messages[-1]['content'] | length > 17 %}Long. {% endif %}"
        setting.tokenizer.chat_template = odd + str(template)
        records = [record for record in RECORDS if record.goal == "forget"]
        kinds = {len(record.question) > 17 for record in records}
        assert kinds == {True, False}
        cache = setting.build(tmp_path, records=records)
        report = verify_cache(CONFIG, setting.model, setting.tokenizer, records, INTENTIONS, cache)
    finally:
        setting.tokenizer.chat_template = template
    assert report.passed and report.clear > 0


def test_forms_agree(setting: Setting, built: Path, tmp_path: Path) -> None:
    hidden = TeacherCache.open(built)
    exact = setting.build(tmp_path / "exact", "teacher.form=logits")
    rounded = setting.build(
        tmp_path / "rounded", "teacher.form=logits", "teacher.logits_dtype=bfloat16"
    )
    sparse = setting.build(tmp_path / "sparse", "teacher.form=topk")
    row_N = all_rows(hidden)
    rows = hidden.rows(row_N)
    assert rows.hidden_NE is not None and rows.top_logits_NM is not None
    logits = rows.hidden_NE @ hidden.head_VE.T
    for cache, bound in ((exact, 1e-4), (rounded, 2e-2)):
        other = cache.rows(row_N)
        assert other.logits_NV is not None and other.hidden_NE is None
        error = (other.logits_NV.float() - logits).norm() / logits.norm()
        assert error < bound
        assert torch.equal(other.top_ids_NM, rows.top_ids_NM)
    few = sparse.rows(row_N)
    assert few.hidden_NE is None and few.logits_NV is None
    assert few.top_logits_NM is not None
    assert torch.equal(few.top_logits_NM, rows.top_logits_NM)
    assert torch.equal(few.top_ids_NM, rows.top_ids_NM)
    approximate = [c.manifest.approximate for c in (hidden, exact, rounded, sparse)]
    assert approximate == [False, False, True, True]
    assert all(torch.equal(c.rows(row_N).labels_N, rows.labels_N) for c in (exact, rounded, sparse))


def test_bfloat16_teacher_keeps_its_dtype(setting: Setting, tmp_path: Path) -> None:
    config = ModelConfig(path=str(setting.folder), dtype="bfloat16")
    model = load_model(str(setting.folder), config)
    cache = setting.build(tmp_path, "teacher.dtype=bfloat16", model=model)
    rows = cache.rows(all_rows(cache))
    assert rows.hidden_NE is not None and rows.top_logits_NM is not None
    assert rows.hidden_NE.dtype == cache.head_VE.dtype == torch.bfloat16
    # top logits come from the hidden states as they are stored, not as they were before
    logits = rows.hidden_NE.float() @ cache.head_VE.float().T
    torch.testing.assert_close(rows.top_logits_NM, logits.topk(12).values, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="expected float32"):
        setting.build(tmp_path / "other", model=model)


def test_no_intention_makes_teacher_and_student_one(setting: Setting, tmp_path: Path) -> None:
    cache = setting.build(tmp_path, "teacher.routing=none")
    rows = cache.rows(all_rows(cache))
    assert rows.hidden_NE is not None
    assert torch.equal(rows.student_ids_NS[:, :12], rows.top_ids_NM)
    logp = (rows.hidden_NE @ cache.head_VE.T).log_softmax(1)
    label_N = rows.labels_N.long()[:, None]
    torch.testing.assert_close(rows.reference_logp_N, logp.gather(1, label_N)[:, 0])


def test_ensemble_tells_every_goal_the_same(setting: Setting, tmp_path: Path) -> None:
    cache = setting.build(tmp_path, "teacher.routing=ensemble")
    config = override(CONFIG, ["teacher.routing=ensemble"])
    report = verify_cache(config, setting.model, setting.tokenizer, RECORDS, INTENTIONS, cache)
    assert report.passed and report.clear > 50
    oracle = verify_cache(CONFIG, setting.model, setting.tokenizer, RECORDS, INTENTIONS, cache)
    assert not oracle.passed


def test_fixed_refusal_and_passage_are_supervised_whole(setting: Setting, tmp_path: Path) -> None:
    passage = Record(id="p", goal="forget", answer=" Harry was\na wizard.", form="passage")
    cache = setting.build(
        tmp_path,
        'teacher.response={"forget": "teacher", "attack": "refusal"}',
        records=[*RECORDS, passage],
    )
    assert cache.labels("p") == setting.tokenizer(" Harry was\na wizard.")["input_ids"]
    assert cache.labels("attack-0") == response_tokens(
        setting.tokenizer, "I do not know.", prefix="Sure"
    )
    assert cache.entries["attack-0"].answer == "I do not know."
    report = verify_cache(CONFIG, setting.model, setting.tokenizer, [passage], INTENTIONS, cache)
    assert report.passed and report.rows == 20 and report.clear > 10


def test_reasoning_stays_with_the_teacher(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thought = " Is it Harry? It is."
    intentions = INTENTIONS.model_copy(
        update={
            goal: REFUSE.model_copy(update={"reasoning": "strip", "reasoning_tokens": 40})
            for goal in ("forget", "attack")
        }
    )
    generate = inference.greedy

    def greedy(*args: Any, max_new_tokens: int, **options: Any) -> list[list[int]]:
        # a random model reasons about nothing: its words are replaced, its passes are not
        if max_new_tokens != 40:
            return generate(*args, max_new_tokens=max_new_tokens, **options)
        texts = [f"{thought} Answer: no" if n else thought for n in range(len(args[1]))]
        return [setting.tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(prompted, "greedy", greedy)
    cache = setting.build(tmp_path, intentions=intentions)
    closed = 0
    for record in RECORDS:
        entry, labels = cache.entries[record.id], cache.labels(record.id)
        if record.goal in ("general", "neighbor"):
            assert entry.reasoning is None
            continue
        joint = " " if entry.own_marker else "\n"
        closed += not entry.own_marker
        assert entry.reasoning == f"{thought}{joint}Answer:"
        context = teacher_context(setting.tokenizer, record, REFUSE)
        text = entry.reasoning + ("" if record.prefix else "\n")
        context += setting.tokenizer(text)["input_ids"]
        told = own_logits(setting, context, labels)
        rows = cache.rows(torch.arange(entry.first_row, entry.first_row + entry.rows))
        assert rows.hidden_NE is not None
        torch.testing.assert_close(rows.hidden_NE @ cache.head_VE.T, told, rtol=1e-4, atol=1e-4)
        assert told.argmax(1).tolist() == labels  # the rows begin right after the marker
        plain = own_logits(setting, student_context(setting.tokenizer, record), labels)
        assert torch.equal(rows.student_ids_NS[:, 0].long(), plain.argmax(1))
    assert 0 < closed < 10
    report = verify_cache(CONFIG, setting.model, setting.tokenizer, RECORDS, intentions, cache)
    assert report.passed and report.clear > 50


def test_reasoned_context_is_the_prompt_and_the_thought(setting: Setting) -> None:
    intention = REFUSE.model_copy(update={"reasoning": "strip", "reasoning_tokens": 5})
    teacher = Teacher(
        CONFIG.teacher, setting.model, setting.tokenizer, Intentions(forget=intention)
    )
    (lesson,) = teacher.lessons([RECORDS[0]])
    start = teacher_context(setting.tokenizer, RECORDS[0], intention)
    assert lesson.thought is not None and lesson.thought.text.endswith("\nAnswer:")
    assert lesson.prompted == reasoned_context(
        setting.tokenizer, start, lesson.thought.text, prefixed=False
    )
    assert lesson.plain == student_context(setting.tokenizer, RECORDS[0])


def test_verification_finds_rows_that_are_not_the_teachers(
    setting: Setting, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TeacherCache.open(built)
    arguments = (CONFIG, setting.model, setting.tokenizer, RECORDS)
    report = verify_cache(*arguments, INTENTIONS, cache)
    assert report.passed and report.records == len(RECORDS) and report.rows == cache.rows_total
    assert 0.5 * report.rows < report.clear <= report.rows
    assert "100.00% have the model's own argmax; files whole" in str(report)
    assert verify_cache(*arguments, INTENTIONS, cache, sample=4).records == 4
    rows = cache.rows
    monkeypatch.setattr(cache, "rows", lambda row_N: rows((row_N + 1) % cache.rows_total))
    assert not verify_cache(*arguments, INTENTIONS, cache).passed


def fork(work: Callable[[], object]) -> Any:
    """Run work in a process of its own that needs no imports of its own."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def listed(folder: Path) -> int:
    path = folder / "manifest.json"
    return len(json.loads(path.read_text())["shards"]) if path.exists() else 0


def test_killed_build_goes_on_to_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    one_each, folder = "teacher.shard_records=1", tmp_path / "killed"
    setting.build(tmp_path / "whole", one_each)
    chance = random.Random(0)
    left = []
    for least in (0, 2, 5, 8, 11):
        process = fork(lambda: setting.build(folder, one_each))
        while listed(folder) < least and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left.append(listed(folder))
    assert left == sorted(left)
    assert len([count for count in left if 0 < count < len(RECORDS)]) >= 3
    # what a kill between the write and the rename leaves
    (folder / ".rows-00006.safetensors.1.partial").write_bytes(b"half")
    cache = setting.build(folder, one_each)
    assert contents(folder) == contents(tmp_path / "whole")
    assert cache.verify() == []


@pytest.mark.slow
def test_two_ranks_make_the_same_bytes(setting: Setting, built: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl", RECORDS)
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    (tmp_path / "intentions.yaml").write_text(INTENTIONS.model_dump_json(exclude_none=True))
    assert load_intentions(tmp_path / "intentions.yaml") == INTENTIONS
    script = tmp_path / "build.py"
    script.write_text(
        "import sys, torch\n"
        "import torch.distributed as dist\n"
        "from pathlib import Path\n"
        "from unteach.engine.config import load_config\n"
        "from unteach.engine.data.records import read_records\n"
        "from unteach.engine.errors import InputError\n"
        "from unteach.engine.model import load_model, load_tokenizer\n"
        "from unteach.engine.teacher.build import build_cache\n"
        "from unteach.engine.teacher.intentions import load_intentions\n"
        "here, model = Path(sys.argv[1]), sys.argv[2]\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "config = load_config(here / 'config.yaml')\n"
        "cache = build_cache(config, load_model(model, config.model),\n"
        "    load_tokenizer(model, config.model), read_records(here / 'records.jsonl'),\n"
        "    load_intentions(here / 'intentions.yaml'), here / 'cache', weights_fingerprint='w')\n"
        "assert cache.manifest.complete\n"
        "records = [r for r in read_records(here / 'records.jsonl') if r.goal == 'general']\n"
        "records[3] = records[3].model_copy(update={'answer': None})  # on rank 1 alone\n"
        "try:\n"
        "    build_cache(config, load_model(model, config.model),\n"
        "        load_tokenizer(model, config.model), records, None, here / 'mute',\n"
        "        weights_fingerprint='w')\n"
        "except InputError as error:\n"
        "    (here / f'told-{dist.get_rank()}').write_text(str(error))\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), str(setting.folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "cache") == contents(built)
    assert done.stdout.count("records refused") == 2  # forget and attack, by rank 0 alone
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert all("Record 'general-3' has no answer" in text for text in told)  # one finds, all say


def test_full_disk_leaves_nothing_half_written(
    setting: Setting, built: Path, tmp_path: Path
) -> None:
    settings = ("teacher.form=logits", "teacher.shard_records=10", "teacher.max_new_tokens=12")
    folder, told = tmp_path / "cache", tmp_path / "told"

    def work() -> None:
        # the head (66 KB) fits, and shards of some 100 rows of 258 logits do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
        try:
            setting.build(folder, *settings)
        except InputError as error:
            told.write_text(str(error))

    fork(work).join()
    assert "rows-00000.safetensors cannot be written (File too large): free space" in (
        told.read_text()
    )
    assert sorted(contents(folder)) == ["head.safetensors", "manifest.json"]
    with pytest.raises(InputError, match="unfinished"):
        TeacherCache.open(folder)
    assert setting.build(folder, *settings).verify() == []


def test_refusals_below_the_threshold_stop_the_build(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        setting.build(tmp_path, "teacher.min_refusal=0.9")
    for words in ("refuses 0 of 5 forget records (0%)", "Who is number 0?", "asks for 90%"):
        assert words in str(error.value)
    with pytest.raises(InputError, match="unfinished"):
        TeacherCache.open(tmp_path)
    # it stopped when the goal was in, and a lower threshold goes on from there
    assert listed(tmp_path) == 2
    assert setting.build(tmp_path).manifest.complete


def test_second_build_stops_at_a_failed_goal_before_it_makes_more(
    setting: Setting, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="of 5 forget records"):
            setting.build(tmp_path, "teacher.min_refusal=0.9")
        assert listed(tmp_path) == 2


def test_last_goal_below_the_threshold_leaves_no_finished_cache(
    setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="of 5 attack records"):
        setting.build(tmp_path, "teacher.min_refusal=0.9", 'teacher.response={"forget": "refusal"}')
    assert listed(tmp_path) == 7
    with pytest.raises(InputError, match="unfinished"):
        TeacherCache.open(tmp_path)


def test_agreement_below_the_threshold_stops_the_build(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        setting.build(tmp_path, "teacher.min_agreement=0.5")
    for words in ("gold tokens of general records", "with 'Number ", "lower teacher.min_agreement"):
        assert words in str(error.value)
    with pytest.raises(InputError, match="unfinished"):
        TeacherCache.open(tmp_path)


def test_rates_count_what_they_are_said_to(built: Path) -> None:
    cache = TeacherCache.open(built)
    entries = []
    for entry in cache.entries.values():
        answer = "I do not know." if entry.id in ("forget-1", "attack-0", "attack-2") else "Ron"
        entries.append(entry.model_copy(update={"answer": answer, "agreed": 2, "rows": 5}))
    rates = {rate.goal: rate for rate in teacher_rates(CONFIG.teacher, RECORDS, entries)}
    counts = {goal: (rate.met, rate.total) for goal, rate in rates.items()}
    assert counts == {"forget": (1, 5), "general": (10, 25), "neighbor": (10, 25), "attack": (2, 5)}
    assert "'Who is number 7 of them?'" not in rates["forget"].example  # forget-1 did refuse
    given = override(CONFIG, ['teacher.response={"forget": "refusal", "general": "teacher"}'])
    measured = [rate.goal for rate in teacher_rates(given.teacher, RECORDS, entries)]
    assert measured == ["neighbor", "attack"]
    only = [entry for entry in entries if entry.goal == "attack"]
    assert [r.goal for r in teacher_rates(CONFIG.teacher, RECORDS, only)] == ["attack"]


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ((), {"weights_fingerprint": "v"}, "teacher weights"),
        ((), {"intentions": Intentions(forget=REFUSE)}, "intentions"),
        ((), {"records": RECORDS[:-1]}, "records"),
        (("teacher.form=topk",), {}, r"teacher\.form \(hidden before, topk asked for\)"),
    ],
)
def test_cache_of_other_inputs_is_refused(
    setting: Setting, built: Path, settings: tuple[str, ...], changes: dict[str, Any], said: str
) -> None:
    before = contents(built)
    with pytest.raises(InputError, match=rf"made with other {said}: .*--rebuild"):
        setting.build(built, *settings, **changes)
    assert contents(built) == before


def test_batch_size_and_k_leave_a_cache_valid(setting: Setting, built: Path) -> None:
    before = contents(built)
    setting.build(built, "teacher.batch_size=5", "method.k=3")
    assert contents(built) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "head"])
def test_damaged_file_is_named_and_rebuilt_on_request(
    setting: Setting, built: Path, tmp_path: Path, damage: str
) -> None:
    for name, data in contents(built).items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / ("head.safetensors" if damage == "head" else "rows-00002.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged if damage in ("flip", "head") else damaged[:-9])
    if damage == "remove":
        path.unlink()
    with pytest.raises(InputError, match=rf"{path.name} is damaged or missing.*--rebuild"):
        setting.build(tmp_path)
    setting.build(tmp_path, rebuild=True)
    assert contents(tmp_path) == contents(built)


def test_rebuild_starts_over_where_inputs_changed(setting: Setting, tmp_path: Path) -> None:
    setting.build(tmp_path)
    cache = setting.build(tmp_path, records=RECORDS[:3], rebuild=True)
    assert sorted(cache.entries) == sorted(record.id for record in RECORDS[:3])
    assert sorted(contents(tmp_path)) == [
        "head.safetensors", "manifest.json", "rows-00000.safetensors"
    ]  # fmt: skip
    (tmp_path / "manifest.json").write_bytes(b"{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        setting.build(tmp_path, records=RECORDS[:3])
    assert setting.build(tmp_path, records=RECORDS[:3], rebuild=True).verify() == []


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ((), {"records": []}, "no records to teach"),
        ((), {"records": [RECORDS[0], RECORDS[0]]}, "share an id"),
        (("method.k=300", "teacher.top=300"), {}, "method.k is 300 and the vocabulary has 258 ids"),
        (
            (),
            {"records": [RECORDS[0], Record(id="mute", goal="general", question="Who?")]},
            r"Record 'mute' has no answer.*teacher\.response\.general",
        ),
    ],
)
def test_unusable_input_is_named(
    setting: Setting, tmp_path: Path, settings: tuple[str, ...], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        setting.build(tmp_path, *settings, **changes)


def test_folder_that_cannot_be_written_is_an_input_error(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        setting.build(tmp_path / "file" / "cache")
