"""Floors by hand, memory as allocated, providers that agree, rows that say what was measured."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unteach.benchmarks import (
    bench_adamw,
    bench_bitopk,
    bench_gather_linear,
    bench_linear_kl,
    bench_linear_logprob,
    bench_linear_topk,
    figures,
    memory_tables,
    real_hidden,
)
from unteach.benchmarks.comparison import MEASURED, Provider, Unavailable, measure, prepare
from unteach.benchmarks.exact import errors_of
from unteach.benchmarks.harness import append_rows, extra_mib, interleaved_ms, spread
from unteach.benchmarks.presets import PRESETS, Case, Preset, make_case
from unteach.benchmarks.providers import providers
from unteach.benchmarks.roofline import (
    Peaks,
    Sizes,
    Stage,
    dense_path,
    floor_ms,
    gather_path,
    peaks_of,
    sparse_path,
)
from unteach.engine.config import ModelConfig
from unteach.engine.model import hidden_states, load_model, tiny_model

CPU = torch.device("cpu")
FIELDS = {
    *("benchmark", "preset", "provider", "device", "tokens", "k", "dtype", "overlap", "inputs"),
    *("versions", "commit", "run", "rounds", "threads", "loss", "same_loss", "dense_pass"),
    *("peak_tflops", "peak_gb_per_s", "drift"),
    *MEASURED,
}
# torch.compile takes a minute and a C++ compiler; it wraps eager.
QUICK = "unteach,unteach-noseeds,eager,chunked,torch-linear-ce"


def tiny_case(**changes: Any) -> Case:
    options: dict[str, Any] = {"tokens": 20, "k": 5, "dtype": torch.float32, "device": CPU}
    return make_case(PRESETS["tiny"], **{**options, **changes})


def test_floor_of_the_sparse_path_by_hand() -> None:
    """The table of a Llama-3.2-3B head, N=8192, K=32, nothing shared, on one H200."""
    sizes = Sizes(
        rows=8192,
        vocab=128256,
        width=3072,
        item=2,
        k=32,
        seeds=64,
        union=64,
        unlisted=32,
        overlap=0,
    )
    dense = 2 * 8192 * 128256 * 3072 / 790e12  # 8.17 ms: more than its bytes take
    row = 3072 * 2
    seeds = (8192 * 64 + 8192) * row / 4.3e12  # 0.76 ms
    teacher = (8192 * 32 + 8192) * row / 4.3e12  # 0.39 ms
    hidden = (8192 * 64 + 8192) * row / 4.3e12
    head = ((8192 * 64 + 128256) * row + 24 * 8192 * 64) / 4.3e12  # 0.94 ms
    peaks = Peaks(790e12, 4.3e12)
    found = floor_ms(sparse_path(sizes, seeds=True), peaks)
    assert found == pytest.approx(1e3 * (dense + seeds + teacher + hidden + head))
    without = floor_ms(sparse_path(sizes, seeds=False), peaks)
    assert without == pytest.approx(1e3 * (dense + teacher + hidden + head))
    assert floor_ms(sparse_path(sizes, seeds=True), Peaks(None, 4.3e12)) is None
    flops = sum(s.flops for s in dense_path(sizes, products=2, passes=5))
    assert flops == 8 * 8192 * 128256 * 3072


def test_peaks_of_a_cpu_are_measured() -> None:
    peaks = peaks_of(CPU, torch.float32)
    assert peaks.flops_per_s is not None and peaks.bytes_per_s is not None
    assert 1e8 < peaks.flops_per_s < 1e14
    assert 1e8 < peaks.bytes_per_s < 1e13


def test_extra_memory_counts_the_peak_without_what_is_handed_back() -> None:
    mib = 2**18  # float32 numbers

    def step() -> tuple[Tensor, ...]:
        first = torch.ones(3 * mib)
        second = torch.ones(5 * mib)  # peak: 3 + 5
        del second
        kept = torch.ones(2 * mib)
        return first.sum(), kept, kept[:1]

    assert extra_mib(step, CPU) == pytest.approx(8 - 2, abs=0.01)


def test_extra_memory_sees_the_logits_of_eager_and_no_others() -> None:
    case = make_case(Preset(16384, 16), tokens=256, k=5, dtype=torch.float32, device=CPU)
    found = {name: extra_mib(providers(CPU)[name].make(case), CPU) for name in ("unteach", "eager")}
    logits = 256 * 16384 * 4 / 2**20
    assert found["eager"] > 2 * logits
    assert found["unteach"] < logits / 2


def test_rows_without_git_have_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    append_rows("x", [{"ms": 1}], torch.device("cpu"), tmp_path)
    assert json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))["commit"] is None


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []

    def step(name: str) -> Any:
        def run() -> tuple[Tensor, ...]:
            calls.append(name)
            return ()

        return run

    times = interleaved_ms({name: step(name) for name in "abc"}, 3, CPU)
    assert "".join(calls) == "abcbcacab"
    assert {len(each) for each in times.values()} == {3}


def test_spread_names_the_percentiles() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {
        "median_ms": 3.5,
        "p20_ms": 2.0,
        "p80_ms": 5.0,
        "min_ms": 1.0,
    }
    assert set(spread([7.0]).values()) == {7.0}


@pytest.mark.parametrize("name", ["unteach", "unteach-noseeds", "eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_providers_of_the_same_loss_agree(name: str, dtype: torch.dtype) -> None:
    case = tiny_case(dtype=dtype)
    errors = errors_of(providers(CPU)[name].make(case)(), case)
    if dtype == torch.float32:
        assert errors.loss < 1e-5 and errors.grad < 1e-5
    elif name.startswith("unteach"):
        assert errors.loss < 2e-4 and errors.grad < 2**-8
    else:  # bf16 logits choose other sets: near, and no more
        assert errors.loss < 0.1


def test_compiled_eager_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    case = tiny_case()
    found = providers(CPU)["compile"].make(case)()
    assert asked == [{"dynamic": False}]
    assert errors_of(found, case).grad < 1e-5


def test_a_wrong_gradient_is_seen() -> None:
    case = tiny_case()
    loss, grad_hidden, grad_head = providers(CPU)["eager"].make(case)()
    spoiled = grad_head.clone()
    spoiled[grad_head.abs().argmax() // grad_head.shape[1]] = 0
    assert errors_of((loss, grad_hidden, spoiled), case).grad > 0.5
    assert errors_of((loss, 2 * grad_hidden, grad_head), case).grad > 0.5
    assert errors_of((2 * loss, grad_hidden, grad_head), case).loss > 0.5


def test_ours_must_be_right() -> None:
    def wrong(case: Case) -> Any:
        loss, *grads = providers(CPU)["eager"].make(case)()
        return lambda: (loss * 1.01, *grads)

    provider = Provider("eq. 3", "none", wrong, lambda sizes: [], errors_of)
    with pytest.raises(AssertionError, match="unteach is wrong"):
        prepare("unteach", provider, tiny_case())


@pytest.mark.parametrize("inputs", ["gaussian", "zipf"])
def test_inputs_have_the_overlap_that_was_asked_for(inputs: str) -> None:
    wide, narrow = (tiny_case(inputs=inputs, tokens=64, overlap=x).sizes for x in (0.8, 0.2))
    assert wide.overlap == pytest.approx(0.8, abs=0.1)
    assert narrow.overlap == pytest.approx(0.2, abs=0.1)
    assert wide.union == pytest.approx(10 - 5 * wide.overlap)
    assert 0 <= wide.unlisted <= 5 * (1 - wide.overlap)


def test_zipf_inputs_have_hot_ids() -> None:
    def hottest(inputs: str) -> int:
        ids = tiny_case(inputs=inputs, tokens=128).teacher.ids_NM
        assert ids is not None
        return int(ids[:, :5].flatten().bincount().max())

    assert hottest("zipf") > 3 * hottest("gaussian")


def test_a_provider_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    known = providers(CPU)
    rows = measure(
        tiny_case(),
        {name: known[name] for name in ("eager", "liger", "cce", "quack", "torch-linear-ce")},
        rounds=1,
        peaks=Peaks(1e12, 1e10),
    )
    reasons = {row["provider"]: row.get("skipped") for row in rows}
    assert reasons["eager"] is None
    assert reasons["liger"] == "liger-kernel needs a GPU"
    assert "has no chunked linear_cross_entropy" in str(reasons["torch-linear-ce"])
    assert all("\n" not in str(reason) for reason in reasons.values())


@pytest.mark.parametrize("name", ["liger", "cce", "quack"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(module: str, *rest: Any) -> Any:
        if module.split(".")[0] in ("liger_kernel", "cut_cross_entropy", "quack"):
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("unteach.benchmarks.providers._needs_gpu", lambda *_: None)
    with pytest.raises(Unavailable, match="is not installed"):
        providers(CPU)[name].make(tiny_case())


def test_a_failure_of_another_project_is_a_reason() -> None:
    def broken(case: Case) -> Any:
        raise RuntimeError("out of luck\nand a long trace")

    provider = Provider("another", "none", broken, lambda sizes: [])
    with pytest.raises(Unavailable, match=r"^RuntimeError: out of luck$"):
        prepare("other", provider, tiny_case())
    with pytest.raises(RuntimeError, match="and a long trace"):
        prepare("unteach", provider, tiny_case())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    given = ["--preset", "tiny", "--tokens", "24,48", "--k", "4", "--rounds", "2"]
    bench_bitopk.main([*given, "--providers", f"{QUICK},cce", "--results", str(folder)])
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_have_the_schema(results: Path) -> None:
    rows = rows_of(results / "bench_bitopk.jsonl")
    assert len(rows) == 2 * 6
    for row in rows:
        assert set(row) - {"skipped"} == FIELDS
        assert row["benchmark"] == "bench_bitopk" and row["preset"] == "tiny"
        if row["provider"] in ("cce", "torch-linear-ce"):  # no GPU here, no soft cap there
            assert row["skipped"] and row["median_ms"] is None
            continue
        assert "skipped" not in row
        assert 0 < row["min_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["tflops"] > 0 and row["floor_ms"] > 0
        assert (row["loss_error"] is not None) == row["same_loss"]


def test_topk_rows_have_the_schema(tmp_path: Path) -> None:
    given = ["--preset", "tiny", "--tokens", "24", "--k", "4", "--rounds", "1"]
    bench_linear_topk.main([*given, "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "bench_linear_topk.jsonl")
    assert [row["provider"] for row in rows] == [
        *("unteach", "unteach-noseeds", "torch", "chunked", "mm")
    ]
    assert all(row["loss_error"] < 1e-5 for row in rows if row["same_loss"])
    assert not rows[-1]["same_loss"]


def test_optimiser_rows_have_the_schema(tmp_path: Path) -> None:
    bench_adamw.main(["--elements", "5000", "--rounds", "3", "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "bench_adamw.jsonl")
    assert [row["provider"] for row in rows] == list(bench_adamw.PROVIDERS)
    assert all(row["elements"] == 5000 and row["median_ms"] > 0 for row in rows)
    assert rows[3]["floor_ms"] == pytest.approx(2 * rows[0]["floor_ms"])  # 28 and 14 bytes


def test_memory_of_a_step_stands_in_the_readme(tmp_path: Path) -> None:
    same = {"preset": "tiny", "sequences": 8, "tokens": 128, "dtype": "float32", "device": "cpu"}
    made = {"threads": 1, "versions": {"torch": "2"}, "commit": "c"}
    times = {"min_ms": 1400.0, "max_ms": 1600.0}
    figures_of = {"peak_mib": 1000.4, "above_state_mib": 99.6, **times}
    rows = [{"provider": "eager", **same, **made, **figures_of, "peak_mib": 5.0}]
    rows += [{"provider": name, **same, **made, **figures_of} for name in ("unteach", "eager")]
    rows[-1]["above_state_mib"] = 199.2
    text = memory_tables.memory_block(rows)
    assert "| `unteach` | 1000 | 100 | 2.0× | 2.0× | 1.4 to 1.6 |" in text
    assert text.count("`eager` |") == 1 and "| 5 |" not in text


def test_plan_and_measured_peaks_stand_side_by_side() -> None:
    made = {"model": "tiny", "shape": [8, 128], "versions": {"torch": "2"}, "commit": "c"}
    bytes_of = {"planned_mib": 110.0, "live_mib": 100.0, "resident_mib": 220.0}
    rows = [
        {"checkpointing": "off", "pack_tokens": None, **made, **bytes_of, "live_mib": 1.0},
        {"checkpointing": "off", "pack_tokens": None, **made, **bytes_of},
        {"checkpointing": "full", "pack_tokens": 256, **made, **bytes_of},
    ]
    text = memory_tables.plan_block(rows)
    assert "| `off` | 110 | 100 (plan +10.0%) | 220 (plan -50.0%) |" in text
    assert "| `full`, packed by 256 |" in text and text.count("`off`") == 1


def test_logprob_rows_have_the_schema(tmp_path: Path) -> None:
    given = ["--preset", "tiny", "--tokens", "16", "--k", "4", "--rounds", "1"]
    bench_linear_logprob.main([*given, "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "bench_linear_logprob.jsonl")
    names = ["unteach", "eager", "cce", "quack", "torch-linear-ce"]
    assert [row["provider"] for row in rows] == names
    assert all(row["same_loss"] and row.keys() >= FIELDS for row in rows)
    assert rows[-1]["skipped"].endswith(("has no soft cap", "has no chunked linear_cross_entropy"))


@pytest.mark.parametrize(
    ("bench", "names"),
    [
        (bench_gather_linear, ["unteach", "eager", "rows"]),
        (bench_linear_kl, ["unteach", "eager", "liger"]),
    ],
)
def test_rows_of_the_other_kernels_have_the_schema(
    bench: Any, names: list[str], tmp_path: Path
) -> None:
    given = ["--preset", "tiny", "--tokens", "16", "--k", "4", "--rounds", "1"]
    bench.main([*given, "--results", str(tmp_path)])
    rows = rows_of(tmp_path / f"{bench.__name__.rpartition('.')[2]}.jsonl")
    assert [row["provider"] for row in rows] == names
    assert all(row["same_loss"] and row.keys() >= FIELDS for row in rows)
    measured = [row for row in rows if "skipped" not in row]
    assert all(row["loss_error"] < 1e-5 and row["floor_ms"] > 0 for row in measured)
    assert {row["provider"] for row in rows if "skipped" in row} == {*names} & {"liger"}


@pytest.mark.parametrize(
    ("bench", "name"),
    [
        (bench_linear_logprob, "unteach"),
        (bench_linear_logprob, "eager"),
        (bench_linear_logprob, "torch-linear-ce"),
        (bench_linear_kl, "unteach"),
        (bench_linear_kl, "eager"),
        (bench_gather_linear, "unteach"),
        (bench_gather_linear, "eager"),
        (bench_gather_linear, "rows"),
    ],
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_providers_agree_with_float64(bench: Any, name: str, softcap: float | None) -> None:
    options: dict[str, Any] = {"tokens": 20, "k": 5, "dtype": torch.float32, "device": CPU}
    case = make_case(Preset(1003, 24, softcap), **options)
    provider = bench.providers(CPU)[name]
    assert provider.check is not None
    try:
        found = provider.make(case)()
    except Unavailable as reason:
        assert name == "torch-linear-ce" and (softcap or "has no chunked" in str(reason))
        return
    errors = provider.check(found, case)
    assert max(errors.loss, errors.grad) < 2e-5
    wrong = provider.check((found[0], found[1], found[2] * 1.01), case)
    assert wrong.grad == pytest.approx(0.01, rel=0.1)
    wrong = provider.check((found[0] * 1.01, *found[1:]), case)
    assert wrong.loss == pytest.approx(0.01, rel=0.1)


def test_floor_of_the_gather_by_hand() -> None:
    sizes = Sizes(
        rows=8, vocab=1000, width=16, item=2, k=4, seeds=8, union=8, unlisted=4, overlap=0
    )
    forward, hidden, head = gather_path(sizes)
    assert forward == hidden == Stage(2 * 64 * 16, (64 + 8) * 32)
    assert head == Stage(2 * 64 * 16, (64 + 1000) * 32 + 24 * 64)


def test_figures_are_drawn_and_the_readme_block_rewritten(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{figures.BEGIN}\nstale\n{figures.END}\nafter\n")
    for _ in range(2):
        figures.main(["--results", str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "stale" not in text and text.count("On a GPU: not measured.") == 1
    assert "| tiny, float32 | 48 | 4 | gaussian |" in text
    (picture,) = results.glob("*.png")
    assert picture.name in text and picture.stat().st_size > 10_000
    tables = (results / "bitopk.md").read_text()
    assert "skipped: cut-cross-entropy needs a GPU" in tables


def test_figures_take_the_last_full_run() -> None:
    base = dict.fromkeys(figures.SAME_CASE, 1)
    rows = [
        {**base, "provider": name, "run": run, **more}
        for run, name, more in (
            ("1", "unteach", {}),
            ("1", "eager", {}),
            ("2", "unteach", {}),
            ("2", "eager", {}),
            ("3", "unteach", {}),
            ("4", "unteach", {}),
            ("4", "eager", {"skipped": "no memory"}),
        )
    ]
    (case,) = figures.latest_cases(rows)
    assert case["unteach"]["run"] == "2"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--providers", "nobody"], "no nobody"),
        (["--tokens", "x"], "invalid numbers value"),
        (["--overlap", "1.5"], "invalid shares value"),
        (["--backend", "nobody"], "backend must be one of"),
    ],
)
def test_bad_arguments_are_refused(
    given: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_bitopk.main(given)
    assert reason in capsys.readouterr().err


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "real.safetensors"
    width, vocab = PRESETS["tiny"].width, PRESETS["tiny"].vocab
    sides = {f"{side}_hidden": torch.randn(30, width) for side in ("student", "teacher")}
    save_file({**sides, "head": torch.randn(vocab, width)}, path)
    assert tiny_case(inputs=str(path)).sizes.rows == 20
    with pytest.raises(ValueError, match="30 rows, fewer than --tokens 31"):
        tiny_case(inputs=str(path), tokens=31)
    save_file({**sides, "head": torch.randn(vocab + 1, width)}, path)
    with pytest.raises(ValueError, match="holds a head of shape"):
        tiny_case(inputs=str(path))


def test_real_rows_are_those_that_both_sides_share(tmp_path: Path) -> None:
    model = load_model(str(tiny_model(tmp_path / "model", tied=False)), ModelConfig())
    student, teacher = [[1, 2, 9, 7, 8], [1, 2, 6, 5]], [[3, 4, 9, 7, 8], [3, 4, 1, 6, 5]]
    counts = [real_hidden._common_end(a, b) for a, b in zip(student, teacher, strict=True)]
    assert counts == [3, 2]
    for lines, prefix in ((student, 0), (teacher, 2)):
        found = real_hidden._read(model, lines, counts, prefix=prefix)
        with torch.no_grad():
            alone = [hidden_states(model, torch.tensor([line]))[0] for line in lines]
        true = torch.cat((alone[0][-3:-1], alone[1][-2:-1]))
        torch.testing.assert_close(found, true)
