"""The cache folder without any model: what is written comes back, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.config import Config
from unteach.engine.data.bytes_tokenizer import byte_tokenizer
from unteach.engine.data.records import Record
from unteach.engine.errors import InputError
from unteach.engine.model import Head
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import Intention, Intentions
from unteach.engine.teacher.manifest import (
    Entry,
    Fingerprints,
    Form,
    Manifest,
    cache_fingerprints,
)
from unteach.engine.teacher.writer import CacheWriter
from unteach.kernels.bitopk import HiddenTeacher, LogitsTeacher, SparseTeacher

V, E, M, S = 11, 6, 4, 8
ROWS = ((2, 3), (1,), (4, 1, 2))  # rows of each record of each shard
PRINTS = Fingerprints(
    weights="w", tokenizer="t", chat_template="c", intentions="i", records="r", settings={"top": M}
)


def plan(form: Form = "hidden", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "form": form,
        "approximate": False,
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "top": M,
        "seeds": S,
        "width": E,
        "head_rows": V,
        "shard_records": 3,
        "shards_total": len(ROWS),
        "fingerprints": PRINTS,
    }
    return Manifest(**{**fields, **changes})


def shard_tensors(manifest: Manifest, rows: int) -> dict[str, Tensor]:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16}
    return {
        name: torch.randint(0, V, (rows, *shape), dtype=torch.int32)
        if kind == "I32"
        else torch.randn(rows, *shape).to(kinds[kind])
        for name, (kind, shape) in manifest.tensors().items()
    }


def write_cache(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """A finished cache of random rows; returns all of them, in order."""
    writer = CacheWriter(folder, manifest)
    writer.resume(rebuild=False)
    rule = Head(vocab=V - 1, softcap=30.0, scale=0.5)
    writer.write_head(rule, torch.randn(V, E).bfloat16(), torch.randn(V))
    parts = []
    for index, sizes in enumerate(ROWS):
        tensors = shard_tensors(manifest, sum(sizes))
        entries = [
            Entry(
                id=f"{index}.{n}", goal="forget", first_row=0, rows=rows, answer="no", agreed=rows
            )
            for n, rows in enumerate(sizes)
        ]
        writer.list_shards([writer.write_shard(index, tensors, entries)])
        parts.append(tensors)
    writer.finish()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("form", ["hidden", "logits", "topk"])
def test_any_rows_in_any_order_come_back_exactly(tmp_path: Path, form: Form) -> None:
    written = write_cache(tmp_path, plan(form))
    cache = TeacherCache.open(tmp_path, expected=PRINTS)
    assert cache.rows_total == 13
    for chosen in ([12, 0, 5, 5, 3, 11], [], list(range(13))):
        row_N = torch.tensor(chosen, dtype=torch.int64)
        rows = cache.rows(row_N)
        got = {
            "hidden": rows.hidden_NE,
            "logits": rows.logits_NV,
            "top_ids": rows.top_ids_NM,
            "top_logits": rows.top_logits_NM,
            "student_ids": rows.student_ids_NS,
            "labels": rows.labels_N,
            "reference_logp": rows.reference_logp_N,
        }
        assert {name for name, tensor in got.items() if tensor is not None} == set(written)
        for name, tensor in written.items():
            held = got[name]
            assert held is not None and held.dtype == tensor.dtype
            assert torch.equal(held, tensor[row_N])


def test_entries_lead_to_a_records_rows_and_labels(tmp_path: Path) -> None:
    written = write_cache(tmp_path, plan())
    cache = TeacherCache.open(tmp_path)
    spans = {id: (entry.first_row, entry.rows) for id, entry in cache.entries.items()}
    assert spans == {
        "0.0": (0, 2), "0.1": (2, 3), "1.0": (5, 1), "2.0": (6, 4), "2.1": (10, 1), "2.2": (11, 2)
    }  # fmt: skip
    for id, (first, rows) in spans.items():
        assert cache.labels(id) == written["labels"][first : first + rows].tolist()
    with pytest.raises(InputError, match=r"no record 'absent'.*--rebuild"):
        cache.labels("absent")


def test_row_outside_the_cache_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    for row in (-1, 13):
        with pytest.raises(ValueError, match="from 0 to 12"):
            TeacherCache.open(tmp_path).rows(torch.tensor([row]))


def test_head_comes_with_its_rule(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    cache = TeacherCache.open(tmp_path)
    assert cache.head == Head(vocab=V - 1, softcap=30.0, scale=0.5)
    assert cache.head_VE.shape == (V, E) and cache.head_VE.dtype == torch.bfloat16
    assert cache.bias_V is not None and cache.bias_V.shape == (V,)


def test_teacher_is_of_the_caches_form(tmp_path: Path) -> None:
    kinds = {"hidden": HiddenTeacher, "logits": LogitsTeacher, "topk": SparseTeacher}
    for form in ("hidden", "logits", "topk"):
        write_cache(tmp_path / form, plan(form))
        cache = TeacherCache.open(tmp_path / form)
        teacher = cache.teacher(cache.rows(torch.tensor([3, 1])), torch.device("cpu"))
        assert type(teacher) is kinds[form]
        if isinstance(teacher, HiddenTeacher):
            assert teacher.head_VE is cache.head_VE and teacher.bias_V is not None
            again = cache.teacher(cache.rows(torch.tensor([0])), torch.device("cpu"))
            assert isinstance(again, HiddenTeacher) and again.head_VE is teacher.head_VE


def test_shards_are_mapped_and_not_read(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    cache = TeacherCache.open(tmp_path)
    cache.rows(torch.tensor([5]))
    maps = Path("/proc/self/maps").read_text()
    mapped = [n for n in range(3) if str(tmp_path / f"rows-0000{n}.safetensors") in maps]
    assert mapped == [1]


def test_flipped_byte_is_named_when_its_rows_are_asked_for(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    flip(tmp_path / "rows-00001.safetensors")
    cache = TeacherCache.open(tmp_path)
    assert cache.verify() == ["rows-00001.safetensors"]
    cache.rows(torch.tensor([0, 12]))
    with pytest.raises(InputError, match=r"rows-00001\.safetensors is damaged.*--rebuild"):
        cache.rows(torch.tensor([5]))


def test_flipped_byte_in_the_head_is_named(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    flip(tmp_path / "head.safetensors")
    cache = TeacherCache.open(tmp_path)
    assert cache.verify() == ["head.safetensors"]
    with pytest.raises(InputError, match=r"head\.safetensors is damaged"):
        cache.teacher(cache.rows(torch.tensor([0])), torch.device("cpu"))


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    path = tmp_path / "rows-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"rows-00002\.safetensors has .* bytes.*--rebuild"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize("name", ["rows-00000.safetensors", "head.safetensors"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_cache(tmp_path, plan())
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing.*--rebuild"):
        TeacherCache.open(tmp_path)


def test_folder_without_a_cache_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no teacher cache: `unteach teach`"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema_version", "1"),
        ("form", "pickle"),
        ("rows", 14),
        ("records", 5),
        ("top", 0),
        ("width", -3),
        ("head", None),
        ("shards_total", 4),
        ("extra", 1),
        ("shards.1.rows", 2),
        ("shards.1.index", 0),
        ("shards.1.index", "../../rows"),
        ("shards.1.sha256", "zz"),
        ("shards.1.records.0.first_row", 4),
        ("shards.1.records.0.rows", -1),
        ("shards.1.records.0.id", "0.0"),
        ("shards.1.records.0.goal", "regret"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    write_cache(tmp_path, plan())
    path = tmp_path / "manifest.json"
    tree = json.loads(path.read_text())
    node = tree
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in parents:
        node = node[part]
    node[last] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"manifest\.json is damaged.*--rebuild"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    write_cache(tmp_path, plan())
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(InputError, match=r"manifest\.json is damaged.*--rebuild"):
        TeacherCache.open(tmp_path)


def test_manifest_of_a_later_schema_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(InputError, match="schema version 2, this program reads 1"):
        TeacherCache.open(tmp_path)


def test_shard_of_other_shapes_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, plan())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(f'"top": {M},', f'"top": {M + 1},', 1))
    with pytest.raises(InputError, match="other tensors than its manifest says"):
        TeacherCache.open(tmp_path).rows(torch.tensor([0]))


def test_labels_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, plan(shards_total=1))
    writer.resume(rebuild=False)
    writer.write_head(Head(vocab=V, softcap=None, scale=1.0), torch.randn(V, E).bfloat16(), None)
    tensors = {**shard_tensors(writer.manifest, 1), "labels": torch.tensor([V], dtype=torch.int32)}
    entry = Entry(id="a", goal="forget", first_row=0, rows=1, answer="", agreed=0)
    writer.list_shards([writer.write_shard(0, tensors, [entry])])
    writer.finish()
    with pytest.raises(InputError, match="labels outside the vocabulary"):
        TeacherCache.open(tmp_path).labels("a")


def test_unfinished_cache_is_not_opened(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, plan())
    writer.resume(rebuild=False)
    with pytest.raises(InputError, match=r"unfinished \(0 of 3 shards\).*`unteach teach`"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("weights", "x", "teacher weights"),
        ("tokenizer", "x", "tokenizer"),
        ("chat_template", "x", "chat template"),
        ("intentions", "x", "intentions"),
        ("records", "x", "records"),
        ("settings", {"top": 5}, r"teacher.top \(4 before, 5 asked for\)"),
    ],
)
def test_changed_fingerprint_is_named(tmp_path: Path, field: str, value: Any, said: str) -> None:
    write_cache(tmp_path, plan())
    expected = PRINTS.model_copy(update={field: value})
    with pytest.raises(InputError, match=rf"made with other {said}: .*--rebuild"):
        TeacherCache.open(tmp_path, expected=expected)


def test_fingerprints_follow_what_reaches_the_teacher_and_nothing_else() -> None:
    config, tokenizer = Config(), byte_tokenizer()
    records = [
        Record(id="a", goal="forget", question="Who?", answer="He", options=["x"], correct=0)
    ]
    intentions = Intentions(forget=Intention(system="You forgot."))

    def prints(**changes: Any) -> Fingerprints:
        inputs = {
            "config": config,
            "tokenizer": tokenizer,
            "records": records,
            "intentions": intentions,
            "weights_fingerprint": "w",
        }
        return cache_fingerprints(**{**inputs, **changes})

    base = prints()
    other_template = byte_tokenizer()
    other_template.chat_template = "x"
    other_words = byte_tokenizer()
    other_words.add_tokens(["Potter"])
    asked = records[0].model_copy(update={"question": "Why?"})
    teacher = config.teacher.model_copy(update={"form": "topk", "batch_size": 3})
    changed = {
        "teacher weights": prints(weights_fingerprint="v"),
        "chat template": prints(tokenizer=other_template),
        "tokenizer": prints(tokenizer=other_words),
        "records": prints(records=[asked]),
        "intentions": prints(intentions=None),
        "teacher.form (hidden before, topk asked for)": prints(
            config=config.model_copy(update={"teacher": teacher})
        ),
    }
    assert {word: base.changed(each) for word, each in changed.items()} == {
        word: [word] for word in changed
    }
    scored = records[0].model_copy(update={"options": ["y"], "meta": {"fact": 1}})
    assert base == prints(records=[scored])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
