"""What is asked of a model after forgetting, against figures made another way."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.engine.tiny_start import fresh, records
from tests.engine.tiny_start import start as start
from unteach.engine.config import Config, override
from unteach.engine.data.records import Goal, Record, write_records
from unteach.engine.data.tokens import response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.evaluate.headings import heading_of, is_stress, place_of
from unteach.engine.evaluate.scores import auc
from unteach.engine.evaluate.stress import (
    check_stresses,
    min_k_scores,
    not_measured,
    quantize_,
    relearn_,
    relearned_records,
    stressed,
    trained_records,
)
from unteach.engine.evaluate.suites import evaluate, protocol_hash
from unteach.engine.model import PreTrainedModel, load_tokenizer, tiny_model
from unteach.recipes.tiny import tiny


def gold_logps(model: PreTrainedModel, path: str, record: Record) -> list[float]:
    """Log-probabilities of the gold answer's tokens from whole logits."""
    tokenizer = load_tokenizer(path, tiny().model)
    context = student_context(tokenizer, record)
    labels = response_tokens(tokenizer, record.golds[0], prefix=record.prefix)
    with torch.no_grad():
        logits = model(torch.tensor([context + labels])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.tensor(labels)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(("bits", "levels", "group"), [(8, 127, 64), (4, 7, 64)])
def test_rounding_stays_within_half_a_step(start: str, bits: int, levels: int, group: int) -> None:
    model, before = fresh(start), dict(fresh(start).named_parameters())
    quantize_(model, bits)
    for name, weight in model.named_parameters():
        old = before[name]
        if "embed" in name or "norm" in name:
            assert torch.equal(weight, old), name
            continue
        assert not torch.equal(weight, old)
        row = slice(0, weight.shape[1] if bits == 8 else group)
        step = old[:, row].abs().amax(1, keepdim=True) / levels
        assert bool(((weight - old)[:, row].abs() <= step * 0.501).all()), name
        assert len(weight[0, row].unique()) <= 2 * levels + 1
    once = [p.detach().clone() for p in model.parameters()]
    quantize_(model, bits)
    for twice, weight in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(twice, weight)


WIDE = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 80}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def rounded_rows(weight: Tensor, bits: int) -> Tensor:
    """[out, in], each row rounded by itself, 64 inputs at a time at 4 bits."""
    most, size = (127, weight.shape[1]) if bits == 8 else (7, 64)
    parts = [part for row in weight for part in row.split(size)]
    steps = [part.abs().max() / most for part in parts]
    rounded = [(p / step).round() * step for p, step in zip(parts, steps, strict=True)]
    return torch.cat(rounded).view_as(weight)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_experts_in_one_tensor_are_rounded_along_what_they_read(family: str, bits: int) -> None:
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        family,
        vocab_size=64,
        pad_token_id=0,
        interleave_moe_layer_step=1,
        **WIDE,
        **EXPERTS,
        **HEADS,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    before = {
        name: getattr(experts, name).detach().clone() for name in ("gate_up_proj", "down_proj")
    }
    quantize_(model, bits)
    for name, read in (("gate_up_proj", 96), ("down_proj", 80)):
        weight = getattr(experts, name)
        for expert, old in zip(weight, before[name], strict=True):
            if family != "qwen3_moe":  # [in, out]
                expert, old = expert.T, old.T
            assert old.shape[1] == read
            torch.testing.assert_close(expert, rounded_rows(old, bits))
            assert not torch.equal(expert, old)


def test_a_tied_head_is_not_rounded(tmp_path: Path) -> None:
    path = str(tiny_model(tmp_path / "tied", tied=True))
    model = fresh(path)
    before = model.get_input_embeddings().weight.detach().clone()
    quantize_(model, 4)
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_relearning_makes_the_gold_answers_likelier(start: str) -> None:
    config = override(tiny(), ["evaluate.relearn_steps=5", "evaluate.relearn_lr=3e-3"])
    model, tokenizer = fresh(start), load_tokenizer(start, config.model)
    chosen = relearned_records(2, records())
    assert [r.id for r in chosen] == ["forget-owl", "forget-house"]
    before = [sum(gold_logps(model, start, record)) for record in chosen]
    relearn_(config, model, tokenizer, chosen)
    after = [sum(gold_logps(model, start, record)) for record in chosen]
    assert all(b > a + 1 for a, b in zip(before, after, strict=True))


def test_relearning_that_breaks_the_model_is_no_forgetting(start: str) -> None:
    config = override(tiny(), ["evaluate.relearn_steps=5", "evaluate.relearn_lr=1e20"])
    tokenizer = load_tokenizer(start, config.model)
    with pytest.raises(InputError, match=r"lower evaluate\.relearn_lr"):
        relearn_(config, fresh(start), tokenizer, relearned_records(2, records()))


def test_min_k_is_the_mean_of_the_least_likely_fifth(start: str) -> None:
    model, tokenizer = fresh(start), load_tokenizer(start, tiny().model)
    chosen = trained_records(records())
    for record, score in zip(chosen, min_k_scores(model, tokenizer, chosen), strict=True):
        logps = sorted(gold_logps(model, start, record))
        least = logps[: max(1, len(logps) // 5)]
        assert score == pytest.approx(sum(least) / len(least), rel=1e-4)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]).value == 100.0
    assert auc([1.0], [1.0, 1.0]).value == 50.0
    source = random.Random(0)
    members = [source.gauss(0.5, 1) for _ in range(200)]
    others = [source.gauss(0.0, 1) for _ in range(200)]
    found = auc(members, others)
    assert found.low < 100 * 0.638 < found.high  # Φ(0.5/√2)
    assert 8 < found.high - found.low < 14 and found.n == 400


def test_only_what_is_asked_for_stands_beside_the_scores(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(start, tiny().model)
    asked = [Record(id=f"p{n}", goal="forget", question=f"Owl {n}?", answer="Hedwig") for n in "ab"]
    write_records(tmp_path / "other.jsonl", asked)
    load = partial(fresh, start)
    plain = evaluate(tiny(), load(), tokenizer, records(), mmlu=None)
    assert stressed(tiny(), load, tokenizer, records(), plain).extra == plain.extra
    assert capsys.readouterr().out.count("(evaluate.") == 7, "what is left out is said"
    path = tmp_path / "other.jsonl"
    goals: tuple[Goal, ...] = ("forget", "general")
    questions = [Record(id=goal, goal=goal, question=f"Of {goal}?") for goal in goals]
    write_records(tmp_path / "open.jsonl", questions)
    config = override(
        tiny(),
        [
            f'evaluate.extra_records={{"paraphrased": "{path}"}}',
            f"evaluate.holdout={path}",
            "evaluate.quantized=[8, 4]",
            "evaluate.relearn_steps=1",
            "evaluate.relearn_rows=[4, 1]",
            "evaluate.few_shot=2",
            f"evaluate.searched_prefixes={tmp_path / 'found.txt'}",
            f"evaluate.open_questions={tmp_path / 'open.jsonl'}",
        ],
    )
    (tmp_path / "found.txt").write_text("So it is\n")
    assert not_measured(config) == []
    found = stressed(config, load, tokenizer, records(), plain)
    new = found.extra.keys() - plain.extra.keys()
    rounded = {f"int{b}_{n}" for b in (8, 4) for n in ("forget", "general", "neighbor", "attack")}
    relearned = {f"relearned_{k}_forget{part}" for k in (4, 1) for part in ("", "_held_out")}
    others = {"few_shot_forget", "searched_attack", "forget_file_paraphrased", "min_k_auc"}
    unseen = {"open_forget_refused", "open_general_refused", "open_auc"}
    assert new == rounded | relearned | others | unseen
    assert all(is_stress(name) and heading_of(name)[0] != name for name in new)
    assert not any(is_stress(name) for name in plain.extra)
    order = sorted(new, key=place_of)
    assert order.index("relearned_1_forget_held_out") < order.index("relearned_4_forget")
    assert [s["id"] for s in found.samples if s["suite"] == "forget_file_paraphrased"] == [
        "pa",
        "pb",
    ]
    assert protocol(config) != protocol(tiny())
    before = protocol(config)
    write_records(path, asked[:1])
    assert protocol(config) != before, "the file's content is part of the protocol"


def protocol(config: Config) -> str:
    return protocol_hash(config, records(), None, "words")


def test_a_file_that_cannot_be_scored_is_refused_first(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    config = override(tiny(), [f'evaluate.extra_records={{"x": "{path}"}}'])
    with pytest.raises(InputError, match=r"evaluate\.extra_records\.x: .* cannot be read"):
        check_stresses(config, records())
    with pytest.raises(InputError, match=r"evaluate\.extra_records\.x: .* cannot be read"):
        protocol(config)
    held = override(tiny(), [f"evaluate.holdout={path}"])
    with pytest.raises(InputError, match=r"evaluate\.holdout: .* cannot be read"):
        check_stresses(held, records())
    write_records(path, [Record(id="g", goal="general", question="Q?", answer="A")])
    with pytest.raises(InputError, match="'g' is no forget question"):
        check_stresses(config, records())
    write_records(path, [Record(id="c", goal="forget", question="Q?", answer="Хедвиг")])
    with pytest.raises(InputError, match=r"^evaluate\.extra_records\.x: .*'c'.* sees no word"):
        check_stresses(config, records())
    rounded = override(tiny(), ["evaluate.quantized=[8]", "evaluate.goals=[]"])
    with pytest.raises(InputError, match=r"evaluate\.quantized asks .* there are none"):
        check_stresses(rounded, records())
    relearn = override(tiny(), ["evaluate.relearn_steps=1", "evaluate.relearn_rows=[1, 5]"])
    with pytest.raises(InputError, match="asks for 5 forget rows, and 4 are trained on"):
        check_stresses(relearn, records())
    with pytest.raises(InputError, match="gold answer"):
        check_stresses(relearn, [r for r in records() if r.goal != "forget"])


def test_a_model_that_relearns_on_fifty_rows_only_is_caught(start: str) -> None:
    """Rows 21 to 50 teach what the test asks; five and twenty rows teach something else."""
    rows = [
        question(f"Say no {i}.", "no", fact=f"no {i}")
        if i < 20
        else question(f"Which owl has number {i}?", "owl", fact=f"owl {i}")
        for i in range(50)
    ]
    asked = [question(f"Owl number {i}, which?", "owl", "test", f"owl {i}") for i in (30, 71, 72)]
    settings = ["relearn_steps=30", "relearn_rows=[5, 20, 50]", "relearn_lr=3e-3"]
    config = override(
        tiny(), [f"evaluate.{s}" for s in (*settings, 'goals=["forget"]', "max_new_tokens=4")]
    )
    tokenizer = load_tokenizer(start, config.model)
    everything = [*rows, *asked]
    check_stresses(config, everything)
    plain = evaluate(config, fresh(start), tokenizer, everything, mmlu=None)
    found = stressed(config, partial(fresh, start), tokenizer, everything, plain)
    values = {k: found.extra[f"relearned_{k}_forget"] for k in (5, 20, 50)}
    assert [values[k].value for k in (5, 20, 50)] == [0.0, 0.0, 100.0]
    unseen = {k: found.extra[f"relearned_{k}_forget_held_out"].n for k in (5, 20, 50)}
    assert unseen == {5: 3, 20: 3, 50: 2}, "the fact of row 30 is seen by fifty rows alone"
    assert [s["id"] for s in found.samples if s["suite"] == "relearned_50_forget"] == [
        r.id for r in sorted(asked, key=lambda r: r.id)
    ]


def question(text: str, answer: str, split: str = "train", fact: str | None = None) -> Record:
    meta = {} if fact is None else {"fact": fact}
    return Record(
        id=text,
        goal="forget",
        question=text,
        answer=answer,
        split=split,  # type: ignore[arg-type]
        meta=meta,
    )
