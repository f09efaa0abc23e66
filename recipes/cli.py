"""The command line: `unteach run RECIPE` and one command a stage.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unteach.engine.errors import InputError

if TYPE_CHECKING:
    from unteach.engine.config import Config
    from unteach.engine.run import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model forget one topic, keep the rest, and resist attacks.",
)
Recipe = Annotated[str | None, typer.Argument(help="a name that `unteach recipes` lists")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="config.yaml of an earlier run instead of a recipe")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, as often as needed")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.command()
def recipes() -> None:
    """List what can be run, one line each.

    Example: unteach recipes
    """
    from unteach.recipes.catalog import RECIPES, summary

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
        from unteach.engine.stages import target_stage, teach_stage, train_stage

        target_stage(work)
        train_stage(work, teach_stage(work))


@app.command()
def evaluate(
    recipe: Recipe = None,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Score the base model and the trained one.

    Example: unteach evaluate quickstart --set evaluate.batch_size=32
    """
    with opened(recipe, config, settings) as work:
        from unteach.engine.stages import evaluate_stage

        evaluate_stage(work)


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
    for line in lines(resolved, gpus, int(memory * 2**30)):
        typer.echo(line)


@contextmanager
def opened(recipe: str | None, path: Path | None, settings: list[str] | None) -> Iterator[Run]:
    """Resolve the config, join the other processes, open the run folder."""
    config = resolve(recipe, path, settings)
    from unteach.engine.run import open_run
    from unteach.engine.train.parallel import joined

    try:
        with joined(config.run.device, config.parallel.replicate) as world:
            yield open_run(config, world)
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None


def resolve(recipe: str | None, path: Path | None, settings: list[str] | None) -> Config:
    """The config that a recipe or a file describes, with the settings of the command line."""
    from unteach.engine.config import load_config, override
    from unteach.recipes.catalog import find_recipe

    if (recipe is None) == (path is None):
        raise InputError("Name a recipe (see `unteach recipes`) or give --config, one of the two.")
    config = load_config(path) if path is not None else find_recipe(recipe or "")
    return override(config, settings or [])


def main() -> None:
    """Run the command line; errors of input are one sentence and exit code 2."""
    # OpenMP threads that spin long while they wait make torch 15 times slower on a shared CPU.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
