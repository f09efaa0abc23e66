"""The same micro-batch under every form of the cache: one loss, one gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.config import Config, override
from unteach.engine.data.records import Record, read_records
from unteach.engine.data.tokens import Example, collate, student_context
from unteach.engine.model import (
    PreTrainedModel,
    head_of,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tiny_model,
)
from unteach.engine.teacher.build import build_cache
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import load_intentions
from unteach.engine.train.seeds import SeedFile
from unteach.engine.train.supervise import count_normalizer, row_weights, supervised_loss
from unteach.recipes.tiny import tiny

FORMS = {
    "hidden": (),
    "logits": ("teacher.form=logits",),
    "bf16": ("teacher.form=logits", "teacher.logits_dtype=bfloat16"),
    "topk": ("teacher.form=topk", "teacher.top=258"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("start") / "tiny", tied=False)


def cached(start: Path, folder: Path, *settings: str) -> tuple[Config, TeacherCache, list[Record]]:
    config = override(tiny(), settings)
    model = load_model(str(start), config.model)
    tokenizer = load_tokenizer(str(start), config.model)
    records = [r for r in read_records(Path(config.data.path)) if r.split == "train"]
    assert config.teacher.intentions is not None
    intentions = load_intentions(Path(config.teacher.intentions))
    fingerprint = model_fingerprint(str(start))
    cache = build_cache(
        config, model, tokenizer, records, intentions, folder, weights_fingerprint=fingerprint
    )
    return config, cache, records


def student(start: Path, config: Config) -> PreTrainedModel:
    """The tiny model, moved away from its teacher."""
    model = load_model(str(start), config.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def loss_and_gradients(
    start: Path, parts: tuple[Config, TeacherCache, list[Record]], seeds: SeedFile | None = None
) -> tuple[float, dict[str, Tensor], Any]:
    config, cache, records = parts
    tokenizer = load_tokenizer(str(start), config.model)
    examples = [
        Example(
            r.id,
            r.goal,
            tuple(student_context(tokenizer, r)),
            tuple(cache.labels(r.id)),
            cache.entries[r.id].first_row,
        )
        for r in records[::3]
    ]
    model = student(start, config)
    batch = collate(examples)
    output = supervised_loss(
        model,
        batch,
        row_weights(batch, config.method),
        count_normalizer(examples, config.method),
        config.method,
        head_of(model, tokenizer),
        cache,
        seeds,
    )
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(output.loss.detach()), grads, output


@pytest.mark.parametrize(("form", "tolerance"), [("logits", 1e-4), ("bf16", 2e-2), ("topk", 1e-4)])
def test_forms_of_the_cache_agree(start: Path, tmp_path: Path, form: str, tolerance: float) -> None:
    wanted, wanted_grads, _ = loss_and_gradients(start, cached(start, tmp_path / "hidden"))
    got, grads, _ = loss_and_gradients(start, cached(start, tmp_path / form, *FORMS[form]))
    assert got == pytest.approx(wanted, rel=tolerance)
    if form == "bf16":  # rounding moves ids in and out of the teacher's set
        return
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        assert (grad - wanted_grads[name]).norm() <= tolerance * wanted_grads[name].norm(), name


def test_topk_says_how_much_it_covers(start: Path, tmp_path: Path) -> None:
    parts = cached(start, tmp_path / "few", "teacher.form=topk", "teacher.top=4")
    _, _, output = loss_and_gradients(start, parts)
    coverage = output.coverage_N
    assert coverage is not None and 0 < float(coverage.mean()) < 1


def test_seeds_change_no_bit_and_are_written_back(start: Path, tmp_path: Path) -> None:
    parts = cached(start, tmp_path / "cache")
    config, cache, _ = parts
    plain, plain_grads, output = loss_and_gradients(start, parts)
    seeds = SeedFile(tmp_path / "seeds.bin", cache.rows_total, 2 * config.method.k)
    first = loss_and_gradients(start, parts, seeds)
    again = loss_and_gradients(start, parts, seeds)
    for loss, grads, _ in (first, again):
        assert loss == plain
        assert all(torch.equal(grads[name], grad) for name, grad in plain_grads.items())
    row_N = torch.arange(cache.entries[parts[2][0].id].rows)
    kept = SeedFile(tmp_path / "seeds.bin", cache.rows_total, 2 * config.method.k)
    stored = kept.read(row_N + cache.entries[parts[2][0].id].first_row, None)
    k = config.method.k
    assert torch.equal(stored[:, :k], output.student_ids_NS[: len(row_N), :k])


def test_seed_file_gives_the_caches_ids_until_it_has_its_own(tmp_path: Path) -> None:
    seeds = SeedFile(tmp_path / "seeds.bin", 5, 3)
    rows = torch.tensor([4, 1])
    first = torch.tensor([[7, 8], [9, 1]], dtype=torch.int32)
    assert seeds.read(rows, first).tolist() == [[7, 8, -1], [9, 1, -1]]
    assert seeds.read(rows, None).tolist() == [[-1, -1, -1]] * 2
    seeds.write(rows[:1], torch.tensor([[0, 2, 5]]))
    assert SeedFile(tmp_path / "seeds.bin", 5, 3).read(rows, first).tolist() == [
        [0, 2, 5],
        [9, 1, -1],
    ]


def test_weights_and_normalizer_follow_the_reduction(start: Path) -> None:
    examples = [Example("a", "forget", (1,), (2, 3, 4)), Example("b", "general", (1,), (2,))]
    batch = collate(examples)
    by_position = override(tiny(), ['method.weights={"forget": 2}']).method
    assert row_weights(batch, by_position).tolist() == [2, 2, 2, 1]
    assert count_normalizer(examples, by_position) == 4
    by_record = by_position.model_copy(update={"reduction": "record"})
    torch.testing.assert_close(row_weights(batch, by_record), torch.tensor([2 / 3] * 3 + [1.0]))
    assert count_normalizer(examples, by_record) == 2
    first = by_position.model_copy(update={"positions": "first"})
    assert count_normalizer(examples, first) == 2
