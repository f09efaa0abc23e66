"""How a command ends that is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import typer

from unteach.recipes.opening import stopping


@contextmanager
def handled() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_command_is_told_and_not_left_behind(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with handled(), pytest.raises(typer.Exit) as stopped, stopping():
        signal.raise_signal(number)
    assert stopped.value.exit_code == 130
    assert capsys.readouterr().err == "Stopped; the same command goes on from here.\n"
    with handled(), stopping():
        pass
