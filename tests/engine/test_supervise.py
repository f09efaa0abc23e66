"""The same micro-batch under every form of the cache: one loss, one gradient."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.engine.config import Config, MethodConfig, override
from unteach.engine.data.records import Record, read_records
from unteach.engine.data.tokens import Example, collate, response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.files import model_fingerprint
from unteach.engine.model import (
    PreTrainedModel,
    head_of,
    load_model,
    load_tokenizer,
    tiny_model,
)
from unteach.engine.teacher.build import build_cache
from unteach.engine.teacher.cache import TeacherCache
from unteach.engine.teacher.intentions import load_intentions
from unteach.engine.train import methods, supervise
from unteach.engine.train.methods import find_method, settle
from unteach.engine.train.seeds import SeedFile
from unteach.engine.train.supervise import (
    _with_cache,
    split_step,
    supervised_loss,
    term_weights,
)
from unteach.engine.train.terms import Rows
from unteach.recipes.tiny import tiny

FORMS = {
    "hidden": (),
    "logits": ("teacher.form=logits",),
    "bf16": ("teacher.form=logits", "teacher.logits_dtype=bfloat16"),
    "topk": ("teacher.form=topk", "teacher.top=258"),
}

EVERYWHERE_GOLD = (
    "teacher.routing=none",
    'teacher.response={"forget": "gold", "attack": "gold"}',
)


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
    (part,) = split_step(examples, config.method)
    head = head_of(model, tokenizer)
    output = supervised_loss(model, batch, part, config.method, head, cache, seeds)
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


def test_where_the_first_weight_lies_says_nothing(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding that is offloaded and still sharded lies on the host, and the batch does not."""
    parts = cached(start, tmp_path / "hidden")
    wanted = loss_and_gradients(start, parts)[0]
    monkeypatch.setattr(PreTrainedModel, "device", torch.device("meta"))
    assert loss_and_gradients(start, parts)[0] == wanted


def test_autocast_reaches_the_head(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the largest product of a step would miss the tensor cores."""
    seen: list[torch.dtype] = []

    def watched(rows: Rows, *given: Any) -> Rows:
        seen.extend((rows.hidden_ND.dtype, rows.head_VD.dtype))
        return _with_cache(rows, *given)

    monkeypatch.setattr(supervise, "_with_cache", watched)
    parts = cached(start, tmp_path / "hidden")
    wide, wide_grads, _ = loss_and_gradients(start, parts)
    with torch.autocast("cpu", torch.bfloat16):
        half, grads, _ = loss_and_gradients(start, parts)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert half == pytest.approx(wide, rel=5e-2)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - wide_grads[name]).norm() <= 0.2 * wide_grads[name].norm(), name


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


def test_a_pass_that_leaves_a_row_out_wipes_no_seed(tmp_path: Path) -> None:
    """As where a rank only keeps step with the others, on a row that one of these supervises."""
    seeds = SeedFile(tmp_path / "seeds.bin", 3, 2)
    rows = torch.tensor([2, 0])
    seeds.write(rows, torch.tensor([[4, 6], [1, 3]]))
    seeds.write(rows, torch.tensor([[-1, -1], [5, 7]]))
    seeds.write(rows, torch.zeros(2, 0, dtype=torch.int32))  # alpha 0: nothing was looked for
    assert seeds.read(rows, None).tolist() == [[4, 6], [5, 7]]


def test_seeds_take_their_room_at_once_or_are_refused(tmp_path: Path) -> None:
    path, before = tmp_path / "seeds.bin", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"seeds\.bin cannot be written .*free space"):
            SeedFile(path, 100, 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
    SeedFile(path, 100, 50)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 20_000, "a sparse file"


def written(name: str, logp: dict[str, list[Tensor]], reference: list[Tensor]) -> Tensor:
    """The published loss of a whole step, from the label log-probabilities of each response."""
    gold, kept = logp["forget gold"], torch.cat(logp["general gold"])
    forget, sums = torch.cat(gold), torch.stack([r.sum() for r in gold])
    lengths = torch.tensor([len(r) for r in gold])
    match name:
        case "ga":
            return methods.ga_loss(forget)
        case "graddiff":
            return methods.graddiff_loss(forget, kept)
        case "npo":
            before = torch.stack([r.sum() for r in reference])
            return methods.npo_loss(sums, before) + methods.sft_loss(kept)
        case "simnpo":
            return 0.1375 * methods.simnpo_loss(sums, lengths) + methods.sft_loss(kept)
        case "flat":  # record by record
            prob = [torch.stack([r.exp().mean() for r in side]) for side in
                    (logp["forget refusal"], gold)]  # fmt: skip
            pairs = zip(*prob, strict=True)
            return torch.stack([methods.flat_loss(e[None], f[None]) for e, f in pairs]).mean()
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["ga", "graddiff", "npo", "simnpo", "flat"])
def test_the_loss_of_a_step_is_the_written_one_however_it_is_cut(
    start: Path, tmp_path: Path, name: str
) -> None:
    config = settle(override(tiny(), [f"method.name={name}"]))
    tokenizer, cache, first = load_tokenizer(str(start), config.model), None, {}
    if name == "npo":
        _, cache, _ = cached(start, tmp_path / "cache", *EVERYWHERE_GOLD)
        first = {entry.id: entry.first_row for entry in cache.entries.values()}
    records = read_records(Path(config.data.path))
    examples = [
        Example(
            record.id,
            record.goal,
            tuple(student_context(tokenizer, record)),
            tuple(response_tokens(tokenizer, text)),
            first.get(record.id),
            says=says,
        )
        for record in records
        if record.split == "train" and record.goal in ("forget", "general")
        for says, text in (("gold", record.answer), ("refusal", "I do not know."))
        if text and (says == "gold" or name == "flat")
    ]
    plain, model = load_model(str(start), config.model), student(start, config)
    logp: dict[str, list[Tensor]] = {}
    reference = []
    for example in examples:
        line = torch.tensor([[*example.context, *example.response]])
        rows = slice(len(example.context) - 1, -1)
        labels = torch.tensor(example.response)[:, None]
        chosen = model(line).logits[0, rows].log_softmax(1).gather(1, labels)[:, 0]
        logp.setdefault(f"{example.goal} {example.says}", []).append(chosen)
        if example.goal == "forget":
            with torch.no_grad():
                before = plain(line).logits[0, rows].log_softmax(1).gather(1, labels)[:, 0]
            reference.append(before)
    wanted = written(name, logp, reference)
    wanted.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (part,) = split_step(examples, config.method)
    total = 0.0
    for chosen_examples in (part.examples[:3], part.examples[3:]):
        batch = collate(chosen_examples)
        head = head_of(model, tokenizer)
        output = supervised_loss(model, batch, part, config.method, head, cache, None)
        output.loss.backward()
        total += float(output.loss.detach())
    assert total == pytest.approx(float(wanted.detach()), rel=1e-5)
    for parameter, grad in zip(model.parameters(), grads.values(), strict=True):
        assert grad is not None and parameter.grad is not None
        assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm()


def weights_and_normalizer(examples: list[Example], method: MethodConfig) -> tuple[Tensor, float]:
    (part,) = split_step(examples, method)
    batch = collate(examples, first_only=method.positions == "first")
    weight_N = term_weights(batch, part.terms[0], part.normalizers[0], method)
    return weight_N * part.normalizers[0], part.normalizers[0]


def test_weights_and_normalizer_follow_the_reduction() -> None:
    examples = [Example("a", "forget", (1,), (2, 3, 4)), Example("b", "general", (1,), (2,))]
    by_position = override(tiny(), ['method.weights={"forget": 2}']).method
    weight_N, normalizer = weights_and_normalizer(examples, by_position)
    assert (weight_N.tolist(), normalizer) == ([2, 2, 2, 1], 4)
    by_record = by_position.model_copy(update={"reduction": "record"})
    weight_N, normalizer = weights_and_normalizer(examples, by_record)
    torch.testing.assert_close(weight_N, torch.tensor([2 / 3] * 3 + [1.0]))
    assert normalizer == 2
    first = by_position.model_copy(update={"positions": "first"})
    assert weights_and_normalizer(examples, first)[1] == 2


def test_each_mean_of_a_method_has_its_own_rows_and_normalizer() -> None:
    examples = [
        Example("a", "forget", (1,), (2, 3, 4), says="gold"),
        Example("a", "forget", (1,), (5, 6), says="refusal"),
        Example("b", "forget", (1,), (2, 7), says="gold"),
        Example("c", "general", (1,), (2,), says="gold"),
    ]
    (flat,) = split_step(examples, MethodConfig(name="flat"))
    assert flat.examples == tuple(examples[:3]) and flat.normalizers == (1, 2)
    (graddiff,) = split_step(examples, MethodConfig(name="graddiff"))
    assert graddiff.normalizers == (5, 1)
    forget, kept = split_step(examples, MethodConfig(name="ngdiff"))
    assert [e.record_id for e in forget.examples] == ["a", "b"] and kept.examples == (examples[3],)
    assert find_method("ngdiff").goals == ("forget", "general", "neighbor", "attack")
