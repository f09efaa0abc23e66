"""How every command begins: its common options, the config they resolve to, the run folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unteach.engine.errors import InputError

if TYPE_CHECKING:
    from unteach.engine.config import Config
    from unteach.engine.run import Run

OTHER_RECORDS = ("data.path=", "data.source=")
Recipe = Annotated[str | None, typer.Argument(help="a name that `unteach recipes` lists")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="config.yaml of an earlier run instead of a recipe")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, as often as needed")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a command with one sentence and exit code 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def opened(recipe: str | None, path: Path | None, settings: list[str] | None) -> Iterator[Run]:
    """Resolve the config, join the other processes, open the run folder."""
    config = resolve(recipe, path, settings)
    from unteach.engine.run import open_run
    from unteach.engine.train.parallel import joined

    with stopping(), joined(config.run.device, config.parallel.replicate) as world:
        yield open_run(config, world)


def resolve(recipe: str | None, path: Path | None, settings: list[str] | None) -> Config:
    """The config that a recipe or a file describes, with the settings of the command line.

    A recipe's open questions belong to its own records: other records stand without them.
    """
    from unteach.engine.config import load_config, override
    from unteach.recipes.catalog import find_recipe

    if (recipe is None) == (path is None):
        raise InputError("Name a recipe (see `unteach recipes`) or give --config, one of the two.")
    config = load_config(path) if path is not None else find_recipe(recipe or "")
    chosen = settings or []
    if recipe is not None and any(each.startswith(OTHER_RECORDS) for each in chosen):
        chosen = [*(f"{section}.open_questions=null" for section in ("data", "evaluate")), *chosen]
    return override(config, chosen)
