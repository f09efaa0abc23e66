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
    """As in a terminal: what a shell starts in the background ignores SIGINT."""
    shell = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, shell)


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
