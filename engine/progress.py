"""A progress bar with rate and time left; plain lines when the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL_S = 15.0


class Advance(Protocol):
    """Report `count` more units done, with a short note to show beside the bar."""

    def __call__(self, count: int, note: str = "") -> None: ...


def is_main() -> bool:
    """Whether this process is rank 0, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print one line, on rank 0 only."""
    if is_main():
        Console(highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def progress(title: str, total: int, *, unit: str = "rows", done: int = 0) -> Iterator[Advance]:
    """Show how far a stage is; the block gets `advance(count, note)`.

    Args:
        total: how many units the whole stage has.
        done: units that an earlier, killed run had already finished.
    """
    console = Console(highlight=False)
    if not is_main():
        yield _silent
    elif console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")

            def advance(count: int, note: str = "") -> None:
                bar.update(task, advance=count, note=note)

            yield advance
    else:
        yield from _plain(title, total, unit, done)


def _silent(count: int, note: str = "") -> None:
    """Other ranks show nothing."""


class _Rate(ProgressColumn):
    """Units a second of this process, as in the plain lines."""

    def render(self, task: Task) -> Text:
        """Nothing before the first unit is done."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _plain(title: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    reached = done

    def advance(count: int, note: str = "") -> None:
        nonlocal reached, last
        reached += count
        at = time.monotonic()
        if at - last < PLAIN_INTERVAL_S and reached < total:
            return
        last = at
        rate = (reached - done) / max(at - start, 1e-9)
        left = (total - reached) / max(rate, 1e-9)
        print(
            f"{title}: {reached}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left {note}".rstrip(),
            flush=True,
        )

    yield advance
