"""The command line: `unteach run RECIPE` and one command a stage.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import os
import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from unteach.engine.errors import InputError
from unteach.recipes.opening import ConfigFile, Debug, Recipe, Settings, opened, resolve, stopping

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model forget one topic, keep the rest, and resist attacks.",
)

# Each has a benchmark of its own, benchmarks/bench_<name>.py.
KERNELS = ("bitopk", "linear_topk", "gather_linear", "linear_logprob", "linear_kl")


class Questions(StrEnum):
    tune = "tune"
    test = "test"


Stress = Annotated[
    bool,
    typer.Option(
        "--stress",
        help="also measure the relearning, rounding, few-shot, … that `evaluate` asks for",
    ),
]


@app.command()
def recipes(
    recipe: Annotated[
        str | None, typer.Argument(help="print every setting of this one, as --set takes it")
    ] = None,
) -> None:
    """List what can be run, or the settings of a recipe, one line each.

    Example: unteach recipes quickstart
    """
    from unteach.recipes.catalog import RECIPES, described_settings, summary

    if recipe is not None:
        for line in described_settings(recipe):
            typer.echo(line)
        return
    width = max(len(name) for name in RECIPES)
    for name in RECIPES:
        typer.echo(f"{name:<{width}}  {summary(name)}")


@app.command()
def run(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """The whole walk: data, teach, train, evaluate, report; resumes what was killed.

    Example: unteach run quickstart --set method.name=sft --set run.folder=runs/sft
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import run_all

        run_all(work)


@app.command()
def teach(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="check the cache against the teacher's own forward")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="make damaged or outdated shards again")
    ] = False,
    debug: Debug = False,
) -> None:
    """Build the cache of the prompted teacher.

    Example: unteach teach tiny --verify
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import target_stage, teach_stage, verify_stage

        target_stage(work)
        cache = teach_stage(work, rebuild=rebuild)
        if verify:
            verify_stage(work, cache)


@app.command()
def train(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Train the student from the teacher cache, and export it.

    Example: torchrun --nproc-per-node 8 -m unteach.recipes.cli train quickstart
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import target_stage, train_stage, training_cache

        target_stage(work)
        train_stage(work, training_cache(work))


@app.command()
def evaluate(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="also these tasks of lm-eval, parted by commas")
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option("--lm-eval-include", help="folder with task files of your own")
    ] = None,
    debug: Debug = False,
) -> None:
    """Score the base model and the trained one.

    Example: unteach evaluate quickstart --lm-eval mmlu,wmdp_cyber
    """
    if lm_eval is not None:
        from unteach.engine.evaluate.harness import check_harness

        check_harness(lm_eval)
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import evaluate_stage, harness_stage

        evaluate_stage(work)
        if lm_eval is not None:
            harness_stage(work, lm_eval, lm_eval_include)


@app.command()
def report(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Write report.md, report.html and the pictures of a finished run.

    Example: unteach report quickstart
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import report_stage

        report_stage(work)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    kernel: Annotated[
        str | None, typer.Argument(help=f"{', '.join(KERNELS)}; all without it")
    ] = None,
) -> None:
    """Measure the kernels beside every peer that is installed.

    Options behind the name are the benchmark's own: `python -m unteach.benchmarks.bench_bitopk
    --help` lists them.

    Example: unteach bench bitopk --preset llama-3.2-3b --device cuda --tokens 8192
    """
    options = context.args
    if kernel is not None and kernel.startswith("-"):  # the name was left out
        options, kernel = [kernel, *options], None
    if kernel is not None and kernel not in KERNELS:
        raise InputError(f"There is no benchmark {kernel}: choose {', '.join(KERNELS)}.")
    for name in [kernel] if kernel else KERNELS:
        import_module(f"unteach.benchmarks.bench_{name}").main(options)


@app.command()
def compare(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="rows, parted by commas; all of them if left out"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="trainings of each method")] = 3,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            help="learning rates to choose from, parted by commas; a third of optim.lr, optim.lr "
            "and three times it if left out; a single one is taken as it is",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="optimiser steps of each training")
    ] = None,
    stress: Stress = False,
    debug: Debug = False,
) -> None:
    """Train and score every method on the same data and budget; goes on where it was stopped.

    Example: unteach compare tiny --seeds 1 --rates 1e-3 --steps 2
    """
    budget = [] if steps is None else [f"optim.steps={steps}"]
    with opened(recipe, config, [*(settings or []), *budget]) as work:
        from unteach.engine.compare import chosen_rates, chosen_rows
        from unteach.engine.compare import compare as compare_rows

        chosen = chosen_rates(rates, work.asked.optim.lr)
        compare_rows(work, chosen_rows(methods), seeds, chosen, stress=stress)


@app.command()
def study(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--factors",
            help="names parted by commas, or `all`; k=4/8/16 takes some levels; the list is "
            "printed if left out",
        ),
    ] = None,
    levels: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            help="factor:level:section.key=value adds a level, or a factor of your own; as often "
            "as needed",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="trainings of each level")] = 1,
    split: Annotated[
        Questions,
        typer.Option("--split", help="`tune` to choose settings, `test` to confirm what moved"),
    ] = Questions.tune,
    stress: Stress = False,
    debug: Debug = False,
) -> None:
    """Vary one factor at a time around a recipe; goes on where it was stopped.

    Example: unteach study tiny --factors k=2/4,alpha --seeds 1
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.model import blocks, empty_model
        from unteach.engine.study import study as study_factors
        from unteach.recipes.factors import chosen_factors, factors

        table = factors(work.asked, len(blocks(empty_model(work.origin, work.asked.model))))
        if names is None:
            for name, known in table.items():
                typer.echo(f"{name}: {' / '.join(known)}")
            return
        chosen = chosen_factors(names, work.asked, table, levels or [])
        study_factors(work, chosen, seeds, split.value, stress=stress)


@app.command()
def gradients(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Measure how far the goals' gradients point the same way, raw against standardised.

    Example: unteach gradients tiny --set method.name=sft
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.gradients import measure_gradients

        measure_gradients(work)


@app.command()
def standardize(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Turn raw text into records: questions, neighbours, anchors, attacks.

    Example: unteach standardize muse-books --set standardize.forget=books/
    --set standardize.topic="Harry Potter" --set writer.kind=endpoint --set writer.model=NAME
    """
    resolved = resolve(recipe, config, settings)
    from unteach.engine.data.standardize_stage import standardize as run_stage

    with stopping():
        run_stage(resolved)


@app.command()
def prefixes(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    target: Annotated[
        str, typer.Option("--target", help="`base`, or `model` for the trained one")
    ] = "base",
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="rounds of the search")] = 10,
    children: Annotated[int, typer.Option("--children", min=1, help="proposals a round")] = 16,
    per_question: Annotated[
        bool, typer.Option("--per-question", help="one prefix for each held-out question")
    ] = False,
    debug: Debug = False,
) -> None:
    """Search for the openings that make a model leak, and attack held-out questions with them.

    Example: unteach prefixes quickstart --target model --rounds 10
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import prefix_stage

        prefix_stage(work, target, rounds=rounds, children=children, per_question=per_question)


@app.command()
def plan(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one GPU each")] = 1,
    memory: Annotated[float, typer.Option(min=0, help="memory of each GPU, GiB")] = 80.0,
    debug: Debug = False,
) -> None:
    """Say what a training step takes, and which switches make it fit; nothing is loaded.

    Example: unteach plan quickstart --gpus 8 --memory 80
    """
    resolved = resolve(recipe, config, settings)
    from unteach.engine.plan import lines

    if gpus % resolved.parallel.replicate:
        raise InputError(
            f"parallel.replicate is {resolved.parallel.replicate}, which does not divide {gpus} "
            "GPUs: give a multiple with --gpus."
        )
    if not math.isfinite(memory):
        raise InputError(f"--memory {memory}: give a number of GiB, as 80.")
    for line in lines(resolved, gpus, int(memory * 2**30)):
        typer.echo(line)


def main() -> None:
    """Run the command line; errors of input and of files are one sentence and exit code 2."""
    # OpenMP threads that spin long while they wait make torch 15 times slower on a shared CPU.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if "--debug" in sys.argv or error.filename is None:
            raise
        typer.echo(f"Error: {error.filename} cannot be used ({error.strerror}).", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
