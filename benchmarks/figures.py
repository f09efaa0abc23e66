"""From benchmarks/results/*.jsonl to tables, pictures and the README's performance block.

Of every case the last run that measured both ours and eager counts, so each ratio comes from one
process. On a CPU the best round is compared, on a GPU the median.

    python -m unteach.benchmarks.figures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from unteach.benchmarks.harness import RESULTS
from unteach.benchmarks.memory_tables import memory_block, plan_block

Row = dict[str, Any]
# The rows of one case, by provider.
Case = dict[str, Row]

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- figures:kernels -->", "<!-- /figures:kernels -->"
MEMORY = "<!-- figures:memory -->", "<!-- /figures:memory -->"
PLAN = "<!-- figures:plan -->", "<!-- /figures:plan -->"
SAME_CASE = ("device", "threads", "preset", "dtype", "inputs", "tokens", "k", "overlap", "drift")
OURS = ("unteach", "unteach-noseeds", "unteach-other")
# Okabe-Ito; what computes another loss is grey and hatched, or dashed.
COLOURS = {
    "unteach": "#0072B2",
    "unteach-noseeds": "#56B4E9",
    "unteach-other": "#CC79A7",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "chunked": "#009E73",
}
MARKERS = "osD^vPX*<>"
DEFINITIONS = """\
`eager`: both products in the input dtype, `torch.topk` on both, float32 Smooth-L1, autograd.
`chunked`: the same loss from our teacher cache, products of 2048 rows, `torch.topk`, dense
gradients by hand. Seeds: the student's top 2K ids before its logits drifted (standard deviation
0.5 unless the row says otherwise). Extra memory: peak less inputs and the gradients handed back.
Roofline: share of the least time that our path's FLOPs and bytes take at the device's peaks."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of results, oldest first; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest_cases(rows: Iterable[Row]) -> list[Case]:
    """The last full comparison of each case, in order of device, head and size."""
    runs: dict[tuple[Any, ...], Case] = {}
    for row in rows:
        key = tuple(row[name] for name in SAME_CASE)
        runs.setdefault((key, row["run"]), {})[row["provider"]] = row
    latest: dict[tuple[Any, ...], Case] = {}
    for (key, _), case in runs.items():
        if all(name in case and "skipped" not in case[name] for name in ("unteach", "eager")):
            latest[key] = case
    return [latest[key] for key in sorted(latest, key=str_last)]


def str_last(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes sort as numbers and names as text."""
    return tuple((isinstance(part, str), part) for part in key)


def on_gpu(row: Row) -> bool:
    return "NVIDIA" in row["device"]


def time_of(row: Row) -> float:
    """What ratios are made of."""
    return float(row["median_ms"] if on_gpu(row) else row["min_ms"])


def measured(case: Case) -> list[Row]:
    return [row for row in case.values() if "skipped" not in row]


def case_name(row: Row) -> str:
    return (
        f"{row['preset']}, N={row['tokens']}, K={row['k']}, {row['dtype']}, "
        f"{row['inputs']} inputs, {_machine(row)}"
    )


def picture_title(row: Row, over_tokens: bool) -> str:
    """What all of a picture's cases share; their N too, where it is not the axis."""
    size = "" if over_tokens else f" N={row['tokens']},"
    return f"{row['preset']},{size} K={row['k']}, {row['dtype']}, {_machine(row)}"


def _machine(row: Row) -> str:
    return row["device"] if on_gpu(row) else f"{row['device']}, threads: {row['threads']}"


def ms(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def full_table(case: Case) -> str:
    """Every provider of a case."""
    first = next(iter(case.values()))
    eager = case["eager"]
    lines = [
        f"### {case_name(first)}",
        "",
        f"Overlap of teacher and student {first['overlap']:.2f}, {first['rounds']} rounds, commit "
        f"`{first['commit']}`, torch {first['versions']['torch']}, {first['run']}.",
        "",
        "| provider | loss | median ms | p20 to p80 | best | × eager | extra MiB | TFLOP/s "
        "| roofline | loss error | gradient error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in case.items():
        if "skipped" in row:
            lines.append(f"| {name} | {row['loss']} | skipped: {row['skipped']} |" + " |" * 8)
            continue
        share = row["share_of_roofline"]
        errors = [
            "" if row[each] is None else f"{row[each]:.0e}" for each in ("loss_error", "grad_error")
        ]
        cells = (
            ms(row["median_ms"]),
            f"{ms(row['p20_ms'])} to {ms(row['p80_ms'])}",
            ms(row["min_ms"]),
            f"{time_of(eager) / time_of(row):.2f}" if row["same_loss"] else "",
            f"{row['extra_mib']:.1f}",
            f"{row['tflops']:.3g}",
            "" if share is None else f"{share:.0%}",
            *errors,
        )
        lines.append(f"| {name} | {row['loss']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(cases: Sequence[Case]) -> str:
    """One line a case: ours beside eager and chunked."""
    lines = [
        "| head | N | K | inputs | unteach | without seeds | eager | chunked | faster than eager "
        "| extra MiB, ours / eager | less | roofline |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        ours, eager = case["unteach"], case["eager"]
        spread = f"{ms(ours['p20_ms'])} to {ms(ours['p80_ms'])}"
        share = ours["share_of_roofline"]
        cells = (
            f"{ours['preset']}, {ours['dtype']}",
            f"{ours['tokens']}",
            f"{ours['k']}",
            ours["inputs"],
            f"{ms(time_of(ours))} ms ({spread})",
            *(_time(case.get(name)) for name in ("unteach-noseeds", "eager", "chunked")),
            f"**{time_of(eager) / time_of(ours):.1f}×**",
            f"{ours['extra_mib']:.1f} / {eager['extra_mib']:.1f}",
            f"**{eager['extra_mib'] / ours['extra_mib']:.0f}×**",
            "" if share is None else f"{share:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: Row | None) -> str:
    return "" if row is None or "skipped" in row else f"{ms(time_of(row))} ms"


def draw(cases: Sequence[Case]) -> Figure:
    """Time and extra memory: over tokens where several were measured, else over providers."""
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    first = next(iter(cases[0].values()))
    over_tokens = len({case["unteach"]["tokens"] for case in cases}) > 1
    figure.suptitle(picture_title(first, over_tokens))
    panels: Any = figure.subplots(1, 2)
    for panel, field, label in zip(
        panels, (time_of, extra_of), ("forward + backward, ms", "extra memory, MiB"), strict=True
    ):
        if over_tokens:
            _lines(panel, cases, field)
        else:
            _bars(panel, cases, field)
        panel.set_title(label)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def extra_of(row: Row) -> float:
    return float(row["extra_mib"])


def _names(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for case in cases for row in measured(case)))


def _lines(panel: Any, cases: Sequence[Case], field: Any) -> None:
    for index, name in enumerate(_names(cases)):
        rows = [case[name] for case in cases if name in case and "skipped" not in case[name]]
        panel.plot(
            [row["tokens"] for row in rows],
            [field(row) for row in rows],
            color=COLOURS.get(name, "#777777"),
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if rows[0]["same_loss"] else "--",
            label=name if rows[0]["same_loss"] else f"{name} (another loss)",
        )
    panel.set(xscale="log", yscale="log", xlabel="tokens (N)")
    ticks = sorted({case["unteach"]["tokens"] for case in cases})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    # At 1, 2 and 5 of every power of ten: an axis that spans one power would have a single label.
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)


def _bars(panel: Any, cases: Sequence[Case], field: Any) -> None:
    names = _names(cases)[::-1]
    height = 0.8 / len(cases)
    several = len({case["unteach"]["inputs"] for case in cases}) == len(cases)
    for index, case in enumerate(cases):
        places = [i + 0.4 - height * (index + 0.5) for i in range(len(names))]
        rows = [case.get(name) for name in names]
        values = [0.0 if row is None or "skipped" in row else field(row) for row in rows]
        bars = panel.barh(places, values, height * 0.92, alpha=1 - 0.45 * index / len(cases))
        for bar, row, name in zip(bars, rows, names, strict=True):
            bar.set_facecolor(COLOURS.get(name, "#BBBBBB"))
            if row is not None and not row["same_loss"]:
                bar.set_hatch("//")
        row = case["unteach"]
        told = row["inputs"].split()[0] if several else f"overlap {row['overlap']:.2f}"
        suffix = f" {told}" if len(cases) > 1 else ""
        labels = [f" {ms(value)}{suffix}" if value else "" for value in values]
        panel.bar_label(bars, labels, fontsize=7)
    losses = {row["provider"]: row["same_loss"] for case in cases for row in measured(case)}
    labels = [name if losses[name] else f"{name}\n(another loss)" for name in names]
    panel.set_yticks(range(len(names)), labels, fontsize=8)
    panel.margins(x=0.2)


def device_slug(row: Row) -> str:
    return row["device"].replace("NVIDIA ", "").replace(" ", "-").lower() if on_gpu(row) else "cpu"


def pictures(cases: Sequence[Case], folder: Path) -> tuple[list[Path], list[Path]]:
    """One picture for each head, device, dtype and K; of sweeps over tokens, for each input too.

    Returns:
        All of them, and those that show more than one number of tokens.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        row = case["unteach"]
        name = f"bitopk-{row['preset']}-{device_slug(row)}-k{row['k']}-{row['dtype']}"
        groups.setdefault(name, []).append(case)
    paths, sweeps = [], []
    for name, group in groups.items():
        split = {name: group}
        if len({case["unteach"]["tokens"] for case in group}) > 1:
            split = {}
            for case in group:
                row = case["unteach"]
                inputs = row["inputs"].split()[0]
                split.setdefault(f"{name}-{inputs}-{row['overlap']:.1f}", []).append(case)
        for each, part in split.items():
            paths.append(folder / f"{each}.png")
            draw(part).savefig(paths[-1])
            if len({case["unteach"]["tokens"] for case in part}) > 1:
                sweeps.append(paths[-1])
    return paths, sweeps


def block(cases: Sequence[Case], paths: Sequence[Path], folder: str) -> str:
    """What stands in the README."""
    parts = []
    for device in dict.fromkeys(case["unteach"]["device"] for case in cases):
        here = [case for case in cases if case["unteach"]["device"] == device]
        row = here[-1]["unteach"]
        how = "medians" if on_gpu(row) else f"threads: {row['threads']}, best"
        parts.append(
            f"{device}, {how} of {row['rounds']} interleaved rounds in one process (in brackets "
            f"the 20th to 80th percentile), torch {row['versions']['torch']}, "
            f"commit `{row['commit']}`:"
        )
        parts.append(summary(here))
    if not any(on_gpu(case["unteach"]) for case in cases):
        parts.append("On a GPU: not measured.")
    parts.append(DEFINITIONS)
    parts += [f"![time and extra memory]({folder}/{path.name})" for path in paths]
    parts.append(
        f"Every provider: [`{folder}/bitopk.md`]({folder}/bitopk.md). Measured by `python -m "
        "unteach.benchmarks.bench_bitopk`, drawn by `python -m unteach.benchmarks.figures`."
    )
    return "\n\n".join(parts)


def rewrite(readme: Path, text: str, begin: str = BEGIN, end: str = END) -> bool:
    """Put the text between two markers; False, and a word of it, where the file lacks them."""
    content = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if begin not in content or end not in content:
        print(f"{readme.name} has no block {begin} … {end}")
        return False
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Read the rows, write tables and pictures beside them, and the README's block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    folder: Path = options.results
    cases = latest_cases(read_rows(folder / "bench_bitopk.jsonl"))
    if not cases:
        parser.error(f"{folder} holds no full comparison: run unteach.benchmarks.bench_bitopk")
    paths, sweeps = pictures(cases, folder)
    parts = [full_table(case) for case in cases] + [f"![{p.stem}]({p.name})" for p in paths]
    text = "\n\n".join(parts)
    (folder / "bitopk.md").write_text(f"## The fused loss\n\n{text}\n", encoding="utf-8")
    rewrite(options.readme, block(cases, sweeps or paths, "benchmarks/results"))
    print(f"{len(cases)} cases, {len(paths)} pictures in {folder}")
    if steps := read_rows(folder / "bench_step.jsonl"):
        rewrite(options.readme, memory_block(steps), *MEMORY)
    if plans := read_rows(folder / "bench_plan.jsonl"):
        rewrite(options.readme, plan_block(plans), *PLAN)


if __name__ == "__main__":
    main()
